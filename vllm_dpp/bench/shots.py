"""Videos of several shots as a trained model's vision encoder gives them, and what they show."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_dpp.bench.help import HelpFormatter
from vllm_dpp.bench.provenance import one_line, provenance
from vllm_dpp.pruning.video import VideoTokens
from vllm_dpp.quality import network
from vllm_dpp.quality.camera import CAMERAS
from vllm_dpp.quality.labels import NO_SHAPE, label_cells
from vllm_dpp.quality.model import TRAINED
from vllm_dpp.quality.render import render
from vllm_dpp.quality.scene import SceneSpec, make_scene

FIRST_SEED = 500_000
"""Of the shots: held out, and of no other test set."""

QUIET = SceneSpec(num_things=(3, 4), num_briefs=(0, 1), num_distractors=(0, 1))
BUSY = SceneSpec(num_things=(8, 9), num_briefs=(3, 4), num_distractors=(5, 7))


@dataclass(frozen=True)
class LongVideo:
    """A video of several shots.

    Args:
        features: [N, D] float32, what the vision encoder gives.
        things: [N] int64, which thing of which shot a token shows; -1 for none.
        num_slices: of the video.
    """

    features: Tensor
    things: Tensor
    num_slices: int


def make_video(model: Any, seed: int, num_shots: int) -> LongVideo:
    """Shots in random order, a third of them busy, each under one of the cameras."""
    rng = np.random.default_rng((seed, num_shots, 8))
    features, things, slices, first = [], [], 0, 0
    for shot in range(num_shots):
        spec = replace(BUSY if rng.random() < 1 / 3 else QUIET, cameras=CAMERAS)
        scene = make_scene(FIRST_SEED + seed * num_shots + shot, spec)
        frames = torch.from_numpy(render(scene)[None])
        features.append(network.encode_videos(model, network.patchify(frames), 1)[0])
        shapes = torch.from_numpy(label_cells(scene).shape)
        things.append(torch.where(shapes == NO_SHAPE, -1, shapes + first))
        first, slices = first + NO_SHAPE, slices + scene.num_steps
    return LongVideo(torch.cat(features), torch.cat(things), slices)


def tokens_of(video: LongVideo, count: int) -> VideoTokens:
    """For a pruner that is to keep ``count`` of them."""
    return VideoTokens(video.features, None, count, video.num_slices)


def things_seen(video: LongVideo, kept: Tensor) -> float:
    """Share of the video's things that a kept token shows."""
    own = set(video.things[kept].tolist()) - {-1}
    return len(own) / len(set(video.things.tolist()) - {-1})


def make_parser(
    name: str, description: str, *, videos: int, shots: int, shares: Sequence[float]
) -> argparse.ArgumentParser:
    """The command line of a benchmark of such videos, and its defaults."""
    parser = argparse.ArgumentParser(
        prog=f"vllm-dpp bench {name}", description=description, formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=TRAINED, metavar="DIR", help="whose vision encoder")
    add("--videos", type=int, default=videos)
    add("--shots", type=int, default=shots, help="of each video, 8 slices each")
    add("--shares", type=float, nargs="+", default=shares, help="of tokens kept")
    add("--json", type=Path, metavar="FILE", help="write all numbers, with provenance")
    return parser


def report(
    module: str, arguments: Sequence[str], rows: Sequence[Any], text: str, file: Path | None
) -> None:
    """Prints what was found, and writes it to `file` with what it came from."""
    document: dict[str, Any] = {"provenance": provenance(module, arguments), "rows": rows}
    print(f"{one_line(document['provenance'])}\n\n{text}")
    if file is not None:
        file.write_text(json.dumps(document, indent=1) + "\n")


def parse_counts(
    parser: argparse.ArgumentParser, arguments: Sequence[str], *counts: str
) -> argparse.Namespace:
    """The options; a share out of (0, 1), or a count below 1, ends the program with status 2."""
    options = parser.parse_args(arguments)
    if not all(0 < share < 1 for share in options.shares):
        parser.error("--shares must lie between 0 and 1")
    for name in counts:
        value = getattr(options, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options
