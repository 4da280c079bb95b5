"""LLaVA-OneVision, with video pruning.

A frame is a slice, always of as many tokens; behind the last of a video stands one newline, which
stays as text does. Positions count tokens: a video that enters in part is to its decoder a shorter
one, a token that layer K drops leaves a gap.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil, prod
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionDummyInputsBuilder,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
    LlavaOnevisionProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalFieldConfig

from vllm_dpp.serving.front.admission import AdmissionProcessorMixin
from vllm_dpp.serving.front.entry import NUM_ENTERED, EntryProcessorMixin
from vllm_dpp.serving.plan import Grid
from vllm_dpp.serving.worker.models.entry import TextBetween
from vllm_dpp.serving.worker.models.pruned_model import PrunedModelMixin

POOLED = 2
"""Patches of a frame, on each axis, that make a token."""
NUM_FRAMES = "video_num_frames"
"""Key of what the processor adds to each video: int64. A runner may have dropped the pixels."""


class DPPLlavaOnevisionProcessor(
    AdmissionProcessorMixin, EntryProcessorMixin, LlavaOnevisionMultiModalProcessor
):
    """A front end that builds it also checks what requests ask for; videos may be shortened."""

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        outputs = super()._apply_hf_processor_main(mm_items, hf_kwargs)
        if videos := outputs.get("pixel_values_videos"):
            outputs[NUM_FRAMES] = torch.tensor([len(frames) for frames in videos])
        return outputs

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**fields, NUM_FRAMES: MultiModalFieldConfig.batched("video", keep_on_cpu=True)}

    def video_grids(self, outputs: Any) -> list[Grid]:
        videos = outputs.get("pixel_values_videos", ())
        return _grids([len(frames) for frames in videos], self.info.get_hf_config())

    def _placeholders(self, whole: Any, number: int) -> Any:
        return whole[: number + 1]  # and the newline


@MULTIMODAL_REGISTRY.register_processor(
    DPPLlavaOnevisionProcessor,
    info=LlavaOnevisionProcessingInfo,
    dummy_inputs=LlavaOnevisionDummyInputsBuilder,
)
class DPPLlavaOnevisionForConditionalGeneration(
    PrunedModelMixin, LlavaOnevisionForConditionalGeneration
):
    """The stock model with a selection before its decoder, and its decoder split."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.split(vllm_config, prefix)

    def _process_video_pixels(self, inputs: Any) -> list[torch.Tensor]:
        """[N, D] of each video: without its newline, which `embed_multimodal` puts back."""
        return [rows.flatten(0, -2)[:-1] for rows in super()._process_video_pixels(inputs)]

    def embed_multimodal(self, **kwargs: Any) -> Any:
        outputs = super().embed_multimodal(**kwargs)
        if kwargs.get(NUM_ENTERED) is None:
            return outputs
        # One that enters in part has columns of places, and its newline already.
        width = len(self.image_newline)
        return tuple(
            torch.cat([rows, self.image_newline[None].to(rows)]) if rows.shape[1] == width else rows
            for rows in outputs
        )

    def encoded_videos(
        self, outputs: Sequence[torch.Tensor], grids: Sequence[Grid], kwargs: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        for rows, grid in zip(outputs, grids, strict=True):
            newline = TextBetween(
                self.image_newline[None].to(rows), np.zeros(1, np.int64), np.array([prod(grid)])
            )
            yield {"origins": np.zeros((grid[0], 3), np.int64), "text": newline}

    def video_grids(self, kwargs: Mapping[str, Any]) -> list[Grid]:
        return _grids(kwargs[NUM_FRAMES].flatten().tolist(), self.config)

    def grid_of(self, feature: MultiModalFeatureSpec) -> Grid:
        assert feature.data is not None
        if feature.modality == "image":  # tiles of all kinds, and newlines
            return 1, 1, feature.mm_position.length
        (grid,) = _grids([int(feature.data[NUM_FRAMES].data)], self.config)
        return grid


def _grids(num_frames: Sequence[int], config: Any) -> list[Grid]:
    """Of videos of so many frames each."""
    vision = config.vision_config
    side = ceil(vision.image_size // vision.patch_size / POOLED)
    return [(number, side, side) for number in num_frames]
