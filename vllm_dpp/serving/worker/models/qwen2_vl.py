"""Qwen2-VL with video pruning before and in the middle of the decoder.

The tokens of a video are one run, and time is an axis of its positions.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec

from vllm_dpp.serving.front.admission import AdmissionProcessorMixin
from vllm_dpp.serving.front.entry import EntryProcessorMixin
from vllm_dpp.serving.plan import Grid
from vllm_dpp.serving.worker.models.entry import PlacedItem
from vllm_dpp.serving.worker.models.pruned_model import PrunedMRopeModelMixin


class PrunedQwen2VLMixin(PrunedMRopeModelMixin):
    """Mixed into a stock model of this kind."""

    config: Any
    iter_mm_grid_thw: Any
    deepstack_num_level = 0

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.split(vllm_config, prefix, self.deepstack_num_level)

    @property
    def positions_per_second(self) -> float:
        """How far a second of a video reaches on the axis of time."""
        return getattr(self.config.vision_config, "tokens_per_second", 1.0)

    def encoded_videos(
        self, outputs: Sequence[torch.Tensor], grids: Sequence[Grid], kwargs: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        seconds = kwargs.get("second_per_grid_ts")
        seconds = [1.0] * len(grids) if seconds is None else seconds.flatten().tolist()
        rate = self.positions_per_second
        for (slices, *_), second in zip(grids, seconds, strict=True):
            times = _times(slices, second * rate)
            yield {"origins": np.stack([times, 0 * times, 0 * times], axis=1)}

    def placed_media(
        self, input_tokens: Sequence[int], mm_features: Sequence[MultiModalFeatureSpec]
    ) -> Iterator[PlacedItem]:
        lengths = {f.mm_position.offset: f.mm_position.length for f in mm_features}
        for offset, slices, rows, columns, step in self.iter_mm_grid_thw(list(mm_features)):
            positions = np.indices((slices, rows, columns)).reshape(3, -1)
            positions[0] = _times(slices, step)[positions[0]]
            whole = positions.shape[1] == lengths[offset]
            span = int(positions.max()) + 1
            yield PlacedItem(offset, lengths[offset], positions if whole else None, span)


class DPPQwen2VLProcessor(AdmissionProcessorMixin, EntryProcessorMixin, Qwen2VLMultiModalProcessor):
    """A front end that builds it also checks what requests ask for; videos may be shortened."""


@MULTIMODAL_REGISTRY.register_processor(
    DPPQwen2VLProcessor, info=Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class DPPQwen2VLForConditionalGeneration(PrunedQwen2VLMixin, Qwen2VLForConditionalGeneration):
    """The stock model with a selection before its decoder, and its decoder split."""


def _times(slices: int, step: float) -> np.ndarray:
    """[slices] int64, the position of each slice on the axis of time."""
    return (np.arange(slices) * step).astype(np.int64)
