"""The server's settings: the pruner's, plus what only serving needs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from vllm_dpp.pruning.config import PruningConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SECTION = "dpp"
"""Key of our settings in vLLM's ``--additional-config``."""


@dataclass(frozen=True, kw_only=True)
class ServingSettings(PruningConfig):
    """Everything ``--additional-config '{"dpp": {…}}'`` may say.

    The fields of :class:`~vllm_dpp.pruning.config.PruningConfig`, and:

    Args:
        prune_layer: K, with 0 <= K < number of layers: layers below K see every token, the others
            only the kept ones. ``None`` picks the layer nearest to half of the depth that
            wastes no KV pages.
        min_retention_ratio: The smallest ``dpp_retention_ratio`` a request may ask for.
        record_dir: Folder for the records that requests with ``dpp_record`` ask for; ``None``
            refuses such requests.
        turn_end_token_id: Token that ends a chat turn; ``None`` takes the model family's.
        shard_selection: Whether tensor-parallel ranks share out the segments of a video among
            themselves; otherwise each selects in all of them.
    """

    prune_layer: int | None = None
    min_retention_ratio: float = 0.01
    record_dir: str | None = None
    turn_end_token_id: int | None = None
    shard_selection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prune_layer", "turn_end_token_id"):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < 0):
                raise ValueError(f"{name} must be an integer >= 0 or null, got {value!r}")
        low = self.min_retention_ratio
        if isinstance(low, bool) or not isinstance(low, int | float) or not 0 < low <= 1:
            raise ValueError(f"min_retention_ratio must be a number in (0, 1], got {low!r}")
        if self.retention_ratio < low:
            raise ValueError(
                f"retention_ratio {self.retention_ratio!r} is below min_retention_ratio {low!r}: "
                "raise the first or lower the second"
            )
        if not isinstance(self.shard_selection, bool):
            raise ValueError(f"shard_selection must be true or false, got {self.shard_selection!r}")
        if self.record_dir is not None and not isinstance(self.record_dir, str):
            raise ValueError(f"record_dir must be a path or null, got {self.record_dir!r}")

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

    @property
    def record_path(self) -> Path | None:
        return None if self.record_dir is None else Path(self.record_dir)


def _resolved(name: str, value: int | None) -> int:
    if value is None:
        raise ValueError(f"{name} is only known once the start-up hook has seen the model")
    return value


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
