"""A small GLM-4.1V: what `checkpoint` asks of an architecture."""

from collections.abc import Callable
from typing import Any

from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Qwen2Tokenizer,
)
from transformers.models.glm4v.video_processing_glm4v import Glm4vVideoProcessor

from vllm_dpp.toy import tokenizer as tok
from vllm_dpp.toy.fields import text_fields
from vllm_dpp.toy.spec import CheckpointSpec

MODEL = Glm4vForConditionalGeneration
PATCH = 14
SPECIAL_TOKENS = (
    tok.PADDING,
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|image|>",
    "<|video|>",
)

# No token ends a turn: the next one's role does.
CHAT_TEMPLATE = """\
[gMASK]<sop>
{%- for message in messages -%}
<|{{ message['role'] }}|>
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for content in message['content'] -%}
{%- if content['type'] == 'image' or 'image' in content or 'image_url' in content -%}
<|begin_of_image|><|image|><|end_of_image|>
{%- elif content['type'] == 'video' or 'video' in content -%}
<|begin_of_video|><|video|><|end_of_video|>
{%- elif 'text' in content -%}
{{ content['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>
{% endif -%}
"""


def make_tokenizer() -> Qwen2Tokenizer:
    """The byte-level tokenizer with GLM's special tokens; the next question ends an answer."""
    return tok.make_tokenizer(SPECIAL_TOKENS, CHAT_TEMPLATE, eos_token="<|user|>")


def make_processor(
    tokenizer: Qwen2Tokenizer,
    of_class: Callable[..., Any] = Glm4vProcessor,
    of_images: Callable[..., Any] = Glm4vImageProcessor,
    of_videos: Callable[..., Any] = Glm4vVideoProcessor,
) -> Any:
    """The processor of text, images and videos, and the classes of each."""
    # Of pictures less: a starting vLLM makes its longest video of frames as large as a picture.
    of_picture, of_video = (
        {"shortest_edge": 56 * 56, "longest_edge": tokens * 2 * 28 * 28} for tokens in (128, 1280)
    )
    return of_class(
        of_images(size=of_picture), tokenizer, of_videos(size=of_video), chat_template=CHAT_TEMPLATE
    )


def make_config(
    spec: CheckpointSpec,
    tokenizer: Qwen2Tokenizer,
    of_class: Callable[..., Any] = Glm4vConfig,
    **of_layers: Any,
) -> Any:
    """The configuration of a GLM-4.1V of this shape, for the tokenizer's special tokens.

    Args:
        spec: its shape.
        tokenizer: its tokenizer.
        of_class: the class of the configuration.
        of_layers: what that class asks of the decoder's layers beside these.
    """
    text: dict[str, Any] = text_fields(spec, tokenizer) | {
        "attention_bias": True,  # which transformers always has, and vLLM where it is told
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": spec.rope_theta,
            "partial_rotary_factor": 0.5,
            "mrope_section": _section(spec.head_dim // 2),
        },
        **of_layers,
    }
    vision = {
        "depth": spec.vision_depth,
        "hidden_size": spec.vision_hidden_size,
        "intermediate_size": 3 * spec.vision_hidden_size,
        "num_heads": spec.vision_heads,
        "patch_size": PATCH,
        "image_size": 8 * PATCH,
        "out_hidden_size": spec.hidden_size,
        "initializer_range": spec.initializer_range,
    }
    return of_class(
        text_config=text,
        vision_config=vision,
        **_special_token_ids(tokenizer),
        tie_word_embeddings=False,
    )


def _special_token_ids(tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    return {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "image": "<|image|>",
            "video": "<|video|>",
            "image_start": "<|begin_of_image|>",
            "image_end": "<|end_of_image|>",
            "video_start": "<|begin_of_video|>",
            "video_end": "<|end_of_video|>",
        }.items()
    }


def _section(rotary_dim: int) -> list[int]:
    """Rotary pairs for time, height and width: as 8, 12 and 12 of a head of 128."""
    space = rotary_dim // 2 * 3 // 8
    return [rotary_dim // 2 - 2 * space, space, space]
