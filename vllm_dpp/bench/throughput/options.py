"""The command line of the throughput benchmark."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_dpp.bench.help import HelpFormatter
from vllm_dpp.bench.throughput.arms import DEFAULT_ARMS, GRAMMAR, Arm, Model, parse_arm
from vllm_dpp.bench.throughput.workload import Workload

MODULE = "vllm_dpp.bench.throughput"
TOY_PREFIX = "toy:"
MIB = 2**20


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments; wrong ones end the program with status 2."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description="Offline throughput of stock vLLM, EVS and mid-decoder pruning, arm by arm and "
        "round by round on the same videos, with the same KV bytes and scheduler limits.",
        formatter_class=HelpFormatter,
    )
    _add_work(parser)
    _add_engine(parser)
    options = parser.parse_args(argv)
    if "stock" not in options.arms:
        parser.error("--arms needs stock: every ratio is one to it")
    if len(set(options.arms)) < len(options.arms):
        parser.error("--arms names an arm twice")
    if options.repeats < 1 or options.num_requests < 1 or options.output_tokens < 1:
        parser.error("--repeats, --num-requests and --output-tokens must be at least 1")
    if options.alternate_steps and options.reload:
        parser.error("--alternate-steps needs all arms loaded at once: leave out --reload")
    return options


def _add_work(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="toy:mid", help="a checkpoint, or toy:mid or toy:tiny (random weights)")
    add("--arms", nargs="+", default=list(DEFAULT_ARMS), metavar="ARM", help=GRAMMAR)
    add("--retention-ratio", type=float, default=0.25, help="r of dpp arms that name none")
    add("--prune-layer", type=int, help="K of dpp arms that name none; left out: the plugin's own")
    add("--num-requests", type=int, default=16, help="requests in a round, all there at its start")
    add("--frames", type=int, default=32, help="frames of a video")
    add("--height", type=int, default=112, help="pixels")
    add("--width", type=int, default=168, help="pixels")
    add("--output-tokens", type=int, default=32, help="tokens that each request generates")
    add("--repeats", type=int, default=3, help="rounds of every arm")
    add(
        "--alternate-steps",
        action="store_true",
        help="let the arms of a round take turns step by step, not round by round: for differences "
        "of a few percent",
    )
    add("--output", type=Path, metavar="FILE.json", help="write all numbers with provenance")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--kv-cache-mib", type=int, default=72, help="KV memory of every arm")
    add("--max-num-seqs", type=int, default=64, help="limit of running requests")
    add("--max-num-batched-tokens", type=int, default=2048, help="limit of tokens in a step")
    add("--max-model-len", type=int, default=2048, help="limit of tokens in a request")
    add("--block-size", type=int, default=32, help="tokens in a KV block")
    add("--dtype", help="float32, bfloat16, …; left out: float32 for toys, else the model's own")
    add(
        "--gpu-memory-utilization",
        type=float,
        help="of each arm; left out: 0.9 shared by the arms that are loaded at once",
    )
    add(
        "--enforce-eager",
        action=argparse.BooleanOptionalAction,
        help="no compilation and no CUDA graphs; left out: only on a CPU",
    )
    add(
        "--reload",
        action="store_true",
        help="load one arm at a time, anew for each of its rounds: for models of which several do "
        "not fit in memory",
    )


def workload_of(options: argparse.Namespace) -> Workload:
    return Workload(
        num_requests=options.num_requests,
        num_frames=options.frames,
        height=options.height,
        width=options.width,
        output_tokens=options.output_tokens,
    )


def arms_of(options: argparse.Namespace, model: Model) -> list[Arm]:
    """Raises ``ValueError`` where an arm does not parse."""
    return [
        parse_arm(
            text, model, retention_ratio=options.retention_ratio, prune_layer=options.prune_layer
        )
        for text in options.arms
    ]


def engine_args_of(options: argparse.Namespace, model_path: str, *, on_cpu: bool) -> dict[str, Any]:
    """The engine arguments that all arms share."""
    eager = on_cpu if options.enforce_eager is None else options.enforce_eager
    arguments = {
        "model": model_path,
        "dtype": options.dtype or ("float32" if options.model.startswith(TOY_PREFIX) else "auto"),
        "enforce_eager": eager,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "block_size": options.block_size,
        "kv_cache_memory_bytes": options.kv_cache_mib * MIB,
        "limit_mm_per_prompt": {"video": 1, "image": 0},
        "seed": 0,
    }
    if not on_cpu:
        share = 0.9 / (1 if options.reload else len(options.arms))
        arguments["gpu_memory_utilization"] = options.gpu_memory_utilization or share
    return arguments


def model_name(model: str) -> str:
    """Its name without folders of this machine; hub names keep their owner."""
    return Path(model).resolve().name if Path(model).exists() else model


def resolve_model(name: str) -> tuple[str, Model]:
    """Where vLLM finds the checkpoint, made first if it is a toy, and its shape.

    Raises:
        ValueError: There is no toy of that name.
    """
    from transformers import AutoConfig

    path = _make_toy(name.removeprefix(TOY_PREFIX)) if name.startswith(TOY_PREFIX) else name
    config = AutoConfig.from_pretrained(path)
    layers = config.get_text_config().num_hidden_layers
    return path, Model(architecture=config.architectures[0], num_layers=layers)


def _make_toy(name: str) -> str:
    from vllm_dpp.toy.checkpoint import make_checkpoint
    from vllm_dpp.toy.spec import MID, TINY

    specs = {"mid": MID, "tiny": TINY}
    if name not in specs:
        raise ValueError(f"unknown toy {name!r}: expected one of {', '.join(specs)}")
    cache = Path(__file__).resolve().parents[3] / ".cache"
    cache.mkdir(exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
    return str(make_checkpoint(cache / f"toy-{name}", specs[name]))
