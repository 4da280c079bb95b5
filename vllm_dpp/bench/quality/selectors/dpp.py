"""The product's own selection, and its settings one by one."""

from functools import partial

from torch import Tensor

from vllm_dpp.pruning import PruningConfig
from vllm_dpp.pruning.pruner import keep_indices
from vllm_dpp.pruning.video import VideoTokens

_ONE = PruningConfig(segment_by="one")
_FOUR = PruningConfig(segment_by="count", num_segments=4)


def _with(base: PruningConfig, **changes: object) -> PruningConfig:
    return PruningConfig.from_mapping({**vars(base), **changes})


CONFIGS: dict[str, PruningConfig] = {
    "dpp": PruningConfig(),
    # One segment for the whole video, by relevance. Softened: by 0.1 where nothing else is said.
    "dpp-none": _with(_ONE, relevance="none"),
    "dpp-softened": _with(_ONE, relevance_sign="positive", relevance_floor=0.1),
    "dpp-softened-0.3": _with(_ONE, relevance_floor=0.3),
    "dpp-softened-0.6": _with(_ONE, relevance_floor=0.6),
    "dpp-positive": _with(_ONE, relevance_sign="positive", relevance_floor=0.0),
    "dpp-negated": _with(_ONE, relevance_sign="negative", relevance_floor=0.0),
    # Four segments, by how they share the budget.
    "dpp-4-equal": _with(_FOUR, budget="length"),
    "dpp-4-relevance": _with(_FOUR, budget="relevance"),
    "dpp-4-spectrum": _with(_FOUR, budget="spectrum"),
    "dpp-scene-equal": _with(_FOUR, segment_by="scene", budget="length"),
    "dpp-scene-spectrum": _with(_FOUR, segment_by="scene", budget="spectrum"),
    "dpp-4-equal-none": _with(_FOUR, budget="length", relevance="none"),
}
"""Settings by the name of the selector: `dpp` is the default of the settings."""


def _select(video: VideoTokens, config: PruningConfig) -> Tensor:
    return keep_indices([video], config)[0]


SELECTORS = {name: partial(_select, config=config) for name, config in CONFIGS.items()}
