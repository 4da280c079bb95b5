"""How the tokens of a long video are best shared out among its segments, held to one selection.

``vllm-dpp bench share-out --help`` lists the options. A DPP over a whole long video costs the
square of its tokens, so the first stage selects in segments. What that loses depends on how many
tokens each segment may keep. Here videos of unequal shots, quiet and busy ones under still and
moving cameras, pass through the vision encoder of a trained model, and each way of sharing is held
to the selection from the whole: by the things of the video that a kept token shows, and by the
log-determinant of what is kept.

Ways of sharing: those of the setting `budget`; ``relevance`` is the mass of change here.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from vllm_dpp.bench.shots import (
    LongVideo,
    make_parser,
    make_video,
    parse_counts,
    report,
    things_seen,
    tokens_of,
)
from vllm_dpp.bench.summary import table
from vllm_dpp.pruning import PruningConfig, keep_indices
from vllm_dpp.pruning.budget import num_kept
from vllm_dpp.pruning.config import BudgetRule
from vllm_dpp.pruning.dpp.kernel import conditioned_kernel
from vllm_dpp.pruning.rules.change import OBJECTIVE, change, quality
from vllm_dpp.quality.model import load_model

MODULE = "vllm_dpp.bench.share_out"
WHOLE = "whole video"
WAYS = (*get_args(BudgetRule), WHOLE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parse(arguments)
    model, _ = load_model(options.model)
    rows = []
    with torch.inference_mode():
        videos = [make_video(model, seed, options.shots) for seed in range(options.videos)]
        for slices in options.slices_per_segment:
            rows += [_measure(videos, slices, share) for share in options.shares]
    what = f"{options.videos} videos of {options.shots} shots, {len(videos[0].features)} tokens"
    report(MODULE, arguments, rows, f"{what}\n{render_table(rows)}", options.json)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(
        "share-out",
        "Ways to share the kept tokens of a long video out among its segments, held to one "
        "selection from the whole video.",
        videos=24,
        shots=8,
        shares=[0.05, 0.1, 0.2, 0.4],
    )
    parser.add_argument("--slices-per-segment", type=int, nargs="+", default=[4, 16], metavar="N")
    return parse_counts(parser, arguments, "videos", "shots", "slices_per_segment")


def _measure(videos: Sequence[LongVideo], slices: int, share: float) -> dict[str, Any]:
    """By way: means over the videos."""
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    for video in videos:
        kept = {way: _keep(video, way, slices, share) for way in WAYS}
        kernel = _kernel(video)
        best, whole = _log_det(kernel, kept[WHOLE]), set(kept[WHOLE].tolist())
        for way, own in kept.items():
            same = len(whole & set(own.tolist())) / len(own)
            lost = (best - _log_det(kernel, own)) / len(own)
            found[way].append((things_seen(video, own), lost, same))
    means = {way: np.mean(values, axis=0).tolist() for way, values in found.items()}
    return {
        "slices_per_segment": slices,
        "share": share,
        "ways": {
            way: {"things": things, "log_det_lost_per_token": lost, "same_share": same}
            for way, (things, lost, same) in means.items()
        },
    }


def _keep(video: LongVideo, way: str, slices: int, share: float) -> Tensor:
    """[num_kept] int64, ascending."""
    count = num_kept(len(video.features), share)
    config = PruningConfig(
        rule="change", relevance="none", slices_per_segment=slices, max_segment_tokens=None
    )
    config = (
        replace(config, segment_by="one")
        if way == WHOLE
        else PruningConfig.from_mapping({**vars(config), "budget": way})
    )
    return keep_indices([tokens_of(video, count)], config)[0]


def _kernel(video: LongVideo) -> Tensor:
    """[N, N] float64 kernel of the whole video, by whose determinant sets are compared."""
    worth = quality(change(tokens_of(video, 1)))
    return conditioned_kernel(video.features, worth, OBJECTIVE.quartic).double()


def _log_det(kernel: Tensor, kept: Tensor) -> float:
    inside = kernel[kept][:, kept] + 1e-6 * torch.eye(len(kept), dtype=kernel.dtype)
    return float(torch.linalg.slogdet(inside).logabsdet)


def render_table(rows: Sequence[dict[str, Any]]) -> str:
    """Things seen by way of sharing, and what else the whole selection tells of it."""
    header = ("slices a segment", "kept", *(f"{way}, %" for way in WAYS))
    cells = [
        (
            str(row["slices_per_segment"]),
            f"{row['share']:g}",
            *(
                f"{100 * own['things']:.1f} ({own['log_det_lost_per_token']:+.2f}, "
                f"{100 * own['same_share']:.0f})"
                for own in row["ways"].values()
            ),
        )
        for row in rows
    ]
    note = (
        "things of the video that a kept token shows, in % (fall of the log-determinant per token "
        "kept, tokens that are also kept of the whole video in %)"
    )
    return f"{table(header, cells)}\n{note}"


if __name__ == "__main__":
    raise SystemExit(main())
