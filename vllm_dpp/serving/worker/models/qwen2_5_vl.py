"""Qwen2.5-VL; where its media stand, and what is done about them, is as in Qwen2-VL."""

from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_dpp.serving.front.admission import AdmissionProcessorMixin
from vllm_dpp.serving.front.entry import EntryProcessorMixin
from vllm_dpp.serving.worker.models.qwen2_vl import PrunedQwen2VLMixin


class DPPQwen2_5_VLProcessor(  # noqa: N801
    AdmissionProcessorMixin, EntryProcessorMixin, Qwen2_5_VLMultiModalProcessor
):
    """A front end that builds it also checks what requests ask for; videos may be shortened."""


@MULTIMODAL_REGISTRY.register_processor(
    DPPQwen2_5_VLProcessor,
    info=Qwen2_5_VLProcessingInfo,
    dummy_inputs=Qwen2_5_VLDummyInputsBuilder,
)
class DPPQwen2_5_VLForConditionalGeneration(  # noqa: N801
    PrunedQwen2VLMixin, Qwen2_5_VLForConditionalGeneration
):
    """The stock model with a selection before its decoder, and its decoder split."""
