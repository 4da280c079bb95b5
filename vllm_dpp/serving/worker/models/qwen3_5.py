"""Qwen3.5 and 3.6 with video pruning before the decoder; its media are as in Qwen3-VL.

Most of its layers are linear attention, which sums up what it has read in a state and has no KV.
"""

from vllm.model_executor.models.qwen3_5 import (
    Qwen3_5ForConditionalGeneration,
    Qwen3_5ProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl import Qwen3VLDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_dpp.serving.worker.models.qwen3_vl import DPPQwen3VLProcessor, PrunedQwen3VLMixin


@MULTIMODAL_REGISTRY.register_processor(
    DPPQwen3VLProcessor, info=Qwen3_5ProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class DPPQwen3_5ForConditionalGeneration(  # noqa: N801
    PrunedQwen3VLMixin, Qwen3_5ForConditionalGeneration
):
    """The stock model with a selection before its decoder."""
