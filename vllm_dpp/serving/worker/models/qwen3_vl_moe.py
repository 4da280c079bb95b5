"""Qwen3-VL with a mixture of experts in its layers; all else is as in Qwen3-VL."""

from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.model_executor.models.qwen3_vl_moe import (
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_dpp.serving.worker.models.qwen3_vl import DPPQwen3VLProcessor, PrunedQwen3VLMixin


@MULTIMODAL_REGISTRY.register_processor(
    DPPQwen3VLProcessor, info=Qwen3VLMoeProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class DPPQwen3VLMoeForConditionalGeneration(PrunedQwen3VLMixin, Qwen3VLMoeForConditionalGeneration):
    """The stock model with a selection before its decoder, and its decoder split."""
