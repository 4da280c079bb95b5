"""A small Qwen3.5: what `checkpoint` asks of an architecture.

Three of four layers are linear attention.
"""

from collections.abc import Callable
from typing import Any

from transformers import Qwen2Tokenizer, Qwen3_5Config, Qwen3_5ForConditionalGeneration

from vllm_dpp.toy import qwen3_vl
from vllm_dpp.toy.fields import special_token_ids, text_fields
from vllm_dpp.toy.spec import CheckpointSpec

MODEL = Qwen3_5ForConditionalGeneration
ROTATED = 0.25
make_processor = qwen3_vl.make_processor


def make_config(
    spec: CheckpointSpec,
    tokenizer: Qwen2Tokenizer,
    of_class: Callable[..., Any] = Qwen3_5Config,
    **of_layers: Any,
) -> Any:
    """The configuration of a Qwen3.5 of this shape, for the tokenizer's special tokens.

    Args:
        spec: its shape.
        tokenizer: its tokenizer.
        of_class: the class of the configuration.
        of_layers: what that class asks of the decoder's layers beside these.
    """
    return of_class(
        text_config=decoder_fields(spec, tokenizer) | of_layers,
        vision_config=qwen3_vl.vision_fields(spec),
        **special_token_ids(tokenizer),
        tie_word_embeddings=False,
    )


def decoder_fields(spec: CheckpointSpec, tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    """Of its decoder."""
    rotary_dim = int(spec.head_dim * ROTATED)
    return text_fields(spec, tokenizer) | {
        "head_dim": spec.head_dim,
        "linear_key_head_dim": spec.head_dim,
        "linear_value_head_dim": spec.head_dim,
        "linear_num_key_heads": spec.num_kv_heads,
        "linear_num_value_heads": spec.num_heads,
        "mamba_ssm_dtype": "float32",
        "rope_parameters": qwen3_vl.rope_parameters(spec, rotary_dim)
        | {"partial_rotary_factor": ROTATED},
    }
