"""LoRA adapters with random weights, and checkpoints into which they are merged."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 4, 8
STRENGTH = 0.2  # of an adapter's output against the layer's own, roughly
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_adapter(checkpoint: Path, folder: Path, seed: int) -> tuple[Path, Path]:
    """An adapter of every linear layer of the decoder, and the checkpoint with it merged.

    Args:
        checkpoint: Its base model, in one file.
        folder: Where both go.
        seed: Of its weights.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(checkpoint / "model.safetensors")
    merged, adapter = dict(weights), {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if not name.startswith("model.layers.") or not module.endswith(TARGETS):
            continue
        num_out, num_in = weight.shape
        down = torch.randn(RANK, num_in, generator=generator) * num_in**-0.5
        up = torch.randn(num_out, RANK, generator=generator) * weight.std() * num_in**0.5
        up *= STRENGTH / RANK**0.5 * RANK / ALPHA
        adapter[f"base_model.model.{module}.lora_A.weight"] = down
        adapter[f"base_model.model.{module}.lora_B.weight"] = up
        merged[name] = weight + ALPHA / RANK * up @ down
    made, whole = folder / f"adapter{seed}", folder / f"merged{seed}"
    made.mkdir()
    save_file(adapter, made / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS)}
    (made / "adapter_config.json").write_text(json.dumps(config))
    shutil.copytree(checkpoint, whole)
    save_file(merged, whole / "model.safetensors", {"format": "pt"})
    return made, whole
