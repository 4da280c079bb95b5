"""How many tokens are kept: of a video, and of each of its segments.

Everything that must agree on the number of kept tokens calls `num_kept`.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from vllm_dpp.pruning.checks import require_integer, require_ratio

# Weights below this fraction of the largest count as this fraction, so that the segments they
# belong to still fill up, in proportion to length, once all the others are full.
_SMALLEST_WEIGHT = 1e-12
# Remainders are compared at this resolution, so that rounding never decides a tie.
_REMAINDERS_PER_TOKEN = 1e6
_PART = 8  # of a segment, see `most_by_gains`
_Integers = TypeVar("_Integers", int, Tensor)


def num_kept(num_tokens: int, retention_ratio: float) -> int:
    """Number of tokens kept of a video: `num_tokens * retention_ratio`, rounded half up.

    Args:
        num_tokens: tokens of the video, >= 0.
        retention_ratio: fraction kept, in (0, 1].

    Returns:
        A number in [1, num_tokens]; 0 for an empty video; `num_tokens` at ratio 1.

    Raises:
        ValueError: an argument lies outside its range.
    """
    require_integer("num_tokens", num_tokens, minimum=0)
    require_ratio("retention_ratio", retention_ratio)
    rounded = math.floor(num_tokens * retention_ratio + 0.5)
    return min(num_tokens, max(1, rounded))


def share_by_length(total: int, lengths: Sequence[int]) -> list[int]:
    """Share `total` among segments in proportion to length, by largest remainder.

    Ties go to the earliest segment. No share exceeds its segment: it is at most the
    proportional share rounded up, and the proportional share is at most the length.

    Args:
        total: tokens to keep, in [0, sum(lengths)].
        lengths: [S] tokens per segment, each >= 0.

    Returns:
        [S] tokens to keep per segment; the sum is exactly `total`.

    Raises:
        ValueError: `total` or a length lies outside its range.
    """
    for index, length in enumerate(lengths):
        require_integer(f"lengths[{index}]", length, minimum=0)
    require_integer("total", total, minimum=0)
    available = sum(lengths)
    if total > available:
        raise ValueError(f"total must be <= sum(lengths) = {available}, got {total}")
    if total == 0:
        return [0] * len(lengths)
    shares = [total * length // available for length in lengths]
    remainders = [total * length % available for length in lengths]
    by_remainder = sorted(range(len(lengths)), key=lambda segment: -remainders[segment])
    for segment in by_remainder[: total - sum(shares)]:
        shares[segment] += 1
    return shares


def share_by_weight(total: int, weights: Tensor, lengths: Tensor) -> Tensor:
    """Share `total` among segments in proportion to weight, no segment above its length.

    What a full segment cannot take is shared again among the others (water-filling, in closed
    form), then rounded by largest remainder with ties to the earliest segment. Segments of
    weight 0 get tokens, by length, only when all others are full. Reads no tensor on the host.

    Args:
        total: tokens to keep, in [0, lengths.sum()]; the upper end is the caller's to ensure.
        weights: [S] float, finite and >= 0 (anything else counts as 0).
        lengths: [S] int64, tokens per segment, each >= 0.

    Returns:
        [S] int64 tokens to keep per segment, on the device of `lengths`, each in [0, length];
        the sum is exactly `total`.

    Raises:
        ValueError: `total` is negative or the shapes differ.
    """
    require_integer("total", total, minimum=0)
    if weights.dim() != 1 or weights.shape != lengths.shape:
        raise ValueError(
            "weights and lengths must be [S], "
            f"got shapes {list(weights.shape)} and {list(lengths.shape)}"
        )
    if lengths.numel() == 0:
        return lengths.clone()
    return _round_shares(total, _fractional_shares(total, weights, lengths))


def most_by_gains(total: int, shares: Tensor, lengths: Tensor) -> Tensor:
    """Most tokens of each segment where those of the largest gains are kept of a video.

    Its share and an eighth of its tokens more: without a bound every segment would have to be
    ordered to its end, and the time of that grows with the square of the steps.

    Args:
        total: tokens to keep.
        shares: [S] int64, of `total` by length.
        lengths: [S] int64, tokens of each segment.

    Returns:
        [S] int64, each at most the length and `total`.
    """
    return (shares + more_by_gains(lengths)).minimum(lengths).clamp(max=total)


def more_by_gains(length: _Integers) -> _Integers:
    """Tokens above its share that a segment of so many may keep by gains."""
    return (length + _PART - 1) // _PART


def _fractional_shares(total: int, weights: Tensor, lengths: Tensor) -> Tensor:
    """[S] float64 `min(length, level * weight)`, at the level where the sum is `total`."""
    weights = _positive_weights(weights, lengths)
    capacity = lengths.double()
    saturation = capacity / weights  # the level at which a segment is full
    saturation, order = saturation.sort(stable=True)
    capacity, sorted_weights = capacity[order], weights[order]
    filled_before = capacity.cumsum(0) - capacity
    weight_from_here = sorted_weights.flip(0).cumsum(0).flip(0)
    # Total that is shared out by the time each segment, in this order, is full.
    shared_when_full = filled_before + saturation * weight_from_here
    num_full = (shared_when_full <= total).sum()
    # With all segments full the last level is as good as any: it still covers every length.
    first_open = num_full.clamp(max=lengths.numel() - 1).unsqueeze(0)
    level = (total - filled_before[first_open]) / weight_from_here[first_open]
    return torch.minimum(lengths.double(), level * weights)


def _positive_weights(weights: Tensor, lengths: Tensor) -> Tensor:
    """[S] float64 weights in (0, 1], largest 1 where any is positive."""
    weights = weights.double().nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
    largest = weights.amax()
    scaled = (weights / largest).clamp(min=_SMALLEST_WEIGHT)
    by_length = lengths.clamp(min=1).double() / lengths.amax().clamp(min=1)
    return torch.where(weights > 0, scaled, _SMALLEST_WEIGHT * by_length)


def _round_shares(total: int, fractional: Tensor) -> Tensor:
    """Round [S] shares that sum to `total`, to within far less than 1, by largest remainder.

    Only remainders above 0 are rounded up: there are at least as many as tokens left to give.
    """
    shares = fractional.floor().long()
    remainders = ((fractional - shares) * _REMAINDERS_PER_TOKEN).round()
    by_remainder = remainders.argsort(descending=True, stable=True)
    rank = torch.empty_like(by_remainder)
    rank.scatter_(0, by_remainder, torch.arange(len(by_remainder), device=rank.device))
    return shares + (rank < total - shares.sum())
