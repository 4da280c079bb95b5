"""A small Qwen3-VL with a mixture of experts: what `checkpoint` asks of an architecture."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Qwen2Tokenizer, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from vllm_dpp.toy import qwen3_vl
from vllm_dpp.toy.spec import CheckpointSpec

MODEL = Qwen3VLMoeForConditionalGeneration
NUM_EXPERTS, PER_TOKEN = 4, 2
make_processor = qwen3_vl.make_processor


def make_config(spec: CheckpointSpec, tokenizer: Qwen2Tokenizer) -> Qwen3VLMoeConfig:
    """The configuration of a model of this shape, for the tokenizer's special tokens."""
    return qwen3_vl.make_config(spec, tokenizer, Qwen3VLMoeConfig, **expert_fields(spec))


def expert_fields(spec: CheckpointSpec) -> dict[str, Any]:
    """Of the decoder's experts."""
    return {
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": PER_TOKEN,
        "moe_intermediate_size": 3 * spec.hidden_size // 4,
        "norm_topk_prob": True,  # as transformers always does, and vLLM where it is told
    }


def released(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights as released checkpoints have them, and vLLM: matrices of experts transposed.

    transformers tells the two layouts apart by their shapes, so none of these may be square.
    """
    return {
        name: value.transpose(1, 2).contiguous() if ".experts." in name else value
        for name, value in state.items()
    }
