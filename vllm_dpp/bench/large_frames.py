"""What segments of large frames see of a video, by how they are cut.

``vllm-dpp bench large-frames --help`` lists the options. A slice of a large frame fills a segment.
Here frames are large since many videos play in them side by side, each of its own shots under its
own camera, as a trained model's vision encoder gives them. What enters the decoder is chosen in
segments of one slice, in what the product makes of the same length, the same part of each of four,
and in segments of four whole slices, four times as long. Of what enters so by the product a third
is kept, without a question, by S alone and by S and S⁴ (`PruningConfig.quartic`). Counted are the
things that a token shows.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

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
from vllm_dpp.pruning import PruningConfig, VideoTokens, keep_indices
from vllm_dpp.pruning.budget import num_kept
from vllm_dpp.pruning.segments import LEAST_SLICES, equal_slices
from vllm_dpp.quality.model import load_model
from vllm_dpp.quality.scene import GRID
from vllm_dpp.serving.cost_model import KEPT_OF_ENTERED
from vllm_dpp.serving.settings import ServingSettings

MODULE = "vllm_dpp.bench.large_frames"
OF_PRODUCT = "a part of each of four"
"""How the product cuts slices as long as a segment."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parse(arguments)
    model, _ = load_model(options.model)
    with torch.inference_mode():
        videos = [
            side_by_side(model, seed, options.tiles, options.shots)
            for seed in range(options.videos)
        ]
        rows = [_measure(videos, share) for share in options.shares]
    slices, tokens = videos[0].num_slices, len(videos[0].features)
    what = f"{options.videos} videos of {slices} slices of {tokens // slices} tokens"
    report(MODULE, arguments, rows, f"{what}\n{render_table(rows)}", options.json)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = make_parser(
        "large-frames",
        "What segments of large frames see of a video, by how they are cut.",
        videos=8,
        shots=2,
        shares=[0.03, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6],
    )
    parser.add_argument(
        "--tiles", type=int, default=8, help="videos side by side, a row; as many rows"
    )
    return parse_counts(parser, arguments, "videos", "shots", "tiles")


def side_by_side(model: Any, seed: int, tiles: int, num_shots: int) -> LongVideo:
    """One video in whose frames tiles * tiles others play."""
    first = seed * tiles**2
    parts = [make_video(model, first + tile, num_shots) for tile in range(tiles**2)]
    own = [
        torch.where(part.things < 0, -1, part.things * len(parts) + i)
        for i, part in enumerate(parts)
    ]
    slices = parts[0].num_slices
    return LongVideo(_tiled([part.features for part in parts], slices), _tiled(own, slices), slices)


def _tiled(parts: Sequence[Tensor], slices: int) -> Tensor:
    """[N * T * T, ...], row by row of the large frames, of T * T [N, ...]."""
    tiles = round(len(parts) ** 0.5)
    by_tile = torch.stack(list(parts)).unflatten(1, (slices, GRID, GRID)).unflatten(0, (tiles, -1))
    # [tile row, tile column, slice, row, column, ...], of which a frame is read by rows.
    return by_tile.movedim((2, 0, 3, 1), (0, 1, 2, 3)).flatten(0, 4)


def cuts(tokens_per_slice: int) -> dict[str, PruningConfig]:
    """The product's first stage, by what a segment is."""
    first = PruningConfig(rule="change", relevance="none", budget="gains")
    whole = replace(first, max_segment_tokens=None)
    return {
        "one slice": replace(whole, slices_per_segment=1),
        OF_PRODUCT: replace(first, max_segment_tokens=tokens_per_slice),
        "four slices": replace(whole, slices_per_segment=LEAST_SLICES),
    }


SECOND = {
    name: PruningConfig(
        relevance="none",
        quartic=quartic,
        last_slice_weight=ServingSettings().last_slice_weight,
    )
    for name, quartic in (("S", 0.0), ("S and S⁴", 0.1))
}
"""The product's second stage, by the similarity of tokens; it is S unless `quartic` is set."""


def _measure(videos: Sequence[LongVideo], share: float) -> dict[str, Any]:
    seen: dict[str, float] = {}
    entered: list[Tensor] = []
    for cut, config in cuts(len(videos[0].features) // videos[0].num_slices).items():
        kept = [
            keep_indices([tokens_of(video, num_kept(len(video.features), share))], config)[0]
            for video in videos
        ]
        seen[cut] = fmean(map(things_seen, videos, kept))
        if cut == OF_PRODUCT:
            entered = kept
    later = {
        name: fmean(
            things_seen(video, rows[kept_of(video.features[rows], video.num_slices, config)])
            for video, rows in zip(videos, entered, strict=True)
        )
        for name, config in SECOND.items()
    }
    return {"share": share, "things": seen, "kept": later}


def kept_of(features: Tensor, num_slices: int, config: PruningConfig) -> Tensor:
    """The indices that layer K keeps of what entered, [N, D], of a video of so many slices."""
    count, per_slice = equal_slices(len(features), num_slices)
    tail = count * per_slice - len(features)
    kept = num_kept(len(features), KEPT_OF_ENTERED)
    last = -(-len(features) // num_slices)
    return keep_indices([VideoTokens(features, None, kept, count, tail, last)], config)[0]


def render_table(rows: Sequence[dict[str, Any]]) -> str:
    """Things seen, by share that enters and by what a segment is."""
    first, later = (list(rows[0][part]) for part in ("things", "kept"))
    header = ("entering", *(f"{cut}, %" for cut in first), *(f"kept by {by}, %" for by in later))
    cells = [
        (
            f"{row['share']:g}",
            *(f"{100 * seen:.1f}" for part in ("things", "kept") for seen in row[part].values()),
        )
        for row in rows
    ]
    return (
        f"{table(header, cells)}\nthings of the video that an entering token shows, and one of the "
        f"third that is kept of what {OF_PRODUCT} lets in, in %"
    )


if __name__ == "__main__":
    raise SystemExit(main())
