"""Selection in the segments of several videos, by the fastest way that their device has.

All ways give the same tokens up to float32 rounding:

- "torch": the loop of `greedy_map`, on any device. Reads no tensor on the host.
- "compiled": the loop of `compiled`, on a CPU with numba.
- "fused": the kernels of `fused`, on a GPU with Triton, for all segments of all videos at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from vllm_dpp.pruning.checks import require_choice
from vllm_dpp.pruning.dpp import compiled, fused
from vllm_dpp.pruning.dpp.gains import keep_largest_gains
from vllm_dpp.pruning.dpp.greedy_map import Selection, greedy_map
from vllm_dpp.pruning.dpp.kernel import conditioned_kernel, segment_kernels
from vllm_dpp.pruning.dpp.objective import PLAIN, Objective
from vllm_dpp.pruning.segments import Segments, padded_batches, to_device

Backend = Literal["torch", "compiled", "fused"]

_MOST_FUSED = 1_500_000  # tokens of a segment times tokens kept of it, see `fastest_for`


@dataclass(frozen=True, eq=False)
class SegmentedTokens:
    """What one selection needs to know of N tokens.

    Args:
        features: [N, D] float.
        relevance: [N] float32, >= 0.
        segments: S segments of the N tokens.
        budgets: [S] int64 tokens to keep, each at most the tokens of its segment.
        max_budget: at least the largest budget.
        objective: in what the rule differs from the plain DPP.
        total: tokens to keep of all segments, those of the largest gains; the budgets are the most
            of each then. None where every segment keeps its budget.
        tokens: [N] int64, which token of the video each of these is; None where they lie in order.
    """

    features: Tensor
    relevance: Tensor
    segments: Segments
    budgets: Tensor
    max_budget: int
    objective: Objective = PLAIN
    total: int | None = None
    tokens: Tensor | None = None

    def in_video(self, keep: Tensor) -> Tensor:
        """[N] values of these tokens in the order of the video."""
        return (
            keep if self.tokens is None else torch.empty_like(keep).scatter_(0, self.tokens, keep)
        )


class Selected(NamedTuple):
    """What is kept of the N tokens of one video.

    Args:
        keep: [N] bool in the order of the video, True on the tokens kept.
        began: [S] bool, whether the greedy loop took any token of a segment. It takes none where
            the budget is 0, all tokens are zero, or one is NaN or infinite: who must know that
            values are finite need look at no other segment.
    """

    keep: Tensor
    began: Tensor


def fastest_backend(device: torch.device) -> Backend:
    """The way to select that is used on this device unless another is asked for."""
    if device.type == "cuda" and fused.is_available(device):
        return "fused"
    return "compiled" if compiled.is_available(device) else "torch"


def fastest_for(device: torch.device, longest: int, max_budget: int) -> Backend:
    """Fused, unless one multiprocessor for each segment is too few. Estimated, not measured.

    Fused, a step reads 2 n k bytes at 0.1 TB/s; in PyTorch it takes 30 us of launches at least.

    Args:
        device: of the features.
        longest: n, at least the tokens of the longest segment.
        max_budget: k, at least the largest budget.
    """
    backend = fastest_backend(device)
    return "torch" if backend == "fused" and longest * max_budget > _MOST_FUSED else backend


def warm_up(device: torch.device, dim: int, dtype: torch.dtype) -> None:
    """Have compilers do their work on this device now, so that no request waits for it.

    Args:
        device: where selections will run.
        dim: D of their features.
        dtype: of their features.
    """
    is_fused = fastest_backend(device) == "fused"
    longest_of_each = fused.COMPILED_LENGTHS if is_fused else (2,)
    for longest in longest_of_each:
        features = torch.ones(2, dim, dtype=dtype, device=device)
        segments = Segments(to_device([0, 2], device), None, longest)
        relevance = features[:, 0].float()
        one = SegmentedTokens(features, relevance, segments, to_device([1], device), max_budget=1)
        select([one], max_kernel_bytes=1 << 28)


def select(
    videos: Sequence[SegmentedTokens], max_kernel_bytes: int, backend: Backend | None = None
) -> list[Selected]:
    """Select the budget of every segment, or the total; a video's result is its own alone.

    Args:
        videos: on one device.
        max_kernel_bytes: bound on the kernels held at once, unless one segment needs more.
        backend: the way to go; None takes the fastest.

    Returns:
        What is kept of each video.

    Raises:
        ValueError: there is no such backend, or not on this device.
    """
    if not videos:
        return []
    if backend is not None:
        _require_available(backend, videos[0].features.device)
    # Each video goes its own way: neighbours must not change how its sums are rounded.
    ways = [
        backend or fastest_for(v.features.device, v.segments.longest, v.max_budget) for v in videos
    ]
    results: dict[int, Selected] = {}
    for way in dict.fromkeys(ways):
        chosen = [i for i, other in enumerate(ways) if other == way]
        selections = _select_by(way, [videos[i] for i in chosen], max_kernel_bytes)
        for i, selection in zip(chosen, selections, strict=True):
            results[i] = _selected(videos[i], selection)
    return [results[i] for i in range(len(videos))]


def _selected(video: SegmentedTokens, selection: Selection) -> Selected:
    """What is kept in the end of a video whose segments have chosen."""
    if video.total is None:
        keep = video.in_video(selection.keep)
    else:
        keep = keep_largest_gains(
            selection,
            video.segments.offsets,
            video.relevance,
            video.total,
            rest_in_order=video.objective.rest_in_order,
            tokens=video.tokens,
        )
    return Selected(keep, (selection.order[:, :1] >= 0).any(dim=1))


def _select_by(
    backend: Backend, videos: Sequence[SegmentedTokens], max_kernel_bytes: int
) -> list[Selection]:
    """Per video `keep` [N], `order` and `gains` [S, its `max_budget` at least]."""
    if backend == "fused":
        return _select_fused(videos, max_kernel_bytes)
    select_one = _select_compiled if backend == "compiled" else _select_torch
    return [select_one(video, max_kernel_bytes) for video in videos]


def select_in_kernels(kernel: Tensor, relevance: Tensor, budgets: Tensor) -> Selection:
    """Select in segments of equal length whose kernels are there already.

    Args:
        kernel: [S, n, n] float32.
        relevance: [S, n] float32, >= 0; it orders what is left when the rank is used up.
        budgets: [S] int64 tokens to keep, each in [0, n].

    Returns:
        `keep` [S, n] with exactly `budgets` per segment, and the greedy steps.
    """
    if compiled.is_available(kernel.device):
        return compiled.greedy_map_compiled(kernel, relevance, budgets)
    valid = torch.ones_like(relevance, dtype=torch.bool)
    return greedy_map(kernel, relevance, valid, budgets, int(budgets.max()))


def _require_available(backend: Backend, device: torch.device) -> None:
    require_choice("backend", backend, get_args(Backend))
    lacking = {
        "compiled": None if compiled.is_available(device) else "a CPU and numba",
        "fused": None if fused.is_available(device) else "an NVIDIA GPU and Triton",
    }.get(backend)
    if lacking:
        raise ValueError(
            f"backend {backend!r} needs {lacking}, got {device}; leave it out to take what there is"
        )


def _select_fused(videos: Sequence[SegmentedTokens], max_kernel_bytes: int) -> list[Selection]:
    """All videos at once, if their features are alike."""
    if len({(v.features.shape[1], v.features.dtype, v.objective) for v in videos}) > 1:
        return [kept for video in videos for kept in _select_fused([video], max_kernel_bytes)]
    together = _concatenated(videos)
    features = together.features
    selection = fused.greedy_map_fused(
        features.float() if features.dtype == torch.float64 else features,
        together.relevance,
        together.segments.offsets,
        together.budgets,
        together.segments.longest,
        together.max_budget,
        objective=together.objective,
        max_kernel_bytes=max_kernel_bytes,
    )
    counts = [len(video.segments) for video in videos]
    keeps = torch.split(selection.keep, [len(video.features) for video in videos])
    steps = torch.split(selection.order, counts), torch.split(selection.gains, counts)
    return [Selection(*each) for each in zip(keeps, *steps, strict=True)]


def _concatenated(videos: Sequence[SegmentedTokens]) -> SegmentedTokens:
    """The tokens and segments of videos that are alike, one after the other."""
    if len(videos) == 1:
        return videos[0]
    starts = accumulate((len(video.features) for video in videos), initial=0)
    offsets = [v.segments.offsets + at for v, at in zip(videos, starts, strict=False)]
    cuts = [*(each[:-1] for each in offsets), offsets[-1][-1:]]
    return SegmentedTokens(
        torch.cat([video.features for video in videos]),
        torch.cat([video.relevance for video in videos]),
        Segments(torch.cat(cuts), None, max(video.segments.longest for video in videos)),
        torch.cat([video.budgets for video in videos]),
        max(video.max_budget for video in videos),
        videos[0].objective,
    )


def _select_torch(video: SegmentedTokens, max_kernel_bytes: int) -> Selection:
    num_tokens, dim = video.features.shape
    # One more than there are tokens: padding is written there.
    whole = _nothing(video, num_tokens + 1)
    for batch, padded in padded_batches(video.segments, num_tokens, max_kernel_bytes):
        relevance = padded.pad(video.relevance)
        selection = greedy_map(
            segment_kernels(padded.rows(video.features), relevance, dim, video.objective.quartic),
            relevance,
            padded.valid,
            video.budgets[batch],
            min(video.max_budget, padded.valid.shape[1]),
            video.objective,
        )
        places = padded.positions.where(padded.valid, num_tokens)
        whole.keep.scatter_(0, places.flatten(), selection.keep.flatten())
        _put_steps(whole, batch, selection)
    return whole._replace(keep=whole.keep[:-1])


def _select_compiled(video: SegmentedTokens, max_kernel_bytes: int) -> Selection:
    whole = _nothing(video, len(video.features))
    for batch, tokens in _runs(video.segments.read_lengths(), max_kernel_bytes):
        budgets = video.budgets[batch]
        relevance = video.relevance[tokens].reshape(len(budgets), -1)
        features = video.features[tokens].reshape(*relevance.shape, -1)
        selection = _select_equal(features, relevance, budgets, video.objective)
        whole.keep[tokens] = selection.keep.flatten()
        _put_steps(whole, batch, selection)
    return whole


def _select_equal(
    features: Tensor, relevance: Tensor, budgets: Tensor, objective: Objective
) -> Selection:
    """In a function of its own, so that its kernels go before the next ones come."""
    kernel = conditioned_kernel(features, relevance, objective.quartic)
    return compiled.greedy_map_compiled(kernel, relevance, budgets, objective)


def _nothing(video: SegmentedTokens, num_tokens: int) -> Selection:
    """Of all segments, to be filled in: nothing kept, and no step taken."""
    keep = video.features.new_zeros(num_tokens, dtype=torch.bool)
    steps = len(video.segments), video.max_budget
    order = keep.new_full(steps, -1, dtype=torch.int64)
    return Selection(keep, order, keep.new_zeros(steps, dtype=torch.float32))


def _put_steps(whole: Selection, batch: slice, selection: Selection) -> None:
    """The steps of some segments, of which there may be fewer than of others."""
    width = selection.order.shape[1]
    whole.order[batch, :width] = selection.order
    whole.gains[batch, :width] = selection.gains


def _runs(lengths: Sequence[int], max_kernel_bytes: int) -> Iterator[tuple[slice, slice]]:
    """Consecutive segments of equal length, within the memory: which segments, which tokens."""
    segment = token = 0
    for length, equal in groupby(lengths):
        left = len(list(equal))
        while left:
            count = min(left, max(1, max_kernel_bytes // (4 * max(1, length) ** 2)))
            if length:
                yield slice(segment, segment + count), slice(token, token + count * length)
            segment, token, left = segment + count, token + count * length, left - count
