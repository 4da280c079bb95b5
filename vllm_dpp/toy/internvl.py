"""A small InternVL3.5: what `checkpoint` asks of an architecture."""

from typing import Any

from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2Tokenizer,
)

from vllm_dpp.toy import tokenizer as tok
from vllm_dpp.toy.fields import text_fields
from vllm_dpp.toy.spec import CheckpointSpec

MODEL = InternVLForConditionalGeneration
SIDE = 168
PATCH = 14
TOKENS_PER_FRAME = (SIDE // PATCH // 2) ** 2
"""Of each frame, whatever its size."""
IMAGE, VIDEO = "<IMG_CONTEXT>", "<video>"

SPECIAL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": IMAGE,
    "video_token": VIDEO,
}


def make_tokenizer() -> Qwen2Tokenizer:
    """Qwen's, with special tokens of images and videos that have names."""
    return tok.make_tokenizer(
        chat_template=tok.template_of_lines(IMAGE, VIDEO), named=SPECIAL_TOKENS
    )


def make_processor(tokenizer: Qwen2Tokenizer) -> InternVLProcessor:
    """The processor of text, images and videos; an image is cut into two tiles at most."""
    size = {"height": SIDE, "width": SIDE}
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=2),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=TOKENS_PER_FRAME,
        chat_template=tok.template_of_lines(IMAGE, VIDEO),
    )


def make_config(spec: CheckpointSpec, tokenizer: Qwen2Tokenizer) -> InternVLConfig:
    """The configuration of an InternVL3.5 of this shape, whose decoder is a Qwen3."""
    text: dict[str, Any] = text_fields(spec, tokenizer) | {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": spec.head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        "tie_word_embeddings": False,
    }
    vision = {
        "num_hidden_layers": spec.vision_depth,
        "hidden_size": spec.vision_hidden_size,
        "intermediate_size": 3 * spec.vision_hidden_size,
        "num_attention_heads": spec.vision_heads,
        "attention_bias": True,
        "image_size": [SIDE, SIDE],
        "patch_size": [PATCH, PATCH],
        "initializer_range": spec.initializer_range,
    }
    return InternVLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=TOKENS_PER_FRAME,
        tie_word_embeddings=False,
    )
