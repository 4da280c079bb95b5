"""Where a video is cut into segments, and how ragged segments become one padded batch.

A video is `num_slices` temporal slices of `tokens_per_slice` tokens each, in order. A segment is
a run of whole slices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dpp.pruning.checks import require_integer
from vllm_dpp.pruning.config import PruningConfig
from vllm_dpp.pruning.kernel import unit_rows


def segment_offsets(num_slices: int, tokens_per_slice: int, config: PruningConfig) -> list[int]:
    """Token offsets of the segments of a video, for every `segment_by` except "scene".

    Args:
        num_slices: temporal slices of the video, >= 0.
        tokens_per_slice: tokens of a slice, >= 0.
        config: `segment_by` and the length or number of segments.

    Returns:
        [S + 1] offsets, from 0 to the number of tokens; segment s is [offsets[s], offsets[s + 1]).
        An empty video has no segment: [0].

    Raises:
        ValueError: a negative count, or `segment_by` is "scene", whose cuts depend on the data.
    """
    require_integer("num_slices", num_slices, minimum=0)
    require_integer("tokens_per_slice", tokens_per_slice, minimum=0)
    if config.segment_by == "scene":
        raise ValueError("segment_by 'scene' has no fixed offsets: use scene_segment_ids")
    if config.segment_by == "slices":
        cuts = list(range(0, num_slices, config.slices_per_segment))
    else:
        wanted = config.num_segments if config.segment_by == "count" else 1
        count = min(wanted, num_slices)
        cuts = [segment * num_slices // count for segment in range(count)]
    return [cut * tokens_per_slice for cut in (*cuts, num_slices)]


def scene_segment_ids(features: Tensor, tokens_per_slice: int, num_segments: int) -> Tensor:
    """Cut a video where adjacent slices are least similar; reads no tensor on the host.

    The similarity of two slices is the cosine of their mean features. Ties cut earliest.

    Args:
        features: [N, D] float, N a multiple of `tokens_per_slice`.
        tokens_per_slice: tokens of a slice, >= 1.
        num_segments: segments wanted, >= 1; at most one per slice is made.

    Returns:
        [N] int64 segment of each token: 0, ..., S - 1, ascending, none empty.

    Raises:
        ValueError: a count below 1, or features of another shape.
    """
    require_integer("tokens_per_slice", tokens_per_slice, minimum=1)
    require_integer("num_segments", num_segments, minimum=1)
    if features.dim() != 2 or features.shape[0] % tokens_per_slice:
        raise ValueError(
            f"features must be [N, D] with N a multiple of tokens_per_slice = {tokens_per_slice}, "
            f"got shape {list(features.shape)}"
        )
    num_slices = len(features) // tokens_per_slice
    by_slice = features.reshape(num_slices, tokens_per_slice, features.shape[1])
    unit = unit_rows(by_slice.mean(dim=1, dtype=torch.float32))
    similarity = (unit[:-1] * unit[1:]).sum(dim=1)
    num_cuts = max(0, min(num_segments, num_slices) - 1)
    last_before_cut = similarity.argsort(stable=True)[:num_cuts]
    starts_segment = torch.zeros(num_slices, dtype=torch.int64, device=features.device)
    starts_segment.scatter_(0, last_before_cut + 1, 1)
    slice_ids = starts_segment.cumsum(0)
    return slice_ids[:, None].expand(-1, tokens_per_slice).flatten()


@dataclass(frozen=True, eq=False)
class PaddedSegments:
    """The tokens of S segments side by side, padded to the longest, n tokens.

    Args:
        positions: [S, n] int64, the token at each place; padding repeats some token.
        valid: [S, n] bool, False on padding.
        lengths: [S] tokens per segment.
    """

    positions: Tensor
    valid: Tensor
    lengths: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the longest segment, n."""
        return max(self.lengths)

    def pad(self, values: Tensor) -> Tensor:
        """Gather [N, ...] values per token into [S, n, ...]; a view where nothing is padded."""
        if min(self.lengths) == self.longest:
            return values.reshape(len(self.lengths), self.longest, *values.shape[1:])
        return values[self.positions]


def pad_segments(offsets: Sequence[int], device: torch.device) -> PaddedSegments:
    """Lay out the segments between consecutive `offsets` (`cu_seqlens` style, S >= 1)."""
    lengths = [end - start for start, end in zip(offsets[:-1], offsets[1:], strict=True)]
    starts = to_device(offsets[:-1], device)
    ends = to_device(offsets[1:], device)
    positions = starts[:, None] + torch.arange(max(lengths), device=device)
    valid = positions < ends[:, None]
    return PaddedSegments(positions.clamp(max=offsets[-1] - 1), valid, lengths)


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Copy host integers to an int64 tensor on `device` without waiting for the device."""
    pinned = device.type == "cuda"
    host = torch.tensor(list(values), dtype=torch.int64, pin_memory=pinned)
    return host.to(device, non_blocking=True)
