"""Which tokens of each video are kept: the entry point of the pruner."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vllm_dpp.pruning.budget import share_by_length, share_by_weight
from vllm_dpp.pruning.checks import require_integer
from vllm_dpp.pruning.config import PruningConfig
from vllm_dpp.pruning.low_rank import project
from vllm_dpp.pruning.mass import relevance_mass, spectral_mass
from vllm_dpp.pruning.relevance import normalize_relevance
from vllm_dpp.pruning.segments import (
    Segments,
    longest_scene,
    scene_offsets,
    segment_offsets,
    to_device,
)
from vllm_dpp.pruning.select import Backend, SegmentedTokens, select
from vllm_dpp.pruning.sharded import select_sharded


@dataclass(frozen=True, eq=False)
class VideoTokens:
    """The tokens of one video, slice by slice in order of time.

    Args:
        features: [N, D] float of any dtype, hidden states of the tokens.
        raw_relevance: [N] float on the same device, attention of the question; None selects by
            diversity alone.
        num_kept: tokens to keep of these N, in [0, N].
        num_slices: temporal slices of the whole video, >= 1, a divisor of N + `num_tail`.
        num_tail: tokens at the end of the video that the caller keeps in any case and that are
            not in `features`, >= 0. Segments are those of the whole video as far as N.

    Raises:
        ValueError: an argument does not fit. Values are not looked at; see `check_finite`.
    """

    features: Tensor
    raw_relevance: Tensor | None
    num_kept: int
    num_slices: int
    num_tail: int = 0

    def __post_init__(self) -> None:
        if self.features.dim() != 2 or not self.features.is_floating_point():
            raise ValueError(f"features must be [N, D] float, got {_describe(self.features)}")
        num_tokens = self.features.shape[0]
        require_integer("num_kept", self.num_kept, minimum=0)
        if self.num_kept > num_tokens:
            raise ValueError(f"num_kept must be <= N = {num_tokens}, got {self.num_kept}")
        require_integer("num_slices", self.num_slices, minimum=1)
        require_integer("num_tail", self.num_tail, minimum=0)
        if (num_tokens + self.num_tail) % self.num_slices:
            whole = f"N + num_tail = {num_tokens} + {self.num_tail}"
            raise ValueError(f"num_slices must divide {whole}, got {self.num_slices}")
        raw = self.raw_relevance
        if raw is not None and not (raw.shape == (num_tokens,) and raw.is_floating_point()):
            raise ValueError(f"raw_relevance must be [{num_tokens}] float, got {_describe(raw)}")
        if raw is not None and raw.device != self.features.device:
            raise ValueError(f"raw_relevance must be on {self.features.device}, got {raw.device}")

    @property
    def tokens_per_slice(self) -> int:
        """Tokens of one temporal slice."""
        return (self.features.shape[0] + self.num_tail) // self.num_slices

    def check_finite(self) -> None:
        """Raise `ValueError` on NaN or infinity. Waits for the device."""
        for name in ("features", "raw_relevance"):
            values = getattr(self, name)
            if values is not None and not bool(values.isfinite().all()):
                raise ValueError(f"{name} must be finite, got NaN or inf in {_describe(values)}")


@torch.no_grad()
def keep_indices(
    videos: Sequence[VideoTokens],
    config: PruningConfig,
    *,
    validate: bool = False,
    backend: Backend | None = None,
    group: ProcessGroup | None = None,
) -> list[Tensor]:
    """Choose the tokens of each video that are kept.

    Every video keeps exactly its `num_kept` tokens, and what it keeps depends on nothing but
    itself and `config`. On a GPU nothing is read on the host, so nothing waits for the device.

    Args:
        videos: the videos; `num_kept` is taken from each, not from `config.retention_ratio`.
        config: how segments, relevance and budgets are formed.
        validate: also check that all values are finite, which waits for the device. Without it
            NaN or infinity still gives `num_kept` distinct tokens, but not meaningful ones.
        backend: how to select, see `select`; None takes the fastest that the device has.
        group: ranks that hold the same videos and share the work; all get the same indices.

    Returns:
        Per video [num_kept] int64 token indices, ascending, on the device of its features.

    Raises:
        ValueError: `validate` is set and a value is NaN or infinite, or the device has no such
            `backend`.
    """
    if validate:
        for video in videos:
            video.check_finite()
    kept = [torch.arange(video.num_kept, device=video.features.device) for video in videos]
    undecided = [i for i, video in enumerate(videos) if 0 < video.num_kept < len(video.features)]
    problems = [segmented(videos[i], config) for i in undecided]
    if group is None:
        masks = [kept.keep for kept in select(problems, config.max_kernel_bytes, backend)]
    else:
        masks = [select_sharded(p, config.max_kernel_bytes, group, backend) for p in problems]
    for i, keep in zip(undecided, masks, strict=True):
        kept[i] = _indices(keep, videos[i].num_kept)
    return kept


def _indices(keep: Tensor, num_kept: int) -> Tensor:
    """[num_kept] int64 positions of what is kept, ascending.

    Their number is known here, so sorting finds them without a result sized by the data.
    """
    positions = torch.arange(len(keep), device=keep.device)
    return positions.where(keep, len(keep)).sort().values[:num_kept]


def segmented(video: VideoTokens, config: PruningConfig) -> SegmentedTokens:
    """The video's relevance, segments and budgets."""
    relevance = _relevance(video, config)
    segments = _segments(video, config)
    features = video.features
    if config.projection_dim is not None:
        features = project(features, config.projection_dim)
    max_budget = min(video.num_kept, segments.longest)
    if config.budget == "length" and segments.lengths is not None:
        shares = share_by_length(video.num_kept, segments.lengths)
        budgets, max_budget = to_device(shares, features.device), max(shares)
    else:
        weights = _budget_weights(features, relevance, segments, config)
        budgets = share_by_weight(video.num_kept, weights, segments.device_lengths)
    return SegmentedTokens(features, relevance, segments, budgets, max_budget)


def _relevance(video: VideoTokens, config: PruningConfig) -> Tensor:
    """[N] float32 relevance, normalised over the whole video."""
    if video.raw_relevance is None or config.relevance == "none":
        return video.features.new_ones(len(video.features), dtype=torch.float32)
    return normalize_relevance(video.raw_relevance, config.relevance_sign, config.relevance_floor)


def _segments(video: VideoTokens, config: PruningConfig) -> Segments:
    features, tokens_per_slice = video.features, video.tokens_per_slice
    if config.segment_by == "scene":
        offsets = scene_offsets(features, tokens_per_slice, config.num_segments)
        longest = longest_scene(len(features), tokens_per_slice, config.num_segments)
        return Segments(offsets, None, longest)
    known = segment_offsets(video.num_slices, tokens_per_slice, config, num_tail=video.num_tail)
    return Segments.between(known, features.device)


def _budget_weights(
    features: Tensor, relevance: Tensor, segments: Segments, config: PruningConfig
) -> Tensor:
    """[S] float64, by which the budget is shared."""
    if config.budget == "length":
        return segments.device_lengths.double()
    if config.budget == "relevance":
        return relevance_mass(relevance, segments)
    return spectral_mass(features, relevance, segments, config.max_kernel_bytes)


def _describe(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)} of {tensor.dtype}"
