"""Everything that only a GPU can show, in stages that each fit in eight minutes.

``vllm-dpp bench gpu --out DIR`` runs the tests marked `gpu`, times the kernels against what the
machine allows, and compares engines of a 7B model with random weights. A stage whose result of the
same commit is in DIR is not run again. ``--small`` runs everything in small, without a GPU.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dpp.bench.gpu import kernels, marked_tests, model
from vllm_dpp.bench.help import HelpFormatter
from vllm_dpp.bench.provenance import git_state, one_line

MODULE = "vllm_dpp.bench.gpu"
STAGE_SECONDS = 480
REPORT = "gpu.md"


@dataclass(frozen=True)
class Stage:
    """One part.

    Args:
        module: Run as a program, with `--output FILE.json`. It writes what it has as it goes on,
            and whether that `is_complete`.
        small: Its further arguments where there is no GPU.
        render: Makes text of what it wrote.
    """

    module: str
    small: tuple[str, ...]
    render: Callable[[dict[str, Any]], str]


STAGES = {
    "tests": Stage(marked_tests.MODULE, marked_tests.SMALL, marked_tests.render),
    "kernels": Stage(
        kernels.MODULE,
        ("--device", "cpu", "--sizes", "256", "--lengths", "128", "--dim", "64"),
        kernels.render,
    ),
    "model": Stage(
        model.MODULE,
        (
            *("--model", "toy:tiny", "--arms", "stock", "two-stages@0.4", "--concurrency", "2"),
            *("--prefill-frames", "8", "--frames", "8", "--side", "112", "--output-tokens", "4"),
            *("--repeats", "1", "--kv-cache-gib", "0.1", "--max-model-len", "1024"),
        ),
        model.render,
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run the stages.

    Returns:
        0; 1 where a stage failed or took too long, after all others.
    """
    options = _parse(sys.argv[1:] if argv is None else argv)
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in options.stages:
        output = options.out / f"{name}.json"
        if _is_done(output) and not options.again:
            print(f"{name}: done before ({output.name})")
            continue
        start = time.monotonic()
        problem = _run(STAGES[name], name, output, options)
        print(f"{name}: {problem or 'done'}, {time.monotonic() - start:.0f} s", flush=True)
        failed += [name] if problem else []
    report = _report(options.out)
    (options.out / REPORT).write_text(report)
    print(report)
    return 1 if failed else 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vllm-dpp bench gpu",
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="of results and logs")
    add("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="some of them")
    add("--stage-seconds", type=int, default=STAGE_SECONDS, help="limit of a stage")
    add("--again", action="store_true", help="run stages that are done, too")
    add("--small", action="store_true", help="in small, on a CPU: shows that it runs")
    return parser.parse_args(arguments)


def _run(stage: Stage, name: str, output: Path, options: argparse.Namespace) -> str | None:
    """Run one stage in a process group of its own; what went wrong, if anything."""
    command = [sys.executable, "-m", stage.module, "--output", str(output.resolve())]
    command += stage.small if options.small else ()
    with (options.out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            status = process.wait(options.stage_seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return f"more than {options.stage_seconds} s"
    return f"status {status}, see {name}.log" if status else None


def _is_done(output: Path) -> bool:
    """Whether there is a whole result of this very code."""
    commit, dirty = git_state()
    if commit is None or dirty or not output.exists():
        return False
    document = json.loads(output.read_text())
    made_by = document["provenance"]
    return document["is_complete"] and made_by["commit"] == commit and not made_by["dirty"]


def _report(folder: Path) -> str:
    parts = []
    for name, stage in STAGES.items():
        file = folder / f"{name}.json"
        if file.exists():
            document = json.loads(file.read_text())
            text = stage.render(document)
            parts.append(f"## {name}\n\n{one_line(document['provenance'])}\n\n```\n{text}\n```\n")
    return "\n".join(parts)
