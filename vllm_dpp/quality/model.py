"""The small Qwen2.5-VL that learns the task: its shape, its making, its saving."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

from vllm_dpp.quality.words import make_word_tokenizer
from vllm_dpp.toy import tokenizer as tok
from vllm_dpp.toy.checkpoint import _make_processor


@dataclass(frozen=True)
class ModelSpec:
    """The shape of the model; the head size is `hidden_size / num_heads`.

    The rotary pairs of width hardly turn within a few cells: they serve look-ups by content.
    Where a token is, it shows by its light.
    """

    num_layers: int = 8
    hidden_size: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 256
    mrope_section: tuple[int, int, int] = (4, 6, 6)
    rope_theta: float = 1e4
    vision_depth: int = 2
    vision_hidden_size: int = 64
    vision_heads: int = 2
    initializer_range: float = 0.06


def make_model(
    tokenizer: Qwen2Tokenizer, seed: int, spec: ModelSpec | None = None
) -> Qwen2_5_VLForConditionalGeneration:
    """Returns the untrained model of `seed` in float32."""
    config = _make_config(tokenizer, spec or ModelSpec())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    _start_with_likeness(model)
    model.generation_config = GenerationConfig(
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
    )
    return model.float()


FIRST_LOOK_UP = 2
"""The first layer in which questions learn to look at the video."""


@torch.no_grad()
def _start_with_likeness(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Lets every other head start by attending to tokens that are like its own.

    Looking up a word in the video is the first thing to be learned, and all else waits for it.
    Equal projections for queries and keys are half of the way. The first layers start without,
    since in large models, too, look-ups happen later.
    """
    for layer in model.model.language_model.layers[FIRST_LOOK_UP:]:
        attention = layer.self_attn
        key = attention.k_proj.weight.unflatten(0, (-1, attention.head_dim))
        query = attention.q_proj.weight.unflatten(0, (-1, attention.head_dim))
        query[:: attention.num_key_value_groups] = key


def save_model(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: Qwen2Tokenizer, folder: Path
) -> None:
    """Writes everything that `from_pretrained` and `vllm serve` need, weights in bfloat16."""
    state = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    copy = Qwen2_5_VLForConditionalGeneration(model.config).to(torch.bfloat16)
    copy.load_state_dict(state)
    copy.generation_config = model.generation_config
    copy.save_pretrained(folder)
    _make_processor(tokenizer).save_pretrained(folder)


def load_model(
    folder: Path,
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer]:
    """Returns the saved model in float32 and its tokenizer."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), make_word_tokenizer()


def _make_config(tokenizer: Qwen2Tokenizer, spec: ModelSpec) -> Qwen2_5_VLConfig:
    token_id = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "max_position_embeddings": 32768,
        "max_window_layers": spec.num_layers,
        "rms_norm_eps": 1e-6,  # as Qwen2.5-VL has it; the configuration's default is 1e-5
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": spec.rope_theta,
            "mrope_section": list(spec.mrope_section),
        },
        "initializer_range": spec.initializer_range,
        "bos_token_id": None,
        "eos_token_id": token_id(tok.TURN_END),
        "pad_token_id": token_id(tok.PADDING),
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
        image_token_id=token_id(tok.IMAGE_PAD),
        video_token_id=token_id(tok.VIDEO_PAD),
        vision_start_token_id=token_id(tok.VISION_START),
        vision_end_token_id=token_id(tok.VISION_END),
        tie_word_embeddings=False,
    )
