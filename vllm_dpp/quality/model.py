"""The small Qwen2.5-VL that learns the task: its shape, its making, its saving."""

from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

from vllm_dpp.quality.questions import KINDS
from vllm_dpp.quality.words import make_word_tokenizer
from vllm_dpp.toy.qwen2_5_vl import make_config, make_processor
from vllm_dpp.toy.spec import CheckpointSpec

MODEL = CheckpointSpec(num_layers=8, hidden_size=128, intermediate_size=256, rope_theta=1e4)
"""The shape of the model.

The rotary pairs of width hardly turn within a few cells: they serve look-ups by content. Where a
token is, it shows by its light.
"""


def make_model(
    tokenizer: Qwen2Tokenizer, seed: int, spec: CheckpointSpec = MODEL
) -> Qwen2_5_VLForConditionalGeneration:
    """Returns the untrained model of `seed` in float32."""
    config = make_config(spec, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    _start_with_likeness(model)
    model.generation_config = GenerationConfig(
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
    )
    return model.float()


CHECKPOINTS = tuple(Path(__file__).parent / "checkpoints" / f"seed_{seed}" for seed in (1, 2))
"""The trained models, ready for `vllm serve`. `training` beside them says how they came about."""

TRAINED = CHECKPOINTS[0]
"""The one that demo, examples and tests serve."""

LEARNED = tuple(kind for kind in KINDS if kind != "twin")
"""The kinds of question that the trained models answer: over 90 % of held-out ones each."""

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
    make_processor(tokenizer).save_pretrained(folder)


def load_model(
    folder: Path,
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer]:
    """Returns the saved model in float32 and its tokenizer."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), make_word_tokenizer()
