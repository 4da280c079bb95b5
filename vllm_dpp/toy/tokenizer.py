"""A byte-level tokenizer with Qwen's special tokens and Qwen2.5-VL's chat template.

Without merges a token is one byte of UTF-8: any text round-trips, and a vocabulary of 270
keeps the embedding of a small model small.
"""

from collections.abc import Mapping

from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Tokenizer

TURN_END = "<|im_end|>"
PADDING = "<|endoftext|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"

SPECIAL_TOKENS = (
    PADDING,
    "<|im_start|>",
    TURN_END,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    IMAGE_PAD,
    VIDEO_PAD,
)

# Qwen2.5-VL's, without the system prompt that it adds where there is none.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for content in message['content'] -%}
{%- if content['type'] == 'image' or 'image' in content or 'image_url' in content -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif content['type'] == 'video' or 'video' in content -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in content -%}
{{ content['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def make_tokenizer(named: Mapping[str, str] | None = None) -> Qwen2Tokenizer:
    """Returns the tokenizer: 256 byte tokens, then `SPECIAL_TOKENS`, ids without gaps.

    Args:
        named: special tokens of a family, by the attributes that its processor reads.
    """
    vocab = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    special = (*SPECIAL_TOKENS, *(named or {}).values())
    tokenizer = Qwen2Tokenizer(
        vocab=vocab | {token: len(vocab) + i for i, token in enumerate(special)},
        merges=[],
        eos_token=TURN_END,
        pad_token=PADDING,
        unk_token=PADDING,
        extra_special_tokens=named if named else list(SPECIAL_TOKENS),
    )
    if named:
        tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
