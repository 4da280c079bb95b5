"""Small Qwen2.5-VL checkpoints with random weights, complete enough to be served."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from vllm_dpp.toy import tokenizer as tok

SPEC_FILE = "toy_checkpoint.json"
RECIPE = 1  # raise it when a checkpoint of the same spec comes out differently


@dataclass(frozen=True)
class CheckpointSpec:
    """What a toy checkpoint is made of; equal specs give equal files.

    The head size, `hidden_size / num_heads`, must be a multiple of 16, and one that the
    attention backend supports (64 always is). `initializer_range` is the standard deviation
    of every weight and bias. Near `hidden_size ** -0.5` a layer neither drowns its input nor
    drowns in it, so the logits depend on the whole prompt.

    `dtype` is that of the file. vLLM runs a float32 checkpoint in bfloat16 unless it is told
    `--dtype float32`.
    """

    num_layers: int = 6
    hidden_size: int = 256
    num_heads: int = 4
    num_kv_heads: int = 2
    intermediate_size: int = 512
    vision_depth: int = 2
    vision_hidden_size: int = 64
    vision_heads: int = 2
    initializer_range: float = 0.06
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.head_dim % 16:
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} "
                "is not a head size that is a multiple of 16"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads over {self.num_kv_heads} KV heads")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, not {self.dtype!r}")

    @property
    def head_dim(self) -> int:
        """Elements of one head of the decoder."""
        return self.hidden_size // self.num_heads

    @property
    def mrope_section(self) -> tuple[int, int, int]:
        """Rotary pairs for time, height and width, 1:1.5:1.5 as in Qwen2.5-VL."""
        time = self.head_dim // 8
        space = (self.head_dim // 2 - time) // 2
        return (time, space, space)


TINY = CheckpointSpec()
"""For tests: 4 million parameters."""

MID = CheckpointSpec(
    num_layers=12,
    hidden_size=512,
    num_heads=8,
    num_kv_heads=4,
    intermediate_size=2048,
    initializer_range=0.044,
)
"""For throughput on a CPU: heavy enough that the decoder, not the engine, takes the time."""


def make_checkpoint(path: str | Path, spec: CheckpointSpec = TINY) -> Path:
    """Writes the checkpoint of `spec` to the folder `path`, unless it is there already.

    The folder appears whole or not at all, and a checkpoint of another spec is replaced.

    Returns:
        `path`, for `from_pretrained` and for `vllm serve`.

    Raises:
        ValueError: `path` holds something that is not a toy checkpoint.
    """
    path = Path(path)
    stamp = json.dumps({"recipe": RECIPE, **asdict(spec)}, indent=2) + "\n"
    if (path / SPEC_FILE).is_file():
        if (path / SPEC_FILE).read_text() == stamp:
            return path
        shutil.rmtree(path)
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not a toy checkpoint")
    unfinished = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        _write(unfinished, spec)
        (unfinished / SPEC_FILE).write_text(stamp)
        unfinished.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return path


def _write(path: Path, spec: CheckpointSpec) -> None:
    tokenizer = tok.make_tokenizer()
    model = _make_model(spec, make_config(spec, tokenizer))
    model.save_pretrained(path)
    make_processor(tokenizer).save_pretrained(path)


def make_processor(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLProcessor:
    """The processor of text, images and videos, with Qwen's chat template."""
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=pixels),
        tokenizer,
        # Unset, cap_pixels_per_frame warns on every call.
        Qwen2VLVideoProcessor(size=pixels, cap_pixels_per_frame=False),
        chat_template=tok.CHAT_TEMPLATE,
    )


def make_config(spec: CheckpointSpec, tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """The configuration of a Qwen2.5-VL of this shape, for the tokenizer's special tokens."""
    token_id = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "max_position_embeddings": spec.max_position_embeddings,
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


def _make_model(
    spec: CheckpointSpec, config: Qwen2_5_VLConfig
) -> Qwen2_5_VLForConditionalGeneration:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
        # Biases start at 0 and norms at 1, where a lost one would go unnoticed.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += spec.initializer_range * torch.randn_like(parameter)
    model.generation_config = GenerationConfig(
        eos_token_id=config.text_config.eos_token_id,
        pad_token_id=config.text_config.pad_token_id,
    )
    return model.to(getattr(torch, spec.dtype))
