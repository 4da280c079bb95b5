"""The choice of tokens, which the reference takes from outside."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from vllm_dpp.pruning import PruningConfig, VideoTokens, keep_indices, naive_keep_indices

Select = Callable[[Tensor, Tensor | None, int, int, int, int], Sequence[int]]
"""(features [N, hidden], raw relevance [N] or None, num_kept, num_slices, num_tail, num_last) to
ascending indices below N; the tail follows the N tokens and is kept in any case, and the last
`num_last` of the N are of the last slice."""


def settings_at(layer: int, settings: PruningConfig) -> PruningConfig:
    """What a server makes of its settings: before the first layer no slice has read another."""
    return settings if layer else replace(settings, last_slice_weight=1.0)


def naive_selection(settings: PruningConfig | None = None) -> Select:
    """The selection of the project in float64, by definition and not by its fast path.

    The rules that are there for comparison have no other.
    """
    config = PruningConfig() if settings is None else settings

    def select(
        features: Tensor,
        raw_relevance: Tensor | None,
        num_kept: int,
        num_slices: int,
        num_tail: int,
        num_last: int,
    ) -> Sequence[int]:
        relevance = None if raw_relevance is None else raw_relevance.double()
        video = VideoTokens(features.double(), relevance, num_kept, num_slices, num_tail, num_last)
        if config.rule in ("dpp", "change"):
            return naive_keep_indices([video], config)[0]
        return [int(index) for index in keep_indices([video], config)[0]]

    return select
