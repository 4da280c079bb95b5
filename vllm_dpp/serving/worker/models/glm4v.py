"""GLM-4.1V with video pruning before and in the middle of the decoder.

A video is a row of pictures, each before its own time. The tokens of the pictures are those of
images.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.glm4_1v import (
    Glm4vDummyInputsBuilder,
    Glm4vForConditionalGeneration,
    Glm4vMultiModalProcessor,
    Glm4vProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig

from vllm_dpp.serving.front.admission import AdmissionProcessorMixin
from vllm_dpp.serving.front.entry import TimedEntryProcessorMixin
from vllm_dpp.serving.worker.models.timed_media import TimedMediaMixin

VIDEO_TEXT = "video_text"
"""Key of what the processor adds to each video: token ids of its text, which a worker, who does not
know its metadata, could not make."""


class Glm4vTextProcessor(Glm4vMultiModalProcessor):
    """The stock processor, telling the text of each video."""

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        outputs = super()._apply_hf_processor_main(mm_items, hf_kwargs)
        grids = outputs.get("video_grid_thw")
        if grids is not None:
            own = self.info.get_hf_config().image_token_id
            whole = [
                self.info._construct_video_placeholder(*mm_items["video"][item], grid)
                for item, grid in enumerate(grids)
            ]
            outputs[VIDEO_TEXT] = [[token for token in tokens if token != own] for tokens in whole]
        return outputs

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**fields, VIDEO_TEXT: MultiModalFieldConfig.batched("video", keep_on_cpu=True)}


class DPPGlm4vProcessor(AdmissionProcessorMixin, TimedEntryProcessorMixin, Glm4vTextProcessor):
    """A front end that builds it also checks what requests ask for; videos may be shortened."""

    def video_token_id(self) -> int:
        return self.info.get_hf_config().image_token_id

    def text_between(self, outputs: Any, item: int) -> Sequence[int]:
        return outputs[VIDEO_TEXT][item]


@MULTIMODAL_REGISTRY.register_processor(
    DPPGlm4vProcessor, info=Glm4vProcessingInfo, dummy_inputs=Glm4vDummyInputsBuilder
)
class DPPGlm4vForConditionalGeneration(TimedMediaMixin, Glm4vForConditionalGeneration):
    """The stock model with a selection before its decoder, and its decoder split."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.split(vllm_config, prefix)

    @property
    def own_token_id(self) -> int:
        return self.config.image_token_id

    @property
    def slice_end_id(self) -> int:
        return self.config.image_end_token_id

    def texts_between(self, kwargs: Mapping[str, Any]) -> Sequence[Sequence[int]]:
        return kwargs[VIDEO_TEXT]
