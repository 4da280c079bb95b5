"""The settings of the pruner."""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

from vllm_dpp.pruning.checks import (
    require_at_least,
    require_choice,
    require_integer,
    require_unit_interval,
)

SegmentBy = Literal["slices", "count", "scene", "one"]
RelevanceSource = Literal["question", "none"]
RelevanceSign = Literal["positive", "negative"]
BudgetRule = Literal["length", "relevance", "spectrum", "gains"]


@dataclass(frozen=True, kw_only=True)
class PruningConfig:
    """How to choose what is kept of a video. How much is kept, each video says for itself.

    Args:
        rule: what chooses the tokens, one of `rules.RULES`. "dpp": diverse and relevant ones, see
            `rules.dpp`. "change": diverse ones and what was not there before, without a
            question, see `rules.change`. For comparison: "attention", those that the question looks
            at most, which needs `relevance` "question"; "uniform"; and "random".
        segment_by: how a video is cut into segments, inside which diversity is measured.
            "slices": every `slices_per_segment` temporal slices, or as many as make
            `max_segment_tokens`; where these are fewer than four, the same part of each of four, so
            small that it makes no more. The last ones may be shorter.
            "count": `num_segments` segments of equal length, to within one slice.
            "scene": `num_segments` segments, cut where adjacent slices differ most.
            "one": the whole video.
        slices_per_segment: length of a segment for "slices", in temporal slices of the vision
            encoder, at least 1. (In Qwen2.5-VL a slice is two frames.)
        max_segment_tokens: most tokens of a segment for "slices", at least 1; None sets no bound.
            Time grows with it, and on a GPU what lies above is slow.
        num_segments: number of segments for "count" and "scene", at least 1; a video of fewer
            slices gets one segment per slice.
        relevance: "question" weighs each token by the attention that the question pays to it;
            "none" selects by diversity alone, so that a server can decide at the video's end.
        relevance_sign: "positive" prefers tokens of high attention; "negative", which is
            CDPruner's own, those of low attention.
        relevance_floor: lower end of the softened relevance, in [0, 1]: 0 uses the min-max
            normalised relevance as it is, 1 ignores relevance.
        budget: how the kept tokens are shared among segments: by "length", by the sum of
            "relevance" in each, by "spectrum", which is how many distinct directions each holds, or
            by "gains": the tokens of the largest marginal gains of the whole video are kept.
        quartic: share of S⁴, elementwise, in the similarity S of rule "dpp", in [0, 1): it keeps
            gains meaningful where more tokens are kept than S has directions; 0 is CDPruner's own.
            Rule "change" always has a tenth.
        last_slice_weight: how many times as much a token of the last slice is worth to rule "dpp"
            where no question is read, at least 1: in a decoder the last have read all the others.
        projection_dim: measure similarity after a random projection to this many dimensions, at
            least 1: faster for long segments, but approximate. None is exact.
        max_kernel_bytes: bound on the float32 kernels held at once, at least 1; a segment of n
            tokens takes 4 n², and one is always held.

    Raises:
        ValueError: a field has a wrong type or lies outside its range.
    """

    rule: str = "dpp"
    segment_by: SegmentBy = "slices"
    slices_per_segment: int = 16
    max_segment_tokens: int | None = 1024
    num_segments: int = 4
    relevance: RelevanceSource = "question"
    relevance_sign: RelevanceSign = "positive"
    relevance_floor: float = 0.6
    budget: BudgetRule = "length"
    quartic: float = 0.0
    last_slice_weight: float = 1.0
    projection_dim: int | None = None
    max_kernel_bytes: int = 1 << 28

    def __post_init__(self) -> None:
        require_choice("rule", self.rule, _rules())
        require_choice("segment_by", self.segment_by, get_args(SegmentBy))
        require_integer("slices_per_segment", self.slices_per_segment, minimum=1)
        if self.max_segment_tokens is not None:
            require_integer("max_segment_tokens", self.max_segment_tokens, minimum=1)
        require_integer("num_segments", self.num_segments, minimum=1)
        require_choice("relevance", self.relevance, get_args(RelevanceSource))
        require_choice("relevance_sign", self.relevance_sign, get_args(RelevanceSign))
        require_unit_interval("relevance_floor", self.relevance_floor)
        if self.rule == "attention" and self.relevance == "none":
            raise ValueError("rule 'attention' needs relevance 'question', got 'none'")
        require_choice("budget", self.budget, get_args(BudgetRule))
        require_unit_interval("quartic", self.quartic)
        if self.quartic == 1:
            raise ValueError("quartic must be below 1")
        require_at_least("last_slice_weight", self.last_slice_weight, minimum=1)
        if self.projection_dim is not None:
            require_integer("projection_dim", self.projection_dim, minimum=1)
        require_integer("max_kernel_bytes", self.max_kernel_bytes, minimum=1)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """Build the configuration, of this class or a subclass, from its fields by name.

        Args:
            mapping: any subset of the fields; the others keep their defaults.

        Raises:
            ValueError: `mapping` is no mapping, has an unknown key, or has a bad value.
        """
        if not isinstance(mapping, Mapping):
            raise ValueError(f"{cls.__name__} needs a mapping of its fields, got {mapping!r}")
        names = [field.name for field in fields(cls) if field.init]
        unknown = [key for key in mapping if key not in names]
        if unknown:
            raise ValueError(_unknown_keys_message(cls.__name__, unknown, names))
        return cls(**mapping)


def _rules() -> Collection[str]:
    from vllm_dpp.pruning.rules import RULES  # each of them knows this module

    return RULES


def _unknown_keys_message(owner: str, unknown: list[Any], names: list[str]) -> str:
    described = []
    for key in unknown:
        close = difflib.get_close_matches(str(key), names, n=1)
        described.append(f"{key!r} (did you mean {close[0]!r}?)" if close else repr(key))
    return f"unknown {owner} keys: {', '.join(described)}; valid keys: {', '.join(names)}"
