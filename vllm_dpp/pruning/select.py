"""Selection in the segments of several videos, by the fastest way that their device has.

All ways give the same tokens up to float32 rounding:

- "torch": the loop of `greedy_map`, on any device. Reads no tensor on the host.
- "compiled": the loop of `compiled`, on a CPU with numba.
- "fused": the kernels of `fused`, on a GPU with Triton, for all segments of all videos at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, get_args

import torch
from torch import Tensor

from vllm_dpp.pruning import compiled
from vllm_dpp.pruning.checks import require_choice
from vllm_dpp.pruning.greedy_map import Selection, greedy_map, greedy_map_of_kernel
from vllm_dpp.pruning.kernel import conditioned_kernel
from vllm_dpp.pruning.segments import Segments, padded_batches, to_device

Backend = Literal["torch", "compiled", "fused"]


@dataclass(frozen=True, eq=False)
class SegmentedTokens:
    """What one selection needs to know of N tokens.

    Args:
        features: [N, D] float.
        relevance: [N] float32, >= 0.
        segments: S segments of the N tokens.
        budgets: [S] int64 tokens to keep, each at most the tokens of its segment.
        max_budget: at least the largest budget.
    """

    features: Tensor
    relevance: Tensor
    segments: Segments
    budgets: Tensor
    max_budget: int


def fastest_backend(device: torch.device) -> Backend:
    """The way to select that is used on this device unless another is asked for."""
    return "compiled" if compiled.is_available(device) else "torch"


def warm_up(device: torch.device) -> None:
    """Have the compiler do its work on this device now, so that no request waits for it."""
    ones = torch.ones(2, 1, dtype=torch.float32, device=device)
    segments = Segments.between([0, 2], device)
    one = SegmentedTokens(ones, ones[:, 0], segments, to_device([1], device), max_budget=1)
    select([one], max_kernel_bytes=1 << 20)


def select(
    videos: Sequence[SegmentedTokens], max_kernel_bytes: int, backend: Backend | None = None
) -> list[Tensor]:
    """Select exactly the budget of every segment; a video's result is its own alone.

    Args:
        videos: on one device.
        max_kernel_bytes: bound on the kernels held at once, unless one segment needs more.
        backend: the way to go; None takes the fastest.

    Returns:
        Per video [N] bool, True on the tokens kept.

    Raises:
        ValueError: there is no such backend, or not on this device.
    """
    if not videos:
        return []
    device = videos[0].features.device
    backend = _checked(backend, device) if backend else fastest_backend(device)
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
    return greedy_map_of_kernel(kernel, relevance, valid, budgets, int(budgets.max()))


def _checked(backend: Backend, device: torch.device) -> Backend:
    require_choice("backend", backend, get_args(Backend))
    if backend == "compiled" and not compiled.is_available(device):
        raise ValueError(
            f"backend 'compiled' needs a CPU and numba, got {device}; "
            "leave it out to take what there is"
        )
    return backend


def _select_torch(video: SegmentedTokens, max_kernel_bytes: int) -> Tensor:
    num_tokens = len(video.features)
    # One more than there are tokens: padding is written there.
    keep = video.features.new_zeros(num_tokens + 1, dtype=torch.bool)
    for batch, padded in padded_batches(video.segments, num_tokens, max_kernel_bytes):
        selection = greedy_map(
            padded.pad(video.features),
            padded.pad(video.relevance),
            padded.valid,
            video.budgets[batch],
            min(video.max_budget, padded.valid.shape[1]),
        )
        places = padded.positions.where(padded.valid, num_tokens)
        keep.scatter_(0, places.flatten(), selection.keep.flatten())
    return keep[:-1]


def _select_compiled(video: SegmentedTokens, max_kernel_bytes: int) -> Tensor:
    keep = video.features.new_zeros(len(video.features), dtype=torch.bool)
    for batch, tokens in _runs(video.segments.read_lengths(), max_kernel_bytes):
        budgets = video.budgets[batch]
        relevance = video.relevance[tokens].reshape(len(budgets), -1)
        features = video.features[tokens].reshape(*relevance.shape, -1)
        kernel = conditioned_kernel(features, relevance)
        keep[tokens] = compiled.greedy_map_compiled(kernel, relevance, budgets).keep.flatten()
    return keep


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
