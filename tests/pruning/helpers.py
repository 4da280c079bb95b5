"""Inputs and comparisons that several test files share."""

import torch
from torch import Tensor

from vllm_dpp.pruning import PruningConfig, VideoTokens

# What float32 may lose, as a fraction of the largest initial gain of a segment.
NEAR_TIE = 1e-5

ALL_CONFIGS = [
    PruningConfig(
        segment_by=segment_by,
        budget=budget,
        relevance_sign=sign,
        quartic=quartic,
        slices_per_segment=3,
        num_segments=3,
    )
    for segment_by in ("slices", "count", "scene", "one")
    for budget in ("length", "relevance", "spectrum")
    for sign, quartic in (("positive", 0.0), ("negative", 0.1))
] + [
    PruningConfig(
        rule="change", segment_by=segment_by, budget=budget, slices_per_segment=3, num_segments=3
    )
    for segment_by in ("slices", "count", "scene", "one")
    for budget in ("length", "relevance", "spectrum")
]
ALL_CONFIGS += [
    PruningConfig(
        rule=rule, segment_by=segment_by, budget="gains", slices_per_segment=3, num_segments=3
    )
    for segment_by in ("slices", "count", "scene", "one")
    for rule in ("dpp", "change")
]
# Without a question, the last slice before the others.
ALL_CONFIGS += [
    PruningConfig(relevance="none", last_slice_weight=3.0, budget=budget, slices_per_segment=3)
    for budget in ("length", "relevance", "spectrum", "gains")
]
# Parts of four slices make a segment, and of fewer; and fewer slices than asked for.
ALL_CONFIGS += [
    PruningConfig(rule=rule, max_segment_tokens=most, budget=budget)
    for most, budget in ((12, "relevance"), (3, "length"), (12, "gains"), (27, "spectrum"))
    for rule in ("dpp", "change")
]


def config_id(config: PruningConfig) -> str:
    name = f"{config.segment_by}-{config.budget}-{config.relevance_sign}"
    if config.last_slice_weight > 1:
        name += "-last"
    if config.max_segment_tokens != PruningConfig().max_segment_tokens:
        name += f"-{config.max_segment_tokens}-tokens"
    return name if config.rule == "dpp" else f"{config.rule}-{name}"


def random_video(
    seed: int,
    *,
    num_slices: int = 8,
    tokens_per_slice: int = 5,
    dim: int = 48,
    num_kept: int = 13,
    num_tail: int = 0,
    dtype: torch.dtype = torch.float32,
) -> VideoTokens:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = num_slices * tokens_per_slice - num_tail
    features = torch.randn(num_tokens, dim, generator=generator).to(dtype)
    raw = torch.rand(num_tokens, generator=generator)
    return VideoTokens(features, raw, num_kept, num_slices, num_tail)


def still_video(seed: int, *, num_slices: int = 8, tokens_per_slice: int = 5) -> VideoTokens:
    """Every slice is the first one but for noise, that of later ones larger; half are kept."""
    generator = torch.Generator().manual_seed(seed)
    shown = torch.randn(tokens_per_slice, 48, generator=generator)
    noise = torch.randn(num_slices, tokens_per_slice, 48, generator=generator)
    size = torch.linspace(0, 0.12, num_slices)[:, None, None]
    features = (shown + size * noise).flatten(0, 1)
    raw = torch.rand(len(features), generator=generator)
    return VideoTokens(features, raw, len(features) // 2, num_slices)


def reference_kernel(features: Tensor, relevance: Tensor) -> Tensor:
    """[n, n] float64 kernel of [n, D] features and [n] relevance."""
    features, relevance = features.double(), relevance.double()
    unit = features / (features.norm(dim=1, keepdim=True) + 1e-8)
    return relevance[:, None] * (unit @ unit.T) * relevance[None, :]


def log_det(kernel: Tensor, selected: list[int]) -> float:
    return float(torch.linalg.slogdet(kernel[selected][:, selected])[1]) if selected else 0.0


def gains_along(kernel: Tensor, order: list[int]) -> list[tuple[float, float]]:
    """Per step of `order`: the float64 gain of the token taken, and the best gain there was."""
    pairs = []
    for step, token in enumerate(order):
        taken = order[:step]
        base = kernel[taken][:, taken]
        cross = kernel[taken]
        solved = torch.linalg.solve(base, cross) if taken else cross
        gains = kernel.diagonal() - (cross * solved).sum(dim=0)
        gains[taken] = -torch.inf
        pairs.append((float(gains[token]), float(gains.max())))
    return pairs
