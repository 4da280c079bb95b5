"""A byte-level tokenizer, by default with Qwen's special tokens and Qwen2.5-VL's chat template.

Without merges a token is one byte of UTF-8: any text round-trips, and a vocabulary of 270
keeps the embedding of a small model small.
"""

from collections.abc import Mapping, Sequence

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


def make_tokenizer(
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    chat_template: str = CHAT_TEMPLATE,
    eos_token: str = TURN_END,
    named: Mapping[str, str] | None = None,
) -> Qwen2Tokenizer:
    """Returns the tokenizer: 256 byte tokens, then special tokens, ids without gaps.

    Args:
        special_tokens: of the family.
        chat_template: of the family.
        eos_token: the one of them that ends an answer.
        named: more of them, by the attributes that the family's processor reads.
    """
    vocab = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    special = (*special_tokens, *(named or {}).values())
    tokenizer = Qwen2Tokenizer(
        vocab=vocab | {token: len(vocab) + i for i, token in enumerate(special)},
        merges=[],
        eos_token=eos_token,
        pad_token=PADDING,
        unk_token=PADDING,
        extra_special_tokens=named or list(special_tokens),
    )
    if named:
        tokenizer.add_tokens(list(special_tokens), special_tokens=True)
    tokenizer.chat_template = chat_template
    return tokenizer


def template_of_lines(image: str, video: str) -> str:
    """Qwen's template, but an image or a video has no marks, and stands on a line of its own.

    Args:
        image: the token of an image.
        video: the token of a video.
    """
    template = CHAT_TEMPLATE
    for qwens, own in ((IMAGE_PAD, image), (VIDEO_PAD, video)):
        marked = f"{VISION_START}{qwens}{VISION_END}"
        assert marked in template
        template = template.replace(marked, f"{{{{ '{own}\\n' }}}}")
    return template
