"""Which rows of a range are a video's own tokens, where text stands between its slices.

Offsets count from the start of the range. A video without text inside is a slice of it, and stays a
view. Of a video all of which enters the host knows where its text stands, of another one the device
alone.
"""

from collections.abc import Sequence

import numpy as np
import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_dpp.serving.plan import PrunedVideo
from vllm_dpp.serving.step import RangeRows

OwnTokens = slice | torch.Tensor
"""Offsets of the tokens that are up for selection; as a tensor [length] int64, ascending."""


def own_places(mm_features: Sequence[MultiModalFeatureSpec]) -> dict[int, np.ndarray]:
    """By first prompt position, of items with text inside: [n] int64 places of their own tokens."""
    return {
        feature.mm_position.offset: np.flatnonzero(feature.mm_position.is_embed.numpy())
        for feature in mm_features
        if feature.mm_position.is_embed is not None
    }


def own_tokens(
    places: np.ndarray | None, part: RangeRows, video: PrunedVideo, device: torch.device
) -> OwnTokens:
    """The tokens of a video that are up for selection.

    Args:
        places: Of the video's own tokens, counted from its first position; ``None`` for all.
        part: What a step has of the range.
        video: One of the range.
        device: Where offsets are wanted.
    """
    start, end = part.place_of(video)
    if places is None:
        return slice(start, end)
    return async_tensor_h2d(places[: video.length] + start, device=device)


def own_rows(is_own: torch.Tensor, part: RangeRows, video: PrunedVideo) -> torch.Tensor:
    """[length] int64, ascending: the tokens of a video that are up for selection, by their rows.

    Args:
        is_own: [turn length] bool, which rows of the range are a video's own tokens.
        part: The last of the range, or all of it.
        video: One of the range.
    """
    start, end = part.place_of(video)
    text_last = (~is_own[start:end]).to(torch.int8).argsort(stable=True)
    return text_last[: video.length] + start  # their number is known: no result sized by the data


def going_up(
    part: RangeRows, video: PrunedVideo, own: OwnTokens, kept: torch.Tensor
) -> torch.Tensor:
    """[num_kept + num_text] int64, ascending: offsets of what stays of a video, its text included.

    Args:
        part: The last of the range, or all of it.
        video: One of the range.
        own: As `own_tokens` has it.
        kept: [num_kept] int64, which of its tokens stay.
    """
    start, end = part.place_of(video)
    if isinstance(own, slice):
        return kept + start
    stays = torch.ones(end - start, dtype=torch.int8, device=kept.device)
    stays[own - start] = 0
    stays[own[kept] - start] = 1
    # Their number is known here, so sorting finds them without a result sized by the data.
    return stays.argsort(descending=True, stable=True)[: video.num_kept + video.num_text] + start
