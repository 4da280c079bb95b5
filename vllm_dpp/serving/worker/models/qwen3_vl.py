"""Qwen3-VL with video pruning before and in the middle of the decoder.

Between the slices of its videos stands text: the time, and the markers of a slice. It is never
pruned. DeepStack adds to the first layers, which see every token that enters.
"""

from collections.abc import Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_dpp.serving.front.admission import AdmissionProcessorMixin
from vllm_dpp.serving.front.entry import TimedEntryProcessorMixin
from vllm_dpp.serving.worker.models.timed_media import TimedMediaMixin


class DPPQwen3VLProcessor(
    AdmissionProcessorMixin, TimedEntryProcessorMixin, Qwen3VLMultiModalProcessor
):
    """A front end that builds it also checks what requests ask for; videos may be shortened."""

    def text_between(self, outputs: Any, item: int) -> list[int]:
        timestamps = outputs["timestamps"][item]
        return _text_between(timestamps, self.info.get_tokenizer(), self.info.get_hf_config())


class PrunedQwen3VLMixin(TimedMediaMixin):
    """Mixed into a stock model of this kind, whatever its decoder's layers are made of."""

    config: Any
    deepstack_num_level: int
    _tokenizer: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.split(vllm_config, prefix, self.deepstack_num_level)

    @property
    def own_token_id(self) -> int:
        return self.config.video_token_id

    @property
    def slice_end_id(self) -> int:
        return self.config.vision_end_token_id

    def texts_between(self, kwargs: Mapping[str, Any]) -> list[list[int]]:
        return [
            _text_between(timestamps, self._tokenizer, self.config)
            for timestamps in kwargs["timestamps"]
        ]


@MULTIMODAL_REGISTRY.register_processor(
    DPPQwen3VLProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class DPPQwen3VLForConditionalGeneration(PrunedQwen3VLMixin, Qwen3VLForConditionalGeneration):
    """The stock model with a selection before its decoder, and its decoder split."""


def _text_between(timestamps: Any, tokenizer: Any, config: Any) -> list[int]:
    """Token ids of the text of a video, all slices together."""
    return Qwen3VLMultiModalProcessor.get_video_repl(
        tokens_per_frame=[0] * len(timestamps),
        timestamps=timestamps,
        tokenizer=tokenizer,
        vision_start_token_id=config.vision_start_token_id,
        vision_end_token_id=config.vision_end_token_id,
        video_token_id=config.video_token_id,
    ).full
