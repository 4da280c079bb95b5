"""A small MiniCPM-V 4.6, whose decoder is a Qwen3.5: what `checkpoint` asks of an architecture."""

from typing import Any

from transformers import (
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_6ImageProcessor,
    MiniCPMV4_6Processor,
    MiniCPMV4_6VideoProcessor,
    Qwen2Tokenizer,
)

from vllm_dpp.toy import qwen3_5
from vllm_dpp.toy import tokenizer as tok
from vllm_dpp.toy.spec import CheckpointSpec

MODEL = MiniCPMV4_6ForConditionalGeneration
PATCH = 14
SCALE = 224
"""Side of what a picture is scaled to; of a larger one tiles of about this follow."""
SPECIAL_TOKENS = {
    "image_token": tok.IMAGE_PAD,
    "video_token": tok.VIDEO_PAD,
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}


def make_tokenizer() -> Qwen2Tokenizer:
    """Qwen's, with tokens of pictures, of tiles and of numbers that have names."""
    of_qwen = [name for name in tok.SPECIAL_TOKENS if name not in SPECIAL_TOKENS.values()]
    template = tok.template_of_lines(tok.IMAGE_PAD, tok.VIDEO_PAD)
    return tok.make_tokenizer(of_qwen, chat_template=template, named=SPECIAL_TOKENS)


def make_processor(tokenizer: Qwen2Tokenizer) -> MiniCPMV4_6Processor:
    """The processor of text, images and videos; a picture is cut into four tiles at most."""
    size = {"scale_resolution": SCALE, "patch_size": PATCH, "max_slice_nums": 4}
    return MiniCPMV4_6Processor(
        MiniCPMV4_6ImageProcessor(**size),
        MiniCPMV4_6VideoProcessor(**size),
        tokenizer,
        chat_template=tokenizer.chat_template,
    )


def make_config(spec: CheckpointSpec, tokenizer: Qwen2Tokenizer) -> MiniCPMV4_6Config:
    """The configuration of a MiniCPM-V 4.6 of this shape."""
    text: dict[str, Any] = qwen3_5.decoder_fields(spec, tokenizer)
    vision = {
        "num_hidden_layers": spec.vision_depth,
        "hidden_size": spec.vision_hidden_size,
        "intermediate_size": 3 * spec.vision_hidden_size,
        "num_attention_heads": spec.vision_heads,
        "image_size": SCALE,
        "patch_size": PATCH,
    }
    return MiniCPMV4_6Config(
        text_config=text | {"model_type": "qwen3_5_text"},
        vision_config=vision,
        insert_layer_id=spec.vision_depth // 2 - 1,
        image_size=SCALE,
        image_token_id=tokenizer.convert_tokens_to_ids(tok.IMAGE_PAD),
        video_token_id=tokenizer.convert_tokens_to_ids(tok.VIDEO_PAD),
        tie_word_embeddings=False,
    )
