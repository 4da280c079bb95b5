"""One selection of a video whose segments were ordered each for itself: the largest gains of all.

It is greedy MAP of the whole video as if tokens of different segments were never alike: gains of a
segment never rise, so the first steps of each are taken, and a segment in which nothing is new gets
few.
"""

import torch
from torch import Tensor

from vllm_dpp.pruning.dpp.greedy_map import Selection, fill_up


def keep_largest_gains(
    selection: Selection,
    offsets: Tensor,
    relevance: Tensor,
    total: int,
    *,
    rest_in_order: bool,
    tokens: Tensor | None = None,
) -> Tensor:
    """Keep the tokens of the largest marginal gains, ties to the earliest segment.

    Where steps end before there are so many, the most relevant or the first of all others follow.
    Reads no tensor on the host.

    Args:
        selection: the steps of S segments, each of as many as may be kept of it.
        offsets: [S + 1] int64, segment s is [offsets[s], offsets[s + 1]).
        relevance: [N] float32, >= 0.
        total: tokens to keep, in [0, N].
        rest_in_order: whether the first tokens of the video follow, and not the most relevant.
        tokens: [N] int64, which token of the video each is that the segments hold; None where
            they hold them in order.

    Returns:
        [N] bool in the order of the video, True on exactly `total` tokens.
    """
    num_tokens = len(relevance)
    if tokens is None:
        tokens = torch.arange(num_tokens, device=relevance.device)
    keep = torch.zeros(num_tokens + 1, dtype=torch.bool, device=relevance.device)
    taken = selection.order >= 0
    if taken.numel():
        # Rounding may let a gain rise, and a step may not be kept without those before it.
        gains = selection.gains.cummin(dim=1).values.where(taken, -torch.inf)
        largest = gains.flatten().argsort(descending=True, stable=True)[:total]
        places = tokens[(selection.order + offsets[:-1, None]).where(taken, 0)]
        keep[places.where(taken, num_tokens).flatten()[largest]] = True
    wanted = torch.full((1,), total, device=relevance.device)
    every = torch.ones_like(keep[None, :-1])
    worth = torch.empty_like(relevance).scatter_(0, tokens, relevance)
    return fill_up(keep[None, :-1], worth[None], every, wanted, rest_in_order)[0]
