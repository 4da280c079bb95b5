"""Where a video is cut into segments, and how ragged segments become batches.

A video is `num_slices` temporal slices of `tokens_per_slice` tokens each, in order. A segment is
a run of slices, or where fewer than `LEAST_SLICES` have as many tokens as a segment may, the same
part of each of so many: a DPP must see some time to see what is shown again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Self

import torch
from torch import Tensor

from vllm_dpp.pruning.checks import require_integer
from vllm_dpp.pruning.config import PruningConfig
from vllm_dpp.pruning.rows import Rows, rows_of, rows_per_cast, unit_rows

LEAST_SLICES = 4
"""That a segment by "slices" spans, if the video and the settings have so many."""


LEAST_PER_SLICE = 64
"""Tokens that stand for a slice where some of a video are gone, at least.

So segments, of 16 slices, are no smaller than what one DPP can choose from at little cost: cut into
pieces, the few tokens that are kept of a long video repeat in one what another one has
(``vllm-dpp bench quality --splits film-later``).
"""


def segment_offsets(
    num_slices: int, tokens_per_slice: int, config: PruningConfig, *, num_tail: int = 0
) -> list[int]:
    """Token offsets of the segments of a video, for every `segment_by` except "scene".

    Args:
        num_slices: temporal slices of the video, >= 0.
        tokens_per_slice: tokens of a slice, >= 0.
        config: `segment_by` and the length or number of segments.
        num_tail: tokens at the end of the video that belong to no segment, >= 0.

    Returns:
        [S + 1] offsets, from 0 to the number of other tokens; segment s, never empty, is
        [offsets[s], offsets[s + 1]) in the order of `segment_order`.
        An empty video has no segment: [0].

    Raises:
        ValueError: a negative count, or `segment_by` is "scene", whose cuts depend on the data.
    """
    require_integer("num_slices", num_slices, minimum=0)
    require_integer("tokens_per_slice", tokens_per_slice, minimum=0)
    require_integer("num_tail", num_tail, minimum=0)
    if config.segment_by == "scene":
        raise ValueError("segment_by 'scene' has no fixed offsets: use scene_offsets")
    num_tokens = max(0, num_slices * tokens_per_slice - num_tail)
    if config.segment_by == "slices":
        lengths = _by_slices(num_slices, tokens_per_slice, num_tokens, config)
        return [0, *accumulate(length for length in lengths if length)]
    wanted = config.num_segments if config.segment_by == "count" else 1
    count = min(wanted, num_slices)
    cuts = [segment * num_slices // count for segment in range(count)]
    starts = [cut * tokens_per_slice for cut in cuts]
    return [*(start for start in starts if start < num_tokens), num_tokens]


def segment_order(
    num_tokens: int,
    num_slices: int,
    tokens_per_slice: int,
    config: PruningConfig,
    device: torch.device,
) -> Tensor | None:
    """The tokens of a video segment by segment, in order of time in each.

    Args:
        num_tokens: N, of those that belong to a segment.
        num_slices: temporal slices of the video.
        tokens_per_slice: tokens of a slice.
        config: how segments are formed.
        device: of the result.

    Returns:
        [N] int64, or None where they lie in that order: no segment is of parts of several slices.
    """
    slices, parts = _slices_and_parts(num_slices, tokens_per_slice, config)
    if config.segment_by != "slices" or slices == 1 or parts == 1:
        return None
    tokens = torch.arange(num_tokens, device=device)
    # The part that begins at the last part * tokens_per_slice // parts up to the token.
    part = ((tokens % tokens_per_slice + 1) * parts - 1) // tokens_per_slice
    segment = tokens // (tokens_per_slice * slices) * parts + part
    return segment.argsort(stable=True)


def _slices_and_parts(
    num_slices: int, tokens_per_slice: int, config: PruningConfig
) -> tuple[int, int]:
    """How many slices a segment by "slices" spans, and into how many parts each of them is cut."""
    slices, most = max(1, min(config.slices_per_segment, num_slices)), config.max_segment_tokens
    if most is None or slices * tokens_per_slice <= most:
        return slices, 1
    whole = most // tokens_per_slice
    if whole >= LEAST_SLICES:
        return whole, 1
    slices = min(slices, LEAST_SLICES, most)
    return slices, -(-tokens_per_slice // (most // slices))


def _by_slices(
    num_slices: int, tokens_per_slice: int, num_tokens: int, config: PruningConfig
) -> Iterator[int]:
    """Tokens of each segment by "slices", of which those behind the first `num_tokens` lack."""
    slices, parts = _slices_and_parts(num_slices, tokens_per_slice, config)
    cuts = [part * tokens_per_slice // parts for part in range(parts + 1)]
    whole, rest = divmod(num_tokens, max(1, tokens_per_slice))
    for first in range(0, num_slices, slices):
        full = min(max(whole - first, 0), slices)
        left = rest if first <= whole < first + slices else 0
        for start, end in pairwise(cuts):
            yield full * (end - start) + min(end, left) - min(start, left)


def equal_slices(num_tokens: int, num_slices: int) -> tuple[int, int]:
    """Equal parts that stand for the slices of a video of which some tokens are left, in order.

    Where it is not known of which slices these are. A part has `LEAST_PER_SLICE` tokens at least.

    Args:
        num_tokens: how many are left, >= 1.
        num_slices: slices of the whole video, >= 1.

    Returns:
        How many parts, and tokens of each; the last may lack some.
    """
    per_slice = min(max(-(-num_tokens // num_slices), LEAST_PER_SLICE), num_tokens)
    return -(-num_tokens // per_slice), per_slice


def scene_offsets(features: Tensor, tokens_per_slice: int, num_segments: int) -> Tensor:
    """Cut a video where adjacent slices are least similar; reads no tensor on the host.

    The similarity of two slices is the cosine of their mean features. Ties cut earliest.

    Args:
        features: [N, D] float; the last slice may be cut short, and its mean is of what is there.
        tokens_per_slice: tokens of a slice, >= 1.
        num_segments: segments wanted, >= 1; at most one per slice is made.

    Returns:
        [S + 1] int64 offsets as those of `segment_offsets`, no segment empty.

    Raises:
        ValueError: a count below 1, or features of another shape.
    """
    require_integer("tokens_per_slice", tokens_per_slice, minimum=1)
    require_integer("num_segments", num_segments, minimum=1)
    if features.dim() != 2:
        raise ValueError(f"features must be [N, D], got shape {list(features.shape)}")
    unit = unit_rows(_slice_means(features, tokens_per_slice))
    similarity = (unit[:-1] * unit[1:]).sum(dim=1)
    num_cuts = max(0, min(num_segments, len(unit)) - 1)
    cuts = similarity.argsort(stable=True)[:num_cuts].sort().values + 1
    ends = cuts.new_tensor([0, len(features)]) if len(unit) else cuts.new_zeros(1)
    return torch.cat([ends[:1], cuts * tokens_per_slice, ends[1:]])


def longest_scene(num_tokens: int, tokens_per_slice: int, num_segments: int) -> int:
    """At least the tokens of the longest segment that `scene_offsets` makes, known on the host."""
    num_slices = -(-num_tokens // tokens_per_slice)
    others = min(num_segments, num_slices) - 1  # each has at least one slice
    return min(num_tokens, (num_slices - others) * tokens_per_slice)


def _slice_means(features: Tensor, tokens_per_slice: int) -> Tensor:
    """[slices, D] float32 mean features of each slice, the last of which may be cut short."""
    num_whole = len(features) // tokens_per_slice
    whole, rest = features.tensor_split([num_whole * tokens_per_slice])
    by_slice = whole.reshape(num_whole, tokens_per_slice, features.shape[1])
    at_once = max(1, rows_per_cast(features.shape[1]) // tokens_per_slice)
    means = [slices.float().mean(dim=1) for slices in torch.split(by_slice, at_once)]
    if len(rest):
        means.append(rest.float().mean(dim=0, keepdim=True))
    return torch.cat(means)


@dataclass(frozen=True, eq=False)
class Segments:
    """S >= 1 runs of consecutive tokens that together make up N tokens.

    Args:
        offsets: [S + 1] int64, `cu_seqlens` style.
        lengths: [S] tokens per segment, or None where only the device knows them.
        longest: at least the tokens of the longest segment.
    """

    offsets: Tensor
    lengths: list[int] | None
    longest: int

    @classmethod
    def between(cls, offsets: Sequence[int], device: torch.device) -> Self:
        """The segments between consecutive offsets known on the host."""
        lengths = [end - start for start, end in pairwise(offsets)]
        return cls(to_device(offsets, device), lengths, max(lengths))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def starts(self) -> Tensor:
        """[S] int64 first token of each segment."""
        return self.offsets[:-1]

    @property
    def device_lengths(self) -> Tensor:
        """[S] int64 tokens of each segment, on the device."""
        return self.offsets.diff()

    def read_lengths(self) -> list[int]:
        """`lengths`, from the device where need be, which waits for it."""
        return self.device_lengths.tolist() if self.lengths is None else self.lengths


@dataclass(frozen=True, eq=False)
class PaddedSegments:
    """The tokens of B segments side by side, padded to n tokens.

    Args:
        positions: [B, n] int64, the token at each place; padding repeats the last token of all.
        valid: [B, n] bool, False on padding.
        span: (first, last) token of what the B segments hold, where nothing is padded.
    """

    positions: Tensor
    valid: Tensor
    span: tuple[int, int] | None

    def rows(self, features: Tensor) -> Rows:
        """What reads [N, D] features segment by segment; nothing is gathered before it is read."""
        if self.span is not None:
            return rows_of(self.pad(features))
        return lambda part, places: features[self.positions[part, places]]

    def pad(self, values: Tensor) -> Tensor:
        """Gather [N, ...] values per token into [B, n, ...]; a view where nothing is padded."""
        if self.span is None:
            return values[self.positions]
        return values[slice(*self.span)].reshape(*self.positions.shape, *values.shape[1:])


def padded_batches(
    segments: Segments, num_tokens: int, max_kernel_bytes: int
) -> Iterator[tuple[slice, PaddedSegments]]:
    """Consecutive segments, padded, as many at a time as their kernels fit in the memory given.

    Args:
        segments: of N tokens; none is read on the host.
        num_tokens: N.
        max_kernel_bytes: bound on B * n * n float32 of a batch, unless it is one segment.

    Yields:
        Which of the segments, and these.
    """
    per_batch = max(1, max_kernel_bytes // (4 * max(1, segments.longest) ** 2))
    lengths = segments.lengths
    for first in range(0, len(segments), per_batch):
        batch = slice(first, min(first + per_batch, len(segments)))
        longest, span = segments.longest, None
        if lengths is not None:
            longest = max(lengths[batch])
            if min(lengths[batch]) == longest:
                start = sum(lengths[:first])
                span = (start, start + sum(lengths[batch]))
        places = torch.arange(longest, device=segments.offsets.device)
        positions = segments.offsets[:-1][batch, None] + places
        valid = positions < segments.offsets[1:][batch, None]
        yield batch, PaddedSegments(positions.clamp(max=num_tokens - 1), valid, span)


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Copy host integers to an int64 tensor on `device` without waiting for the device."""
    pinned = device.type == "cuda"
    host = torch.tensor(list(values), dtype=torch.int64, device="cpu", pin_memory=pinned)
    return host.to(device, non_blocking=True)
