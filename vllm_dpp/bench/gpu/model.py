"""Engines of one model side by side on one GPU: prefill alone, then requests at once.

The weights are random (`--load-format dummy`), so only times mean anything. All engines are loaded
at once, in processes of their own, and take turns; the videos of all are processed in parallel and
that time does not count.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vllm_dpp.bench.help import HelpFormatter
from vllm_dpp.bench.provenance import one_line, provenance
from vllm_dpp.bench.summary import spread_text, table
from vllm_dpp.bench.throughput import options as throughput_options
from vllm_dpp.bench.throughput.arms import Arm, Model, parse_arm
from vllm_dpp.bench.throughput.drive import Round
from vllm_dpp.bench.throughput.engine_process import EngineProcess
from vllm_dpp.bench.throughput.report import ratios
from vllm_dpp.bench.throughput.workload import Workload
from vllm_dpp.toy.dummy import SHAPES, make_dummy

MODULE = "vllm_dpp.bench.gpu.model"
ARMS = ("stock", "evs@0.6", "two-stages@0.4", "two-stages@0.2", "dpp@0.25")
TEXT, PREFILL = "text", "prefill"
SIDE = 448  # pixels: 256 tokens for two frames
GIB = 2**30


def workloads(options: argparse.Namespace) -> dict[str, Workload]:
    """What every engine does, by name."""
    frame = {"height": options.side, "width": options.side}
    tokens = options.output_tokens
    alone = Workload(1, options.prefill_frames, **frame, output_tokens=1, encoded_before=True)
    found = {TEXT: Workload(1, 0, **frame, output_tokens=tokens), PREFILL: alone}
    for number in options.concurrency:
        work = Workload(number, options.frames, **frame, output_tokens=tokens)
        found[f"{number} at once"] = work
    return found


def expected_speedup(arm: Arm, num_layers: int) -> float:
    """Of prefill, if a layer took time in proportion to its rows and nothing else took any."""
    below = (arm.prune_layer or 0) / num_layers
    return 1 / (arm.input_share * (below + (1 - below) * arm.retention_ratio))


def start(processes: Sequence[EngineProcess], stack: ExitStack) -> dict[str, Any]:
    """Start all at once; what each says of itself."""
    for process in processes:
        stack.callback(process.stop)
    with ThreadPoolExecutor(len(processes)) as pool:
        facts = list(pool.map(EngineProcess.start, processes))
    return {process.arm.name: found for process, found in zip(processes, facts, strict=True)}


def in_turn(processes: Sequence[EngineProcess], work: Workload) -> dict[str, Round]:
    """One round of each."""
    for process in processes:
        process.submit(work)
    for process in processes:
        process.submitted()
    done = {}
    for process in processes:
        while (ended := process.turn()) is None:
            pass
        done[process.arm.name] = ended
    return done


def measure(
    processes: Sequence[EngineProcess], work: Workload, repeats: int
) -> dict[str, list[Round]]:
    """``repeats`` rounds of each after one that does not count; everybody is first in turn."""
    rounds: dict[str, list[Round]] = {process.arm.name: [] for process in processes}
    order = list(processes)
    for index in range(repeats + 1):
        for name, ended in in_turn(order, work.of_round(index)).items():
            rounds[name].append(ended)
        order = order[1:] + order[:1]
    return {name: found[1:] for name, found in rounds.items()}


def numbers(rounds: Mapping[str, list[Round]]) -> dict[str, dict[str, Any]]:
    """Of each arm: seconds, and stock's over its own in the same round."""
    stock = rounds["stock"]
    return {
        name: {
            "ttft": median(median(r.ttft) for r in mine),
            "seconds": median(r.seconds for r in mine),
            "requests_per_second": median(len(r.outputs) / r.seconds for r in mine),
            "prompt_tokens": mine[0].prompt_tokens[0],
            "preemptions": sum(r.preemptions for r in mine),
            "ttft_speedup": ratios(stock, mine, lambda r: median(r.ttft)),
            "throughput_ratio": ratios(stock, mine, lambda r: r.seconds),
            "selection": [r.selection for r in mine if r.selection],
            "step_seconds": [r.step_seconds for r in mine],
        }
        for name, mine in rounds.items()
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the arguments; wrong ones end the program with status 2."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--model", default=SHAPES[0], help=f"{', '.join(SHAPES)}, toy:mid or toy:tiny")
    add("--arms", nargs="+", default=list(ARMS), metavar="ARM", help="as of `bench throughput`")
    add("--concurrency", type=int, nargs="+", default=[1, 8, 32], metavar="N")
    add("--prefill-frames", type=int, default=128, help="of the one video")
    add("--frames", type=int, default=32, help="of a video of those at once")
    add("--side", type=int, default=SIDE, help="pixels of a frame's side")
    add("--output-tokens", type=int, default=64, help="of a request")
    add("--repeats", type=int, default=2, help="rounds of each")
    add("--kv-cache-gib", type=float, default=4.0, help="of each engine")
    add("--max-model-len", type=int, default=24576, help="tokens of a request")
    add("--output", type=Path, required=True, metavar="FILE.json", help="all numbers")
    options = parser.parse_args(arguments)
    if "stock" not in options.arms:
        parser.error("--arms needs stock: every ratio is one to it")
    return options


