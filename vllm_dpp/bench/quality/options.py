"""The command line of the quality benchmark."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vllm_dpp.bench.help import HelpFormatter
from vllm_dpp.bench.quality.arms import (
    BUDGETS,
    DEFAULT_METHODS,
    EVS,
    FRAMES,
    FULL,
    GRAMMAR,
    TWO_STAGES,
)
from vllm_dpp.bench.quality.test_set import TEST_SETS, kinds_of
from vllm_dpp.quality.evaluate import SPLITS
from vllm_dpp.quality.model import CHECKPOINTS, LEARNED
from vllm_dpp.quality.questions import KINDS

MODULE = "vllm_dpp.bench.quality"
AGAINST = (TWO_STAGES, EVS, "change", FULL)
DRAWN = (FULL, EVS, FRAMES, "change", TWO_STAGES)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the arguments; wrong ones end the program with status 2."""
    parser = argparse.ArgumentParser(
        prog="vllm-dpp bench quality",
        description="Right answers of a small trained model through vLLM, by method, at equal "
        "share of LM prefill and KV. Answers are kept in the output folder: a run that was "
        "interrupted, or is given more methods, goes on from there.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        type=Path,
        default=list(CHECKPOINTS),
        metavar="DIR",
        help="checkpoints trained from different seeds; their answers are pooled",
    )
    add("--splits", nargs="+", default=list(SPLITS), choices=TEST_SETS, help="test sets")
    add("--kinds", nargs="+", default=list(LEARNED), choices=KINDS, metavar="KIND", help="asked")
    add("--per-kind", type=int, default=110, help="questions of each kind and split")
    add("--methods", nargs="+", default=list(DEFAULT_METHODS), metavar="METHOD", help=GRAMMAR)
    add("--budgets", nargs="+", type=float, default=list(BUDGETS), help="share left, in (0, 1)")
    add(
        "--against",
        nargs="+",
        default=list(AGAINST),
        metavar="METHOD",
        help="the methods that the others are compared to; --pictures are of the first that runs",
    )
    add("--output", type=Path, default=Path(".cache/quality"), metavar="DIR", help="of all files")
    add("--threads", type=int, help="of each engine")
    add("--plot", action="store_true", help="draw accuracy against budget")
    add("--draw", nargs="*", default=list(DRAWN), metavar="METHOD", help="lines of the plot")
    add("--pictures", type=int, default=0, metavar="N", help="draw what was kept, for N questions")
    options = parser.parse_args(argv)
    if options.per_kind < 1:
        parser.error("--per-kind must be at least 1")
    for split in options.splits:
        if not kinds_of(split, options.kinds):
            parser.error(f"--kinds: none of {', '.join(options.kinds)} is asked of {split}")
    if not all(0 < budget < 1 for budget in options.budgets):
        parser.error("--budgets must lie between 0 and 1")
    return options
