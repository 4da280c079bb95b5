"""The fused kernels beside the bare Gram products, PyTorch's loop, and what the machine allows."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_dpp.bench.provenance import provenance
from vllm_dpp.bench.pruner.command import main as bench_pruner
from vllm_dpp.bench.pruner.timing import seconds_of_call
from vllm_dpp.bench.summary import table

MODULE = "vllm_dpp.bench.gpu.kernels"
DIM = 3584
ARMS = ("fused", "torch", "change", "gram")
TRIES = 20


def ceilings(device: torch.device, small: bool) -> dict[str, float]:
    """Bytes/s of a copy, read and written, and FLOP/s of square products, by name."""
    n, num_bytes = (512, 1 << 24) if small else (8192, 1 << 31)
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy": 2 * num_bytes / _best(lambda: target.copy_(source), device)}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        found[name] = 2 * n**3 / _best(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
    return found


def _best(run: Callable[[], Any], device: torch.device) -> float:
    run()
    return min(seconds_of_call(run, device) for _ in range(TRIES))


def floor_seconds(num_tokens: int, length: int, dim: int, limits: dict[str, float]) -> float:
    """Least time of the Gram products of a bfloat16 video, read once."""
    moved = 2 * num_tokens * dim + 4 * num_tokens * length
    return max(moved / limits["copy"], 2 * num_tokens * length * dim / limits["bfloat16"])


def main(argv: list[str] | None = None) -> int:
    """Run the stage; 0, or what the pruner's benchmark ends with."""
    arguments = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda", help="(%(default)s)")
    add("--sizes", type=int, nargs="+", default=[1024 << i for i in (0, 2, 4, 6)], metavar="N")
    add("--lengths", type=int, nargs="+", default=[1024, 512, 256], metavar="n")
    add("--dim", type=int, default=DIM, metavar="D", help="(%(default)s)")
    add("--output", type=Path, required=True, metavar="FILE.json", help="all numbers")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    limits = ceilings(device, small=device.type == "cpu")
    arms = [arm for arm in ARMS if device.type == "cuda" or arm != "fused"]
    document: dict[str, Any] = {
        "provenance": provenance(MODULE, arguments, ("triton",)),
        "ceilings": limits,
        "dim": options.dim,
        "runs": {},
    }
    for length in options.lengths:
        file = options.output.with_name(f"{options.output.stem}-{length}.json")
        sizes = [str(size) for size in options.sizes if size % length == 0]
        asked = ["--sizes", *sizes, "--tokens-per-segment", str(length), "--dim", str(options.dim)]
        asked += ["--device", options.device, "--dtype", "bfloat16", "--arms", *arms]
        if status := bench_pruner([*asked, "--max-seconds", "1", "--json", str(file)]):
            return status
        document["runs"][length] = json.loads(file.read_text())
        file.unlink()
        document["is_complete"] = length == options.lengths[-1]
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(render(document))
    return 0


def render(document: dict[str, Any]) -> str:
    """A table: milliseconds of each arm, and of the floor."""
    limits = document["ceilings"]
    rows = []
    for length, run in document["runs"].items():
        arms = [arm for arm in ARMS if arm in run["arms"]]
        for case in run["cases"]:
            size = case["num_tokens"]
            floor = floor_seconds(size, int(length), document["dim"], limits)
            times = [case["arms"].get(arm, {}).get("median_seconds") for arm in arms]
            shown = ["-" if t is None else f"{1000 * t:.3f}" for t in times]
            rows.append([f"{size} in segments of {length}", *shown, f"{1000 * floor:.3f}"])
    ceiling = ", ".join(f"{name} {value / 1e12:.3g}e12/s" for name, value in limits.items())
    return f"ceilings: {ceiling}\n" + table(["tokens", *(f"{a}, ms" for a in arms), "floor"], rows)


if __name__ == "__main__":
    raise SystemExit(main())
