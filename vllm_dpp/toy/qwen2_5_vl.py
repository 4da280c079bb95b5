"""A small Qwen2.5-VL: what `checkpoint` asks of an architecture."""

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
)

from vllm_dpp.toy import qwen2_vl
from vllm_dpp.toy.fields import special_token_ids
from vllm_dpp.toy.spec import CheckpointSpec

MODEL = Qwen2_5_VLForConditionalGeneration


def make_processor(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLProcessor:
    """The processor of text, images and videos, with Qwen's chat template."""
    return qwen2_vl.make_processor(tokenizer, Qwen2_5_VLProcessor)


def make_config(spec: CheckpointSpec, tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """The configuration of a Qwen2.5-VL of this shape, for the tokenizer's special tokens."""
    vision = {
        "depth": spec.vision_depth,
        "hidden_size": spec.vision_hidden_size,
        "intermediate_size": 3 * spec.vision_hidden_size,
        "num_heads": spec.vision_heads,
        "out_hidden_size": spec.hidden_size,
        "fullatt_block_indexes": [spec.vision_depth - 1],
        "tokens_per_second": 2,
        "initializer_range": spec.initializer_range,
    }
    return Qwen2_5_VLConfig(
        text_config=qwen2_vl.decoder_fields(spec, tokenizer),
        vision_config=vision,
        **special_token_ids(tokenizer),
        tie_word_embeddings=False,
    )
