"""Fields that the configurations of all small models share."""

from typing import Any

from transformers import Qwen2Tokenizer

from vllm_dpp.toy import tokenizer as tok
from vllm_dpp.toy.spec import CheckpointSpec


def text_fields(spec: CheckpointSpec, tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    """Of the decoder."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "max_position_embeddings": spec.max_position_embeddings,
        "initializer_range": spec.initializer_range,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def special_token_ids(tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    """Of the whole model."""
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids(tok.IMAGE_PAD),
        "video_token_id": tokenizer.convert_tokens_to_ids(tok.VIDEO_PAD),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids(tok.VISION_START),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids(tok.VISION_END),
    }
