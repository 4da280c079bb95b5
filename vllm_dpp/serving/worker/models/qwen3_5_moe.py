"""Qwen3.5 and 3.6 with a mixture of experts in their layers; all else is as in Qwen3.5."""

from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_dpp.serving.worker.models.qwen3_vl import DPPQwen3VLProcessor, PrunedQwen3VLMixin


@MULTIMODAL_REGISTRY.register_processor(
    DPPQwen3VLProcessor, info=Qwen3_5MoeProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class DPPQwen3_5MoeForConditionalGeneration(  # noqa: N801
    PrunedQwen3VLMixin, Qwen3_5MoeForConditionalGeneration
):
    """The stock model with a selection before its decoder."""