def _checkpoint(name: str, folder: Path) -> tuple[str, Model, dict[str, Any]]:
    """Path, shape, and arguments that only such a checkpoint needs."""
    if name in SHAPES:
        path, model = throughput_options.resolve_model(str(make_dummy(folder / name, name)))
        return path, model, {"load_format": "dummy"}
    return *throughput_options.resolve_model(name), {"dtype": "float32"}


def main(argv: list[str] | None = None) -> int:
    """Run the stage."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parse(arguments)
    on_gpu = torch.cuda.is_available()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-dpp-gpu-")))
        path, model, more = _checkpoint(options.model, folder)
        arms = [parse_arm(x, model, retention_ratio=0.25, prune_layer=None) for x in options.arms]
        engine_args = {
            "model": path,
            "max_model_len": options.max_model_len,
            "kv_cache_memory_bytes": int(options.kv_cache_gib * GIB),
            "limit_mm_per_prompt": {"video": 1, "image": 0},
            "seed": 0,
            "enforce_eager": not on_gpu,
            **more,
        }
        if on_gpu:
            engine_args["gpu_memory_utilization"] = round(0.9 / len(arms), 3)
        processes = [EngineProcess(arm, engine_args) for arm in arms]
        facts = start(processes, stack)
        document: dict[str, Any] = {
            "provenance": provenance(MODULE, arguments, ("triton",)),
            "model": {"name": options.model, **asdict(model)},
            "arms": {arm.name: asdict(arm) for arm in arms},
            "engines": {name: asdict(found) for name, found in facts.items()},
            "expected_prefill_speedup": {
                arm.name: expected_speedup(arm, model.num_layers) for arm in arms
            },
            "workloads": {},
        }
        all_work = workloads(options)
        for name, work in all_work.items():
            document["workloads"][name] = {
                "work": asdict(work),
                "arms": numbers(measure(processes, work, options.repeats)),
            }
            document["is_complete"] = len(document["workloads"]) == len(all_work)
            options.output.write_text(json.dumps(document, indent=1) + "\n")
            print(_table(name, document), flush=True)
    print(one_line(document["provenance"]))
    return 0


def render(document: dict[str, Any]) -> str:
    """All tables."""
    return "\n\n".join(_table(name, document) for name in document["workloads"])


def _table(name: str, document: dict[str, Any]) -> str:
    rows = []
    for arm, found in document["workloads"][name]["arms"].items():
        expected = document["expected_prefill_speedup"][arm]
        row = [arm, str(found["prompt_tokens"]), f"{1000 * found['ttft']:.1f}"]
        row += [spread_text(found["ttft_speedup"], 2)]
        row += [f"{expected:.2f}"] if name == PREFILL else []
        row += [f"{found['requests_per_second']:.2f}", spread_text(found["throughput_ratio"], 2)]
        rows.append(row)
    header = ["arm", "prompt tokens", "TTFT, ms", "TTFT of stock over it"]
    header += ["by rows"] if name == PREFILL else []
    header += ["requests/s", "of stock's"]
    return f"{name}\n{table(header, rows)}"


if __name__ == "__main__":
    raise SystemExit(main())
