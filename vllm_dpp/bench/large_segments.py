"""What long segments cost: exactly, with projected features, and shared out over two ranks.

``vllm-dpp bench large-segments --help`` lists the options. The projection is an approximation, so
beside its time stands what it loses: the share of tokens that it keeps as the exact selection does,
and by how much the log-determinant falls, per token kept. Sharing out is exact, which is checked.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from vllm_dpp.bench.help import HelpFormatter
from vllm_dpp.bench.provenance import one_line, provenance
from vllm_dpp.bench.pruner.problem import DESCRIPTION, Case, Problem, make_problem
from vllm_dpp.bench.pruner.timing import interleaved, seconds_of_call
from vllm_dpp.bench.summary import spread, spread_text, table
from vllm_dpp.pruning import PruningConfig, keep_indices

MODULE = "vllm_dpp.bench.large_segments"
CPU = torch.device("cpu")
NUM_RANKS = 2
SHARED_SEGMENTS = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0, or 1 where ranks select other tokens than one alone."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parse(arguments)
    device = torch.device(options.device)
    with torch.inference_mode():
        projected = [
            _projected(length, options, device)
            for length in options.lengths
            if length // 4 <= options.dim
        ]
    shared = _shared(options) if options.device == "cpu" else []
    if not all(row["same"] for row in shared):
        print("error: ranks select other tokens than one alone; nothing is reported")
        return 1
    document = {
        "provenance": provenance(MODULE, arguments),
        "features": DESCRIPTION,
        "dim": options.dim,
        "projected": projected,
        "shared": shared,
    }
    print(one_line(document["provenance"]))
    print(f"\nOne segment of n tokens, a quarter kept, D = {options.dim}")
    print(_projection_table(projected))
    if shared:
        title = f"{SHARED_SEGMENTS} segments of n tokens, {NUM_RANKS} ranks of one thread each"
        print(f"\n{title}\n{_sharing_table(shared)}")
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vllm-dpp bench large-segments",
        description="Exact selection in long segments against its approximation by projected "
        "features, and against two ranks that share the segments.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096], metavar="n")
    add("--dim", type=int, default=3584, help="features of a token")
    add("--projections", type=int, nargs="+", default=[256, 512, 1024], metavar="d")
    add("--repeats", type=int, default=5, help="rounds")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--json", type=Path, metavar="FILE", help="write all numbers, with provenance")
    options = parser.parse_args(arguments)
    for name in ("lengths", "projections"):
        if min(getattr(options, name)) < 4:
            parser.error(f"--{name} must be at least 4")
    return options


def _problem(num_segments: int, length: int, dim: int, device: torch.device) -> Problem:
    case = Case(
        dim=dim, num_segments=num_segments, tokens_per_segment=length, kept_per_segment=length // 4
    )
    return make_problem(case, seed=0, dtype=torch.float32, device=device, settings=PruningConfig())


def _projected(length: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Times of the exact and the projected selection, and what the latter loses."""
    problem = _problem(1, length, options.dim, device)
    settings = {
        dim: replace(problem.settings, projection_dim=dim) for dim in (None, *options.projections)
    }
    kept = {dim: keep_indices([problem.video], each)[0] for dim, each in settings.items()}
    runs = {
        str(dim): (lambda each=each: keep_indices([problem.video], each)[0])
        for dim, each in settings.items()
    }
    seconds = interleaved(runs, options.repeats, device, lambda name: None)
    exact = seconds.pop(str(None))
    best = _log_det(problem, kept[None])
    return {
        "length": length,
        "exact_seconds": exact,
        "projections": {
            dim: {
                "seconds": seconds[str(dim)],
                "same_share": len(set(kept[dim].tolist()) & set(kept[None].tolist()))
                / len(kept[None]),
                "log_det_lost_per_token": (best - _log_det(problem, kept[dim])) / len(kept[None]),
            }
            for dim in options.projections
        },
    }


def _log_det(problem: Problem, kept: Tensor) -> float:
    """Log-determinant of the kernel of the tokens kept of one segment, in float64."""
    rows = problem.features[kept].double()
    rows = rows / (rows.norm(dim=1, keepdim=True) + 1e-8)
    rows = rows * problem.relevance()[kept].double()[:, None]
    return float(torch.linalg.slogdet(rows @ rows.T).logabsdet)


def _shared(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Times of one rank alone and of several that share the segments, each with one thread."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder, options), nprocs=NUM_RANKS)
        rows: list[dict[str, Any]] = json.loads((Path(folder) / "rows").read_text())
    return rows


def _rank(rank: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)
    group = dist.group.WORLD
    rows = []
    for length in options.lengths:
        if length // 4 > options.dim:
            continue
        problem = _problem(SHARED_SEGMENTS, length, options.dim, CPU)
        video = [problem.video], problem.settings
        same = torch.equal(keep_indices(*video)[0], keep_indices(*video, group=group)[0])
        times: dict[str, list[float]] = {"alone": [], "shared": []}
        for _ in range(options.repeats):
            dist.barrier(group)
            if rank == 0:
                times["alone"].append(_seconds(problem, None))
            dist.barrier(group)
            times["shared"].append(_seconds(problem, group))
        rows.append({"length": length, "same": same, **times})
    if rank == 0:
        (Path(folder) / "rows").write_text(json.dumps(rows))
    dist.destroy_process_group()


def _seconds(problem: Problem, group: dist.ProcessGroup | None) -> float:
    return seconds_of_call(
        lambda: keep_indices([problem.video], problem.settings, group=group)[0], CPU
    )


def _projection_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ("n", "d", "exact ms", "projected ms", "exact / projected", "same tokens", "lost")
    cells = []
    for row in rows:
        exact = row["exact_seconds"]
        for dim, found in row["projections"].items():
            ratios = [a / b for a, b in zip(exact, found["seconds"], strict=True)]
            cells.append(
                (
                    str(row["length"]),
                    str(dim),
                    f"{1000 * spread(exact)[0]:.1f}",
                    f"{1000 * spread(found['seconds'])[0]:.1f}",
                    spread_text(spread(ratios), 2),
                    f"{100 * found['same_share']:.0f} %",
                    f"{found['log_det_lost_per_token']:.4f}",
                )
            )
    note = "lost: fall of the log-determinant, per token kept"
    return f"{table(header, cells)}\n{note}"


def _sharing_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ("n", "alone ms", "shared ms", "alone / shared")
    cells = []
    for row in rows:
        ratios = [a / b for a, b in zip(row["alone"], row["shared"], strict=True)]
        medians = (f"{1000 * spread(row[name])[0]:.1f}" for name in ("alone", "shared"))
        cells.append((str(row["length"]), *medians, spread_text(spread(ratios), 2)))
    return table(header, cells)


if __name__ == "__main__":
    raise SystemExit(main())
