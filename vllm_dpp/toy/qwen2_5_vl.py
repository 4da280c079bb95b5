"""A small Qwen2.5-VL: what `checkpoint` asks of an architecture."""

from typing import TYPE_CHECKING

from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from vllm_dpp.toy import tokenizer as tok
from vllm_dpp.toy.fields import special_token_ids, text_fields

if TYPE_CHECKING:
    from vllm_dpp.toy.checkpoint import CheckpointSpec

MODEL = Qwen2_5_VLForConditionalGeneration


def make_processor(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLProcessor:
    """The processor of text, images and videos, with Qwen's chat template."""
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=pixels),
        tokenizer,
        # Unset, cap_pixels_per_frame warns on every call.
        Qwen2VLVideoProcessor(size=pixels, cap_pixels_per_frame=False),
        chat_template=tok.CHAT_TEMPLATE,
    )


def make_config(spec: "CheckpointSpec", tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """The configuration of a Qwen2.5-VL of this shape, for the tokenizer's special tokens."""
    text = text_fields(spec, tokenizer) | {
        "max_window_layers": spec.num_layers,
        "rms_norm_eps": 1e-6,  # as Qwen2.5-VL has it; the configuration's default is 1e-5
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": spec.rope_theta,
            "mrope_section": list(_mrope_section(spec.head_dim)),
        },
    }
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
        text_config=text,
        vision_config=vision,
        **special_token_ids(tokenizer),
        tie_word_embeddings=False,
    )


def _mrope_section(head_dim: int) -> tuple[int, int, int]:
    """Rotary pairs for time, height and width, 1:1.5:1.5 as in Qwen2.5-VL."""
    time = head_dim // 8
    space = (head_dim // 2 - time) // 2
    return (time, space, space)
