"""Tokens drawn at random, each set about as likely as another. For comparison."""

import torch
from torch import Tensor

from vllm_dpp.pruning.video import VideoTokens

# The finaliser of splitmix64 (Steele, Lea and Flood 2014); its constants as signed integers.
_GOLDEN, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


def keep(video: VideoTokens) -> Tensor:
    """The same again for the same video and question: the largest values are the seed.

    Only their places count, so rounding changes nothing, and nothing is read on the host.
    """
    seen = video.features if video.raw_relevance is None else video.raw_relevance
    largest = seen.flatten().topk(min(2, seen.numel())).indices
    seed = largest[0] * seen.numel() + largest[-1]
    places = torch.arange(len(video.features), device=video.features.device)
    mixed = (places + seed * len(places) + 1) * _GOLDEN
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        mixed = (mixed ^ _shifted(mixed, shift)) * factor
    order = (mixed ^ _shifted(mixed, 31)).argsort(stable=True)
    return order[: video.num_kept].sort().values


def _shifted(values: Tensor, places: int) -> Tensor:
    """int64 shifted to the right as if unsigned."""
    return (values >> places) & ((1 << (64 - places)) - 1)
