"""Bytes of KV."""

from typing import TYPE_CHECKING

import torch
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


def num_kv_layers(model_config: "ModelConfig") -> int:
    """Layers of the decoder that hold KV: those of linear attention hold a state, however long."""
    decoder = model_config.hf_text_config
    types = getattr(decoder, "layer_types", None) or ()
    return decoder.num_hidden_layers - list(types).count("linear_attention")


def kv_bytes_of_layer(vllm_config: "VllmConfig") -> int:
    """Of one token in one layer, all tensor-parallel ranks together."""
    model, name = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    dtype: torch.dtype = STR_DTYPE_TO_TORCH_DTYPE.get(name, model.dtype)
    return 2 * model.get_total_num_kv_heads() * model.get_head_size() * dtype.itemsize
