"""Checkpoints in the shape of released models, without weights: for `--load-format dummy`."""

from pathlib import Path

from transformers import GenerationConfig, Qwen2_5_VLConfig

from vllm_dpp.toy import qwen2_5_vl
from vllm_dpp.toy import tokenizer as tok
from vllm_dpp.toy.fields import special_token_ids

SHAPES = ("qwen2_5_vl_7b",)


def make_dummy(path: str | Path, shape: str) -> Path:
    """Writes configuration, tokenizer and processor to the folder `path`.

    Args:
        path: Made if it is not there.
        shape: One of `SHAPES`: layers, widths and heads of the released model. The tokenizer is
            the small models' own, whose ids are few of the vocabulary.

    Returns:
        `path`.

    Raises:
        ValueError: There is no such shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}: expected one of {', '.join(SHAPES)}")
    path = Path(path)
    tokenizer = tok.make_tokenizer()
    turn_end, padding = tokenizer.convert_tokens_to_ids([tok.TURN_END, tok.PADDING])
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
        "bos_token_id": None,
        "eos_token_id": turn_end,
        "pad_token_id": padding,
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        **special_token_ids(tokenizer),
        tie_word_embeddings=False,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype="bfloat16",
    )
    config.save_pretrained(path)
    GenerationConfig(eos_token_id=turn_end, pad_token_id=padding).save_pretrained(path)
    qwen2_5_vl.make_processor(tokenizer).save_pretrained(path)
    return path
