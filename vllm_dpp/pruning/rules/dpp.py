"""The determinantal point process conditioned on the question: diverse and relevant tokens.

In every segment greedy MAP inference of the kernel L = diag(r) S diag(r), as in CDPruner (arXiv
2506.10967), where a share of S may be S⁴. Segments, relevance and budgets are as `PruningConfig`
says.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_dpp.pruning.budget import (
    more_by_gains,
    most_by_gains,
    share_by_length,
    share_by_weight,
)
from vllm_dpp.pruning.config import PruningConfig
from vllm_dpp.pruning.dpp.low_rank import project
from vllm_dpp.pruning.dpp.mass import relevance_mass, spectral_mass
from vllm_dpp.pruning.dpp.objective import Objective
from vllm_dpp.pruning.dpp.select import SegmentedTokens, select
from vllm_dpp.pruning.dpp.sharded import select_sharded
from vllm_dpp.pruning.relevance import normalize_relevance
from vllm_dpp.pruning.rules.rule import Means
from vllm_dpp.pruning.segments import (
    Segments,
    longest_scene,
    scene_offsets,
    segment_offsets,
    segment_order,
    to_device,
)
from vllm_dpp.pruning.video import VideoTokens


def keep(videos: Sequence[VideoTokens], config: PruningConfig, means: Means) -> list[Tensor]:
    """The rule, see `Rule`."""
    objective = objective_of(config)
    problems = [
        segmented(video, relevance_of(video, config), config, objective) for video in videos
    ]
    return select_in(problems, videos, config, means)


def objective_of(config: PruningConfig) -> Objective:
    """Of this rule."""
    return Objective(quartic=config.quartic)


def select_in(
    problems: Sequence[SegmentedTokens],
    videos: Sequence[VideoTokens],
    config: PruningConfig,
    means: Means,
) -> list[Tensor]:
    """Solve the problem of each video; per video [num_kept] int64, ascending."""
    bound, backend = config.max_kernel_bytes, means.backend
    if means.group is None:
        masks = [selected.keep for selected in select(problems, bound, backend)]
    else:
        masks = [select_sharded(p, bound, means.group, backend) for p in problems]
    return [_indices(mask, v.num_kept) for mask, v in zip(masks, videos, strict=True)]


def _indices(keep: Tensor, num_kept: int) -> Tensor:
    """[num_kept] int64 positions of what is kept, ascending.

    Their number is known here, so sorting finds them without a result sized by the data.
    """
    positions = torch.arange(len(keep), device=keep.device)
    return positions.where(keep, len(keep)).sort().values[:num_kept]


def segmented(
    video: VideoTokens, quality: Tensor, config: PruningConfig, objective: Objective
) -> SegmentedTokens:
    """The segments and budgets of a video.

    Args:
        video: as `Rule` has it.
        quality: [N] float32, > 0, what each token is worth by itself: r.
        config: how segments and budgets are formed.
        objective: in what the rule differs from the plain DPP.
    """
    segments, tokens = _segments(video, config)
    features = video.features
    if tokens is not None:
        features, quality = features[tokens], quality[tokens]
    if config.projection_dim is not None:
        features = project(features, config.projection_dim)
    max_budget = min(video.num_kept, segments.longest)
    if config.budget in ("length", "gains") and segments.lengths is not None:
        shares = share_by_length(video.num_kept, segments.lengths)
        budgets, max_budget = to_device(shares, features.device), max(shares)
    else:
        weights = _budget_weights(features, quality, segments, config, objective.quartic)
        budgets = share_by_weight(video.num_kept, weights, segments.device_lengths)
    total = None
    if config.budget == "gains":
        total = video.num_kept
        budgets = most_by_gains(total, budgets, segments.device_lengths)
        max_budget = min(total, segments.longest, max_budget + more_by_gains(segments.longest))
    return SegmentedTokens(
        features, quality, segments, budgets, max_budget, objective, total, tokens
    )


def relevance_of(video: VideoTokens, config: PruningConfig) -> Tensor:
    """[N] float32 relevance to the question, normalised over the whole video.

    Without a question the tokens of the last slice are worth more than the others.
    """
    if video.raw_relevance is None or config.relevance == "none":
        worth = video.features.new_ones(len(video.features), dtype=torch.float32)
        worth[len(worth) - video.num_of_last_slice :] = config.last_slice_weight
        return worth
    return normalize_relevance(video.raw_relevance, config.relevance_sign, config.relevance_floor)


def _segments(video: VideoTokens, config: PruningConfig) -> tuple[Segments, Tensor | None]:
    """The segments, and the tokens in their order, as `segment_order` has them."""
    features, tokens_per_slice = video.features, video.tokens_per_slice
    if config.segment_by == "scene":
        offsets = scene_offsets(features, tokens_per_slice, config.num_segments)
        longest = longest_scene(len(features), tokens_per_slice, config.num_segments)
        return Segments(offsets, None, longest), None
    known = segment_offsets(video.num_slices, tokens_per_slice, config, num_tail=video.num_tail)
    order = segment_order(
        len(features), video.num_slices, tokens_per_slice, config, features.device
    )
    return Segments.between(known, features.device), order


def _budget_weights(
    features: Tensor,
    quality: Tensor,
    segments: Segments,
    config: PruningConfig,
    quartic: float,
) -> Tensor:
    """[S] float64, by which the budget is shared."""
    if config.budget in ("length", "gains"):
        return segments.device_lengths.double()
    if config.budget == "relevance":
        return relevance_mass(quality, segments)
    bound = config.max_kernel_bytes
    return spectral_mass(features, quality, segments, bound, quartic=quartic)
