"""The command line of batches."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vllm_dpp.pruning.checks import require_integer
from vllm_dpp.serve_command import dashed
from vllm_dpp.setting_flags import add_setting_flags

OWN = (
    *("input", "output", "question", "format", "max_tokens", "temperature", "retry_errors"),
    *("replicas", "address", "gpus_per_replica", "rows_in_flight"),
)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, object], list[str]]:
    """Read the arguments; wrong ones end the program with status 2.

    Returns:
        Options of the batch, fields of `ServingSettings` that were given, and all that is
        vLLM's: the model and flags of `vllm serve`.

    Raises:
        ValueError: A number is out of range.
    """
    parser = make_parser()
    given, rest = parser.parse_known_args(dashed(argv))
    settings = {name: value for name, value in vars(given).items() if name not in OWN}
    for name in ("replicas", "rows_in_flight", "max_tokens"):
        require_integer("--" + name.replace("_", "-"), getattr(given, name), 1)
    if given.gpus_per_replica is not None:
        require_integer("--gpus-per-replica", given.gpus_per_replica, 0)
    if given.temperature < 0:
        raise ValueError(f"--temperature must be a number >= 0, got {given.temperature}")
    return given, settings, rest


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-dpp batch",
        usage="%(prog)s MODEL --input ROWS --output FOLDER [arguments] [any flag of `vllm serve`]",
        description="Ask questions about many videos, with Ray Data and one or more engines. What "
        "is answered is on disk at once: the same command again goes on where it ended.",
        allow_abbrev=False,
    )
    _add_rows(parser.add_argument_group("rows"))
    _add_replicas(parser.add_argument_group("replicas"))
    add_setting_flags(parser)
    return parser


def _add_rows(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--input",
        type=Path,
        required=True,
        metavar="ROWS",
        help="a folder of videos, or a .jsonl or .parquet table with the columns video and "
        "question and, if need be, id, video_share and retention_ratio",
    )
    add("--question", metavar="TEXT", help="of all rows that have none of their own")
    add(
        "--output",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="gets answers.jsonl, a line a row, with its answer or its error",
    )
    add(
        "--format",
        choices=("jsonl", "parquet"),
        default="jsonl",
        help="parquet: answers.parquet beside it, when all rows are done (default: jsonl)",
    )
    add("--retry-errors", action="store_true", help="ask rows that had an error again")
    add("--max-tokens", type=int, default=256, help="of an answer (default: 256)")
    add("--temperature", type=float, default=0.0, help="of sampling (default: 0)")


def _add_replicas(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--replicas", type=int, default=1, help="engines (default: 1)")
    add("--address", help="of a Ray cluster, as of ray.init; default: this machine alone")
    add(
        "--gpus-per-replica",
        type=int,
        metavar="N",
        help="default: --tensor-parallel-size, or none where Ray knows of no GPU",
    )
    add(
        "--rows-in-flight",
        type=int,
        default=64,
        metavar="N",
        help="rows that a replica has at once; what is lost if it ends (default: 64)",
    )
