"""A small LLaVA-OneVision: what `checkpoint` asks of an architecture."""

from math import ceil
from typing import Any

from torch import Tensor
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Tokenizer,
)

from vllm_dpp.toy import tokenizer as tok
from vllm_dpp.toy.fields import text_fields
from vllm_dpp.toy.spec import CheckpointSpec

MODEL = LlavaOnevisionForConditionalGeneration
PATCH = 14
PATCHES = 7
"""Of a side; as in released models they are odd, so that pooling has to round."""
SIDE = PATCHES * PATCH
TOKENS_PER_FRAME = ceil(PATCHES / 2) ** 2
PINPOINTS = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
IMAGE, VIDEO = "<image>", "<video>"

SPECIAL_TOKENS = {"image_token": IMAGE, "video_token": VIDEO}


def make_tokenizer() -> Qwen2Tokenizer:
    """Qwen's, with tokens of images and videos that have names."""
    return tok.make_tokenizer(
        chat_template=tok.template_of_lines(IMAGE, VIDEO), named=SPECIAL_TOKENS
    )


def make_processor(tokenizer: Qwen2Tokenizer) -> LlavaOnevisionProcessor:
    """The processor of text, images and videos; an image is cut into two tiles at most."""
    size = {"height": SIDE, "width": SIDE}
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=PATCHES**2,
        vision_feature_select_strategy="full",
        chat_template=tok.template_of_lines(IMAGE, VIDEO),
    )


def make_config(spec: CheckpointSpec, tokenizer: Qwen2Tokenizer) -> LlavaOnevisionConfig:
    """The configuration of a LLaVA-OneVision of this shape, whose decoder is a Qwen2."""
    text: dict[str, Any] = text_fields(spec, tokenizer) | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        "tie_word_embeddings": False,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "num_hidden_layers": spec.vision_depth,
        "hidden_size": spec.vision_hidden_size,
        "intermediate_size": 3 * spec.vision_hidden_size,
        "num_attention_heads": spec.vision_heads,
        "image_size": SIDE,
        "patch_size": PATCH,
        "vision_use_head": False,
    }
    return LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )


def released(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as in released files: SigLIP's have one more level in their names."""
    tower = "model.vision_tower."
    return {name.replace(tower, f"{tower}vision_model."): value for name, value in weights.items()}
