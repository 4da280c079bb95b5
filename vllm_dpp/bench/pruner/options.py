"""The command line of the pruner benchmark, and the cases it asks for."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vllm_dpp.bench.pruner.arms import ARMS
from vllm_dpp.bench.pruner.judge import num_judged
from vllm_dpp.bench.pruner.problem import Case
from vllm_dpp.pruning import PruningConfig

MODULE = "vllm_dpp.bench.pruner"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIB = 2**20
AS_THE_ORIGINAL = PruningConfig(relevance_sign="negative", relevance_floor=0.0)
"""The relevance that the original's names stand for, so that all arms select the same."""
DIM, TOKENS_PER_SEGMENT, RETENTION_RATIO = 3584, 256, 0.25


def growth_series(
    sizes: Sequence[int], dim: int, tokens_per_segment: int, kept_per_segment: int
) -> list[Case]:
    """Cases whose number of segments alone grows."""
    series = f"D {dim}, segments of {tokens_per_segment}, {kept_per_segment} kept of each"
    return [
        Case(
            dim=dim,
            num_segments=size // tokens_per_segment,
            tokens_per_segment=tokens_per_segment,
            kept_per_segment=kept_per_segment,
            series=series,
        )
        for size in sizes
    ]


PUBLISHED = [
    Case(dim=4096, num_segments=8, tokens_per_segment=128, kept_per_segment=64),
    Case(dim=3584, num_segments=32, tokens_per_segment=256, kept_per_segment=64),
]
"""The sizes for which times of the original are published or measured elsewhere."""

GROWTH = growth_series([1024 << i for i in range(7)], 1536, 256, 64)
"""1,024 to 65,536 tokens."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the arguments; wrong ones end the program with status 2."""
    parser = argparse.ArgumentParser(
        prog="vllm-dpp bench pruner",
        description="Times of the pruner against the original loop, its variants and the bare Gram "
        "products. Each arm's tokens are first judged by the float64 reference; if one arm is "
        "wrong nothing is reported. Without --sizes: the two published sizes and a series of 1,024 "
        "to 65,536 tokens in segments of 256.",
    )
    _add_sizes(parser)
    _add_run(parser)
    options = parser.parse_args(argv)
    try:
        options.cases = cases_of(options)
        for case in options.cases:
            num_judged(case)
        options.settings = replace(
            AS_THE_ORIGINAL, max_kernel_bytes=int(options.max_kernel_mib * MIB)
        )
    except ValueError as error:
        parser.error(str(error))
    for name in ("repeats", "threads"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device")
    return options


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("sizes").add_argument
    add("--sizes", type=int, nargs="+", metavar="N", help="tokens of the video")
    add("--dim", type=int, nargs="+", metavar="D", help=f"features of a token ({DIM})")
    add(
        "--tokens-per-segment",
        type=int,
        metavar="n",
        help=f"a divisor of every N ({TOKENS_PER_SEGMENT})",
    )
    add("--segments", type=int, metavar="S", help="number of segments, in place of their length")
    add("--retention-ratio", type=float, metavar="r", help=f"fraction kept ({RETENTION_RATIO})")


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("run").add_argument
    add("--arms", nargs="+", metavar="ARM", help=f"some of {', '.join(ARMS)} (all that can run)")
    add("--repeats", type=int, default=5, help="rounds of every arm (%(default)s)")
    add(
        "--max-seconds",
        type=float,
        default=12.0,
        help="an arm is left out at sizes where a run of it is expected to take longer "
        "(%(default)g); parts of the video are timed to know",
    )
    add("--threads", type=int, help="of PyTorch on the CPU (its own choice)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of the features (%(default)s)")
    add(
        "--max-kernel-mib",
        type=float,
        default=PruningConfig().max_kernel_bytes / MIB,
        help="bound on the kernels that our arms hold at once (%(default)g)",
    )
    add("--seed", type=int, default=0, help="of the features (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all numbers, with provenance")
    add("--plot", type=Path, metavar="FILE", help="draw time against N (needs matplotlib)")


def cases_of(options: argparse.Namespace) -> list[Case]:
    """The cases of parsed arguments, smaller ones first.

    Raises:
        ValueError: a size is out of range or does not divide.
    """
    if options.sizes is None:
        for name in ("dim", "tokens_per_segment", "segments", "retention_ratio"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} needs --sizes")
        return [*PUBLISHED, *GROWTH]
    if options.segments is not None and options.tokens_per_segment is not None:
        raise ValueError("--segments and --tokens-per-segment exclude each other")
    ratio = RETENTION_RATIO if options.retention_ratio is None else options.retention_ratio
    if not 0 < ratio <= 1:
        raise ValueError(f"--retention-ratio must be in (0, 1], got {ratio}")
    sizes = sorted(set(options.sizes))
    return [
        case
        for dim in options.dim or [DIM]
        for case in _cases_of_dim(sizes, dim, options.segments, options.tokens_per_segment, ratio)
    ]


def _cases_of_dim(
    sizes: Sequence[int], dim: int, segments: int | None, length: int | None, ratio: float
) -> list[Case]:
    cases = []
    for size in sizes:
        parts = length or TOKENS_PER_SEGMENT if segments is None else segments
        if parts < 1 or size < 1 or size % parts:
            raise ValueError(f"--sizes: {size} tokens do not divide into equal segments by {parts}")
        tokens = parts if segments is None else size // parts
        kept = max(1, round(ratio * tokens))
        if kept > dim:
            raise ValueError(f"{kept} tokens of {dim} features each have no volume: raise --dim")
        cases += growth_series([size], dim, tokens, kept)
    if segments is None:
        return cases
    return [replace(case, series=f"D {dim}, {segments} segments, {ratio:g} kept") for case in cases]
