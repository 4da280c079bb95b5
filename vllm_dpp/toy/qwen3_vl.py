"""A small Qwen3-VL: what `checkpoint` asks of an architecture."""

from collections.abc import Callable
from typing import Any

from transformers import (
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vllm_dpp.toy import tokenizer as tok
from vllm_dpp.toy.fields import special_token_ids, text_fields
from vllm_dpp.toy.spec import CheckpointSpec

MODEL = Qwen3VLForConditionalGeneration
PATCH = 16
DEEPSTACK_LEVELS = 3
HALF = [0.5, 0.5, 0.5]


def make_processor(tokenizer: Qwen2Tokenizer) -> Qwen3VLProcessor:
    """The processor of text, images and videos, with Qwen's chat template."""
    pixels = {"shortest_edge": 64 * 64, "longest_edge": 1280 * 32 * 32}
    return Qwen3VLProcessor(
        # vLLM normalises videos as images, which are so in Qwen3-VL.
        Qwen2VLImageProcessor(size=pixels, patch_size=PATCH, image_mean=HALF, image_std=HALF),
        tokenizer,
        # Unset, cap_pixels_per_frame warns on every call.
        Qwen3VLVideoProcessor(size=pixels, cap_pixels_per_frame=False),
        chat_template=tok.CHAT_TEMPLATE,
    )


def make_config(
    spec: CheckpointSpec,
    tokenizer: Qwen2Tokenizer,
    of_class: Callable[..., Any] = Qwen3VLConfig,
    **of_layers: Any,
) -> Any:
    """The configuration of a Qwen3-VL of this shape, for the tokenizer's special tokens.

    Args:
        spec: its shape.
        tokenizer: its tokenizer.
        of_class: the class of the configuration.
        of_layers: what that class asks of the decoder's layers beside these.
    """
    text = (
        text_fields(spec, tokenizer)
        | of_layers
        | {"head_dim": spec.head_dim, "rope_parameters": rope_parameters(spec, spec.head_dim)}
    )
    vision = vision_fields(spec) | {
        "depth": max(spec.vision_depth, DEEPSTACK_LEVELS),
        "deepstack_visual_indexes": list(range(DEEPSTACK_LEVELS)),
    }
    return of_class(
        text_config=text,
        vision_config=vision,
        **special_token_ids(tokenizer),
        tie_word_embeddings=False,
    )


def rope_parameters(spec: CheckpointSpec, rotary_dim: int) -> dict[str, Any]:
    """Of the decoder, of whose heads so many elements are rotated."""
    return {
        "rope_type": "default",
        "rope_theta": spec.rope_theta,
        "mrope_section": _interleaved_section(rotary_dim),
        "mrope_interleaved": True,
    }


def vision_fields(spec: CheckpointSpec) -> dict[str, Any]:
    """Of the vision encoder."""
    return {
        "depth": spec.vision_depth,
        "hidden_size": spec.vision_hidden_size,
        "intermediate_size": 3 * spec.vision_hidden_size,
        "num_heads": spec.vision_heads,
        "patch_size": PATCH,
        "out_hidden_size": spec.hidden_size,
        "num_position_embeddings": 8 * 8,
        "initializer_range": spec.initializer_range,
    }


def _interleaved_section(rotary_dim: int) -> list[int]:
    """Rotary pairs for time, height and width; the latter two take every third of the first."""
    space = rotary_dim // 2 // 3
    return [rotary_dim // 2 - 2 * space, space, space]
