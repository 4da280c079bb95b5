"""The server's settings: the pruner's, plus what only serving needs."""

import hashlib
import json
from collections import UserDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from vllm_dpp.pruning.checks import require_choice, require_ratio
from vllm_dpp.pruning.config import PruningConfig, RelevanceSource
from vllm_dpp.pruning.rules import RULES
from vllm_dpp.serving.cost_model import MOST_BY_QUESTION, two_stage_ratios

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PIECES_NEED = {"rule": "dpp", "relevance": "none", "budget": "length", "segment_by": "slices"}
SET_BY_SHARE = ("entry_ratio", "retention_ratio")
OF_LAYER_K = (
    "prune_layer",
    "retention_ratio",
    "rule",
    "relevance",
    "default_relevance",
    "relevance_sign",
    "relevance_floor",
    "budget",
    "min_retention_ratio",
    "record_dir",
    "similarity",
    "quartic",
    "last_slice_weight",
    "prune_images",
    "turn_end_token_id",
    "shard_selection",
    "max_deferred_tokens",
    "decide_every",
)
"""Settings that are of no use where nothing is left out there."""
MODALITIES = ("video", "image")
Similarity = Literal["both", "embeddings", "hidden_states"]
SECTION = "dpp"
"""Key of our settings in vLLM's ``--additional-config``."""


