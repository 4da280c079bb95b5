"""A small Qwen2-VL: what `checkpoint` asks of an architecture."""

from collections.abc import Callable
from typing import Any

from transformers import (
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from vllm_dpp.toy import tokenizer as tok
from vllm_dpp.toy.fields import special_token_ids, text_fields
from vllm_dpp.toy.spec import CheckpointSpec

MODEL = Qwen2VLForConditionalGeneration


def make_processor(
    tokenizer: Qwen2Tokenizer, of_class: Callable[..., Any] = Qwen2VLProcessor
) -> Any:
    """The processor of text, images and videos, of this class, with Qwen's chat template."""
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}
    return of_class(
        Qwen2VLImageProcessor(size=pixels),
        tokenizer,
        # Unset, cap_pixels_per_frame warns on every call.
        Qwen2VLVideoProcessor(size=pixels, cap_pixels_per_frame=False),
        chat_template=tok.CHAT_TEMPLATE,
    )


def make_config(spec: CheckpointSpec, tokenizer: Qwen2Tokenizer) -> Qwen2VLConfig:
    """The configuration of a Qwen2-VL of this shape, for the tokenizer's special tokens."""
    return Qwen2VLConfig(
        text_config=decoder_fields(spec, tokenizer),
        vision_config={
            "depth": spec.vision_depth,
            "embed_dim": spec.vision_hidden_size,
            "num_heads": spec.vision_heads,
            "mlp_ratio": 3,
            "hidden_size": spec.hidden_size,
            "initializer_range": spec.initializer_range,
        },
        **special_token_ids(tokenizer),
        tie_word_embeddings=False,
    )


def decoder_fields(spec: CheckpointSpec, tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    """Of the decoder's configuration."""
    return text_fields(spec, tokenizer) | {
        "max_window_layers": spec.num_layers,
        "rms_norm_eps": 1e-6,  # as released models have it; the configuration's default is 1e-5
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": spec.rope_theta,
            "mrope_section": list(_mrope_section(spec.head_dim)),
        },
    }


def _mrope_section(head_dim: int) -> tuple[int, int, int]:
    """Rotary pairs for time, height and width, 1:1.5:1.5 as in Qwen2-VL."""
    time = head_dim // 8
    space = (head_dim // 2 - time) // 2
    return (time, space, space)
