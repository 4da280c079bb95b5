"""Videos of several shots as a trained model's vision encoder gives them, and what they show."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_dpp.pruning.video import VideoTokens
from vllm_dpp.quality import network
from vllm_dpp.quality.camera import CAMERAS
from vllm_dpp.quality.labels import NO_SHAPE, label_cells
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