@dataclass(frozen=True, kw_only=True)
class ServingSettings(PruningConfig):
    """Everything ``--additional-config '{"dpp": {…}}'`` may say.

    The fields of :class:`~vllm_dpp.pruning.config.PruningConfig`, where `last_slice_weight` is 1.5
    unless something else is said, and:

    Args:
        prune_layer: K, with 0 <= K < number of layers: layers below K see every token, the others
            only the kept ones. ``None`` picks the layer nearest to half of the depth that
            wastes no KV pages.
        retention_ratio: Fraction of a video's tokens that is kept from layer K on, in (0, 1], of
            those that enter the decoder.
        video_share: Share of a video's prefill and KV in the decoder that may be left, in (0, 1]:
            one number in place of `entry_ratio` and `retention_ratio`, which follow from it and
            `prune_layer` (``cost_model.two_stage_ratios``). ``None`` leaves both as they are.
        entry_ratio: Fraction of a video's tokens that enter the decoder, in (0, 1]; 1 lets all of
            them in.
        entry_rule: The rule that chooses them, which sees no question.
        default_relevance: The `relevance` of requests that choose nothing about layer K; "question"
            only where that is. ``None`` takes it, or "none" where `video_share` is large.
        entry_only: Whether no token is left out at layer K. Then the decoder, its scheduler and its
            KV cache are vLLM's own, and so is what runs beside them: pipeline parallelism, KV
            connectors and offloading, windows. `video_share` is what enters. On in families of
            which nothing else can be done, otherwise off.
        min_retention_ratio: The smallest ``dpp_retention_ratio`` a request may ask for.
        record_dir: Folder for the records that requests with ``dpp_record`` ask for; ``None``
            refuses such requests.
        similarity: By what tokens are compared at layer K. "embeddings": what entered the decoder,
            as the vision encoder made it. "hidden_states": the residual stream there. "both": nine
            tenths of the first and one of the second.
        prune_images: Whether images lose tokens at layer K as well, each like a video of one slice;
            before the decoder all of an image enters.
        turn_end_token_id: Token that ends a chat turn; ``None`` takes the model family's.
        video_token_id: Token that stands in the prompt for a token of a video; ``None`` takes the
            model's.
        video_end_length: How many of these, at the end of a video, are no patch's, like a newline,
            and stay; ``None`` takes the model family's.
        shard_selection: Whether tensor-parallel ranks share out the segments of a video among
            themselves; otherwise each selects in all of them.
        max_deferred_tokens: Rows of the buffer in which the layer-K inputs of a video that is read
            over several steps wait for the decision; ``None``: what one request of --max-model-len
            needs, plus one step. A video whose range (from its first token to the end of the
            question) is longer is refused with HTTP 400.
        decide_every: Tokens after which a video is decided, piece by piece as it is read, each
            piece a segment with a budget by its length. This needs no buffer and no long last
            step, but it cannot read the question, and budgets do not follow what happens in the
            video. ``None`` decides a video as a whole.
        max_records: Records of a kind to keep in ``record_dir``; the oldest go first.
    """

    prune_layer: int | None = None
    retention_ratio: float = 0.25
    video_share: float | None = None
    entry_ratio: float = 1.0
    entry_rule: str = "change"
    default_relevance: RelevanceSource | None = None
    entry_only: bool | None = None
    min_retention_ratio: float = 0.01
    record_dir: str | None = None
    similarity: Similarity = "both"
    prune_images: bool = False
    turn_end_token_id: int | None = None
    video_token_id: int | None = None
    video_end_length: int | None = None
    shard_selection: bool = False
    max_deferred_tokens: int | None = None
    decide_every: int | None = None
    max_records: int = 1000
    last_slice_weight: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prune_layer", "turn_end_token_id", "video_token_id", "video_end_length"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 0):
                raise ValueError(f"{name} must be an integer >= 0 or null, got {value!r}")
        for name in ("max_deferred_tokens", "decide_every"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 1):
                raise ValueError(f"{name} must be an integer >= 1 or null, got {value!r}")
        if not _is_int(self.max_records) or self.max_records < 1:
            raise ValueError(f"max_records must be an integer >= 1, got {self.max_records!r}")
        require_ratio("retention_ratio", self.retention_ratio)
        require_ratio("entry_ratio", self.entry_ratio)
        if self.entry_ratio < 1 and self.rule == "change":
            raise ValueError(
                "rule 'change' compares whole slices, which are not there where entry_ratio is "
                "less than 1: make it the entry_rule"
            )
        if self.video_share is not None:
            require_ratio("video_share", self.video_share)
            for field in fields(self):
                if field.name in SET_BY_SHARE and getattr(self, field.name) != field.default:
                    raise ValueError(f"video_share sets {field.name}: give one of them")
        require_choice("similarity", self.similarity, get_args(Similarity))
        if self.default_relevance is not None:
            require_choice("default_relevance", self.default_relevance, get_args(RelevanceSource))
            if self.default_relevance == "question" and not self.reads_question:
                raise ValueError("default_relevance 'question' needs relevance 'question'")
            if self.default_relevance == "none" and self.rule == "attention":
                raise ValueError("rule 'attention' needs default_relevance 'question', got 'none'")
        require_choice("entry_rule", self.entry_rule, [r for r in RULES if r != "attention"])
        if self.decide_every is not None:
            self._check_pieces()
        low = self.min_retention_ratio
        if isinstance(low, bool) or not isinstance(low, int | float) or not 0 < low <= 1:
            raise ValueError(f"min_retention_ratio must be a number in (0, 1], got {low!r}")
        if self.retention_ratio < low:
            raise ValueError(
                f"retention_ratio {self.retention_ratio!r} is below min_retention_ratio {low!r}: "
                "raise the first or lower the second"
            )
        for name in ("prune_images", "shard_selection", "entry_only"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (name != "entry_only" or value is not None):
                raise ValueError(f"{name} must be true or false, got {value!r}")
        if self.record_dir is not None and not isinstance(self.record_dir, str):
            raise ValueError(f"record_dir must be a path or null, got {self.record_dir!r}")

    def as_entry_only(self, num_layers: int, why: str = "entry_only") -> Self:
        """The settings of an engine in which nothing is left out at layer K, which then is L.

        Args:
            num_layers: L, of the decoder.
            why: What says so.

        Raises:
            ValueError: One of them is about layer K.
        """
        if self.entry_only is False:
            raise ValueError(f"entry_only must be true or left out: {why}")
        for field in fields(self):
            if field.name in OF_LAYER_K and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name} is about what is left out at layer K, which is nothing "
                    f"({why}): leave it out"
                )
        entry = self.entry_ratio if self.video_share is None else self.video_share
        return replace(
            self,
            entry_only=True,
            prune_layer=num_layers,
            retention_ratio=1.0,
            video_share=None,
            entry_ratio=entry,
            turn_end_token_id=None,
        )

    def _check_pieces(self) -> None:
        """A piece is decided before the rest is read, so nothing may depend on the rest."""
        for name, needed in PIECES_NEED.items():
            if getattr(self, name) != needed:
                raise ValueError(
                    f"decide_every needs {name} {needed!r}, got {getattr(self, name)!r}: pieces of "
                    "a video are decided before the rest of it and its question are read"
                )

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> Self:
        """Read the settings from vLLM's ``additional_config``.

        Raises:
            ValueError: The section is not a mapping, has an unknown key or a bad value.
        """
        section: Any = {}
        if isinstance(additional_config, Mapping):
            section = additional_config.get(SECTION, {})
        if not isinstance(section, Mapping):
            raise ValueError(
                f"--additional-config: {SECTION!r} must be a mapping of settings, got {section!r}"
            )
        return cls.from_mapping(section)

    @classmethod
    def from_vllm_config(cls, vllm_config: "VllmConfig") -> Self:
        """The settings of an engine, resolved by the start-up hook."""
        return cls.from_additional_config(vllm_config.additional_config)

    @classmethod
    def of_engine(cls, vllm_config: "VllmConfig") -> "ServingSettings | None":
        """The settings of an engine that prunes, ``None`` for any other engine."""
        config = vllm_config.additional_config
        return config.settings if isinstance(config, ResolvedConfig) else None

    def as_additional_config(self) -> dict[str, Any]:
        """The inverse of :meth:`from_additional_config`."""
        return {SECTION: asdict(self)}

    @property
    def split_layer(self) -> int:
        """``prune_layer`` of an engine that has started."""
        return _resolved("prune_layer", self.prune_layer)

    @property
    def turn_end(self) -> int:
        """``turn_end_token_id`` of an engine that has started."""
        return _resolved("turn_end_token_id", self.turn_end_token_id)

    def with_ratios(self, num_layers: int) -> Self:
        """The settings with the ratios that `video_share` stands for, if it is given.

        Args:
            num_layers: Of the decoder; `prune_layer` is known.
        """
        if self.video_share is None:
            return self
        entry, kept = self.ratios_at(self.video_share, num_layers)
        return replace(
            self,
            video_share=None,
            entry_ratio=entry,
            retention_ratio=kept,
            default_relevance=self.default_relevance or self.relevance_at(self.video_share),
        )

    def relevance_at(self, share: float) -> RelevanceSource:
        """Whether the question is read where a share of a video may be left."""
        needs_it = share <= MOST_BY_QUESTION or self.rule == "attention"
        return self.relevance if self.entry_only or needs_it else "none"

    def ratios_at(self, share: float, num_layers: int) -> tuple[float, float]:
        """What enters, and what is kept of it, where a share of a video may be left.

        Args:
            share: In (0, 1].
            num_layers: Of the decoder; `prune_layer` is known.
        """
        if self.entry_only:
            return share, 1.0
        return two_stage_ratios(share, self.split_layer, num_layers)

    def deferred_rows(self, vllm_config: "VllmConfig") -> int:
        """Rows of the buffer for ranges that are read over several steps."""
        if self.max_deferred_tokens is not None:
            return self.max_deferred_tokens
        scheduler = vllm_config.scheduler_config
        return vllm_config.model_config.max_model_len + scheduler.max_num_batched_tokens

    @property
    def entry_config(self) -> PruningConfig:
        """How to select what enters: in the same segments, which share out by gains."""
        return PruningConfig(
            rule=self.entry_rule,
            relevance="none",
            budget="gains",
            segment_by=self.segment_by,
            slices_per_segment=self.slices_per_segment,
            max_segment_tokens=self.max_segment_tokens,
            num_segments=self.num_segments,
            projection_dim=self.projection_dim,
            max_kernel_bytes=self.max_kernel_bytes,
        )

    @property
    def prunes(self) -> tuple[str, ...]:
        """The modalities that lose tokens at layer K."""
        return MODALITIES if self.prune_images else MODALITIES[:1]

    @property
    def reads_question(self) -> bool:
        """Whether videos are decided at the end of their question, and not at their own."""
        return self.relevance != "none"

    @property
    def compares_embeddings(self) -> bool:
        """Whether tokens are compared by something else than layer K sees of them."""
        return self.similarity != "hidden_states" and self.split_layer > 0

    @property
    def compares_both(self) -> bool:
        """Whether they are compared by that and by what layer K sees of them."""
        return self.similarity == "both" and self.split_layer > 0

    @property
    def rules_to_choose(self) -> list[str]:
        """The rules that the server and its requests may name."""
        if self.decide_every is not None:
            return [self.rule]
        impossible = {
            "attention": not self.reads_question,
            "change": self.entry_ratio < 1,  # see `__post_init__`
        }
        return [rule for rule in RULES if not impossible.get(rule)]

    @property
    def record_path(self) -> Path | None:
        return None if self.record_dir is None else Path(self.record_dir)


class ResolvedConfig(UserDict[str, Any]):
    """vLLM's ``additional_config`` once the start-up hook has put the resolved settings into it.

    vLLM hashes a plain dictionary into the key of its compile cache; this one says for itself what
    compiled graphs depend on (``vllm.config.utils.SupportsHash``).

    Args:
        given: What the user gave, other sections included.
        settings: The resolved settings.
    """

    def __init__(self, given: Mapping[str, Any], settings: ServingSettings) -> None:
        super().__init__({**given, **settings.as_additional_config()})
        self.settings = settings

    def compute_hash(self) -> str:
        """Of all sections but ours everything, of ours where the decoder is split."""
        s = self.settings
        factors = {**self.data, SECTION: [s.split_layer, s.reads_question, s.entry_only]}
        return hashlib.sha256(json.dumps(factors, sort_keys=True).encode()).hexdigest()


def _resolved(name: str, value: int | None) -> int:
    if value is None:
        raise ValueError(f"{name} is only known once the start-up hook has seen the model")
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
