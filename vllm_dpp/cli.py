"""The command line. Nothing heavy is imported before a command is chosen."""

import argparse
import importlib
import importlib.util
import os
import shlex
import sys
from collections.abc import Callable, Sequence

from vllm_dpp import __version__

NO_VLLM = (
    "vLLM is not installed: pip install 'vllm-dpp[cuda]' for an NVIDIA GPU, "
    "'vllm-dpp[cpu]' for a CPU"
)


NO_LABORATORY = (
    "{} needs the project's own task and trained models, which are in a checkout of its "
    "repository and not in the installed package"
)
OF_LABORATORY = ("quality", "share-out", "large-frames", "footage")

BENCHMARKS = {
    "pruner": "vllm_dpp.bench.pruner.command",
    "large-segments": "vllm_dpp.bench.large_segments",
    "share-out": "vllm_dpp.bench.share_out",
    "large-frames": "vllm_dpp.bench.large_frames",
    "footage": "vllm_dpp.bench.footage",
    "throughput": "vllm_dpp.bench.throughput.command",
    "quality": "vllm_dpp.bench.quality.command",
    "chat": "vllm_dpp.bench.chat.command",
    "serve": "vllm_dpp.bench.serve.command",
    "soak": "vllm_dpp.bench.soak.command",
    "growth": "vllm_dpp.bench.growth",
    "gpu": "vllm_dpp.bench.gpu.command",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; bad input is a line on stderr and exit status 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="vllm-dpp",
        usage="%(prog)s COMMAND [arguments]",
        description="Serve vision-language models with video tokens pruned inside the decoder.",
        epilog="commands:\n"
        + "\n".join(f"  {name:8}{command.__doc__}" for name, command in COMMANDS.items())
        + "\n\n`vllm-dpp COMMAND --help` says more of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), help=argparse.SUPPRESS)
    command = parser.parse_args(argv[:1]).command
    try:
        return COMMANDS[command](argv[1:])
    except (ValueError, OSError) as error:
        print(f"vllm-dpp {command}: error: {error}", file=sys.stderr)
        return 2


def serve(argv: Sequence[str]) -> int:
    """start `vllm serve` with pruning on, or only print the command"""
    parser = _serve_parser()
    from vllm_dpp.serve_command import dashed, serve_command

    given, rest = parser.parse_known_args(dashed(argv))
    settings = vars(given)
    dry_run = settings.pop("dry_run")
    _require_vllm()
    command = serve_command(settings, rest)
    print("+ " + shlex.join(command), flush=True)
    if not dry_run:
        module = ["-m", "vllm.entrypoints.cli.main"]  # what the script `vllm` runs
        os.execv(sys.executable, [sys.executable, *module, *command[1:]])
    return 0


def show(argv: Sequence[str]) -> int:
    """draw which tokens of a video were kept"""
    from vllm_dpp.show import main

    return main(argv)


def batch(argv: Sequence[str]) -> int:
    """ask questions about many videos, with Ray Data; resumes where it ended"""
    from vllm_dpp.batch.options import parse

    parsed = parse(argv)
    _require_vllm()
    from vllm_dpp.batch.command import main

    return main(*parsed)


def bench(argv: Sequence[str]) -> int:
    """measure it; `vllm-dpp bench --help` lists what can be measured"""
    parser = argparse.ArgumentParser(
        prog="vllm-dpp bench",
        usage=f"%(prog)s {{{','.join(BENCHMARKS)}}} [arguments]",
        epilog="pruner: the selection alone, against other algorithms; needs PyTorch only. "
        "large-segments: its low-rank path and ranks that share the work; needs PyTorch only. "
        "share-out: how the tokens of a long video are shared among its segments. "
        "large-frames: what segments see of videos whose slices are as long. "
        "footage: whether real videos look to the rules as rendered ones do. "
        "throughput: whole engines, against stock vLLM. "
        "quality: right answers of a small trained model, by method, at equal cost. "
        "chat: real servers, conversations about a video and streams that a long video meets. "
        "serve: real servers under vLLM's own `vllm bench serve`. "
        "soak: one real server under everything at once, for minutes. "
        "growth: bookkeeping on the host, as requests and prompts grow. "
        "gpu: all that only a GPU can show, in stages.",
    )
    parser.add_argument("benchmark", choices=list(BENCHMARKS))
    chosen = parser.parse_args(argv[:1]).benchmark
    if chosen in OF_LABORATORY and importlib.util.find_spec("vllm_dpp.quality") is None:
        print(f"error: {NO_LABORATORY.format(f'bench {chosen}')}", file=sys.stderr)
        return 2
    main = importlib.import_module(BENCHMARKS[chosen]).main
    return main(list(argv[1:])) or 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "serve": serve,
    "batch": batch,
    "show": show,
    "bench": bench,
}


def _require_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(NO_VLLM)
    from vllm_dpp.serving import vllm_versions

    vllm_versions.check()


def _serve_parser() -> argparse.ArgumentParser:
    from vllm_dpp.setting_flags import add_setting_flags

    parser = argparse.ArgumentParser(
        prog="vllm-dpp serve",
        usage="%(prog)s MODEL [settings] [--dry-run] [any flag of `vllm serve`]",
        description="Start `vllm serve` with video tokens pruned in the middle of the decoder. The "
        "plain command is printed first.",
        allow_abbrev=False,
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command and stop")
    add_setting_flags(parser)
    return parser
