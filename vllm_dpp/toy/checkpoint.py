"""Small checkpoints with random weights, complete enough to be served."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from vllm_dpp.toy import (
    glm4v,
    glm4v_moe,
    internvl,
    llava_onevision,
    minicpmv4_6,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_5_moe,
    qwen3_omni_moe,
    qwen3_vl,
    qwen3_vl_moe,
)
from vllm_dpp.toy import tokenizer as tok
from vllm_dpp.toy.spec import TINY, Architecture, CheckpointSpec

_ARCHITECTURES: dict[Architecture, Any] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "qwen3_5": qwen3_5,
    "qwen3_5_moe": qwen3_5_moe,
    "qwen3_omni_moe": qwen3_omni_moe,
    "internvl": internvl,
    "glm4v": glm4v,
    "glm4v_moe": glm4v_moe,
    "llava_onevision": llava_onevision,
    "minicpmv4_6": minicpmv4_6,
}
"""One module each, with `MODEL`, `make_config` and `make_processor`; with `make_tokenizer` where it
is not Qwen's; and with `released` where files do not hold the weights as transformers does."""

SPEC_FILE = "toy_checkpoint.json"
RECIPE = 1  # raise it when a checkpoint of the same spec comes out differently


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
    architecture = _ARCHITECTURES[spec.architecture]
    tokenizer = getattr(architecture, "make_tokenizer", tok.make_tokenizer)()
    model = _make_model(spec, architecture.MODEL, architecture.make_config(spec, tokenizer))
    if released := getattr(architecture, "released", None):
        model.save_pretrained(
            path, state_dict=released(model.state_dict()), save_original_format=False
        )
    else:
        model.save_pretrained(path)
    architecture.make_processor(tokenizer).save_pretrained(path)


def _make_model(
    spec: CheckpointSpec, of_class: Callable[..., Any], config: PreTrainedConfig
) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model: Any = of_class(config)
        # Biases start at 0 and norms at 1, where a lost one would go unnoticed.
        for weight in model.state_dict().values():  # not all of them are parameters
            if weight.ndim == 1:
                weight += spec.initializer_range * torch.randn_like(weight)
    decoder = config.get_text_config()
    model.generation_config = GenerationConfig(
        eos_token_id=decoder.eos_token_id, pad_token_id=decoder.pad_token_id
    )
    return model.to(getattr(torch, spec.dtype))
