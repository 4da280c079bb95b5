"""Qwen3-Omni's thinker, with video pruning; where media stand is as in Qwen2.5-VL.

DeepStack adds to its first layers. Sound beside a video is text to us. Sound that is read between
the slices of one is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm.model_executor.models.qwen3_omni_moe_thinker import (
    Qwen3OmniMoeThinkerDummyInputsBuilder,
    Qwen3OmniMoeThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerMultiModalProcessor,
    Qwen3OmniMoeThinkerProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec

from vllm_dpp.serving.front.admission import AdmissionProcessorMixin
from vllm_dpp.serving.front.entry import EntryProcessorMixin
from vllm_dpp.serving.front.refusals import AUDIO_IN_VIDEO
from vllm_dpp.serving.worker.models.qwen2_vl import PrunedQwen2VLMixin


class DPPQwen3OmniMoeThinkerProcessor(
    AdmissionProcessorMixin, EntryProcessorMixin, Qwen3OmniMoeThinkerMultiModalProcessor
):
    """A front end that builds it also checks what requests ask for; videos may be shortened."""

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        if hf_kwargs.get(AUDIO_IN_VIDEO):
            raise ValueError(
                f"mm_processor_kwargs: {AUDIO_IN_VIDEO} puts sound between the slices of a video, "
                "which cannot be pruned: leave it out, and send the sound as audio beside the video"
            )
        return super()._apply_hf_processor_main(mm_items, hf_kwargs)


@MULTIMODAL_REGISTRY.register_processor(
    DPPQwen3OmniMoeThinkerProcessor,
    info=Qwen3OmniMoeThinkerProcessingInfo,
    dummy_inputs=Qwen3OmniMoeThinkerDummyInputsBuilder,
)
class DPPQwen3OmniMoeForConditionalGeneration(
    PrunedQwen2VLMixin, Qwen3OmniMoeThinkerForConditionalGeneration
):
    """The stock model with a selection before its decoder, and its decoder split."""

    @property
    def positions_per_second(self) -> float:
        return self.config.position_id_per_seconds

    def iter_mm_grid_thw(
        self, mm_features: Sequence[MultiModalFeatureSpec]
    ) -> Iterator[tuple[int, int, int, int, float]]:
        """Images and videos: first position, slices, rows, columns, positions a slice takes."""
        for offset, modality, data in self.iter_mm_features(list(mm_features)):
            if modality != "audio":
                sizes = (data[f"grid_{axis}"] for axis in "thw")
                yield (offset, *sizes, data["t_factor"])
