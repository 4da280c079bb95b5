"""Which tokens of each video are kept: the entry point of the pruner."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dpp.pruning.budget import share_by_length, share_by_weight
from vllm_dpp.pruning.checks import require_integer
from vllm_dpp.pruning.config import PruningConfig
from vllm_dpp.pruning.greedy_map import greedy_map, greedy_map_flat
from vllm_dpp.pruning.relevance import normalize_relevance
from vllm_dpp.pruning.segments import (
    pad_segments,
    scene_segment_ids,
    segment_offsets,
    to_device,
)


@dataclass(frozen=True, eq=False)
class VideoTokens:
    """The tokens of one video, slice by slice in order of time.

    Args:
        features: [N, D] float of any dtype, hidden states of the tokens.
        raw_relevance: [N] float on the same device, attention of the question; None selects by
            diversity alone.
        num_kept: tokens to keep, in [0, N].
        num_slices: temporal slices, >= 1, a divisor of N.

    Raises:
        ValueError: an argument does not fit. Values are not looked at; see `check_finite`.
    """

    features: Tensor
    raw_relevance: Tensor | None
    num_kept: int
    num_slices: int

    def __post_init__(self) -> None:
        if self.features.dim() != 2 or not self.features.is_floating_point():
            raise ValueError(f"features must be [N, D] float, got {_describe(self.features)}")
        num_tokens = self.features.shape[0]
        require_integer("num_kept", self.num_kept, minimum=0)
        if self.num_kept > num_tokens:
            raise ValueError(f"num_kept must be <= N = {num_tokens}, got {self.num_kept}")
        require_integer("num_slices", self.num_slices, minimum=1)
        if num_tokens % self.num_slices:
            raise ValueError(f"num_slices must divide N = {num_tokens}, got {self.num_slices}")
        raw = self.raw_relevance
        if raw is not None and not (raw.shape == (num_tokens,) and raw.is_floating_point()):
            raise ValueError(f"raw_relevance must be [{num_tokens}] float, got {_describe(raw)}")
        if raw is not None and raw.device != self.features.device:
            raise ValueError(f"raw_relevance must be on {self.features.device}, got {raw.device}")

    @property
    def tokens_per_slice(self) -> int:
        """Tokens of one temporal slice."""
        return self.features.shape[0] // self.num_slices

    def check_finite(self) -> None:
        """Raise `ValueError` on NaN or infinity. Waits for the device."""
        for name in ("features", "raw_relevance"):
            values = getattr(self, name)
            if values is not None and not bool(values.isfinite().all()):
                raise ValueError(f"{name} must be finite, got NaN or inf in {_describe(values)}")


def keep_indices(
    videos: Sequence[VideoTokens], config: PruningConfig, *, validate: bool = False
) -> list[Tensor]:
    """Choose the tokens of each video that are kept.

    Every video keeps exactly its `num_kept` tokens, and what it keeps depends on nothing but
    itself and `config`. Nothing is read on the host, so nothing waits for the device.

    Args:
        videos: the videos; `num_kept` is taken from each, not from `config.retention_ratio`.
        config: how segments, relevance and budgets are formed.
        validate: also check that all values are finite, which waits for the device. Without it
            NaN or infinity still gives `num_kept` distinct tokens, but not meaningful ones.

    Returns:
        Per video [num_kept] int64 token indices, ascending, on the device of its features.

    Raises:
        ValueError: `validate` is set and a value is NaN or infinite.
    """
    if validate:
        for video in videos:
            video.check_finite()
    return [_keep_indices(video, config) for video in videos]


def _keep_indices(video: VideoTokens, config: PruningConfig) -> Tensor:
    num_tokens = video.features.shape[0]
    if video.num_kept in (0, num_tokens):
        return torch.arange(video.num_kept, device=video.features.device)
    relevance = _relevance(video, config)
    if config.segment_by == "scene":
        keep = _keep_scene(video, relevance, config)
        positions = torch.arange(num_tokens, device=keep.device)
    else:
        keep, positions = _keep_padded(video, relevance, config)
    # The number of kept tokens is known here, so sorting finds them without a data-sized result.
    return positions.where(keep, num_tokens).flatten().sort().values[: video.num_kept]


def _relevance(video: VideoTokens, config: PruningConfig) -> Tensor:
    """[N] float32 relevance, normalised over the whole video."""
    if video.raw_relevance is None or config.relevance == "none":
        return torch.ones(len(video.features), device=video.features.device)
    return normalize_relevance(video.raw_relevance, config.relevance_sign, config.relevance_floor)


def _keep_padded(
    video: VideoTokens, relevance: Tensor, config: PruningConfig
) -> tuple[Tensor, Tensor]:
    """[S, n] bool tokens kept and [S, n] int64 their positions in the video."""
    offsets = segment_offsets(video.num_slices, video.tokens_per_slice, config)
    device = video.features.device
    segments = pad_segments(offsets, device)
    padded_relevance = segments.pad(relevance)
    if config.budget == "length":
        shares = share_by_length(video.num_kept, segments.lengths)
        budgets, max_budget = to_device(shares, device), max(shares)
    else:
        weights = padded_relevance.where(segments.valid, 0.0).sum(dim=1, dtype=torch.float64)
        budgets = share_by_weight(video.num_kept, weights, segments.valid.sum(dim=1))
        max_budget = min(video.num_kept, segments.longest)
    features = segments.pad(video.features)
    selection = greedy_map(features, padded_relevance, segments.valid, budgets, max_budget)
    return selection.keep, segments.positions


def _keep_scene(video: VideoTokens, relevance: Tensor, config: PruningConfig) -> Tensor:
    """[N] bool tokens kept, in segments cut at scene changes."""
    num_segments = min(config.num_segments, video.num_slices)
    segment_ids = scene_segment_ids(video.features, video.tokens_per_slice, num_segments)
    member = segment_ids == torch.arange(num_segments, device=segment_ids.device)[:, None]
    lengths = member.sum(dim=1)
    by_relevance = relevance.where(member, 0.0).sum(dim=1, dtype=torch.float64)
    weights = lengths.double() if config.budget == "length" else by_relevance
    budgets = share_by_weight(video.num_kept, weights, lengths)
    # Every other segment has at least one slice.
    longest = (video.num_slices - num_segments + 1) * video.tokens_per_slice
    max_budget = min(video.num_kept, longest)
    return greedy_map_flat(video.features, relevance, segment_ids, budgets, max_budget).keep


def _describe(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)} of {tensor.dtype}"
