"""A drafter of one layer with random weights, as EAGLE-3 has it: it reads the target's states."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_dpp.toy.spec import CheckpointSpec


def make_drafter(folder: Path, spec: CheckpointSpec, vocab_size: int) -> Path:
    """Write one for a target.

    Args:
        folder: Gets it.
        spec: Of the target.
        vocab_size: Of the target.
    """
    folder.mkdir(parents=True)
    width, head = spec.hidden_size, spec.hidden_size // spec.num_heads
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": head,
        "vocab_size": vocab_size,
        "draft_vocab_size": vocab_size,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "torch_dtype": "float32",
        "eagle_aux_hidden_state_layer_ids": [1, 3, 5],
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {
        "fc.weight": (width, 3 * width),
        "norm.weight": (width,),
        "lm_head.weight": (vocab_size, width),
        **{
            f"midlayer.{name}.weight": shape
            for name, shape in {
                "hidden_norm": (width,),
                "input_layernorm": (width,),
                "post_attention_layernorm": (width,),
                "self_attn.q_proj": (spec.num_heads * head, 2 * width),
                "self_attn.k_proj": (spec.num_kv_heads * head, 2 * width),
                "self_attn.v_proj": (spec.num_kv_heads * head, 2 * width),
                "self_attn.o_proj": (width, spec.num_heads * head),
                "mlp.gate_proj": (spec.intermediate_size, width),
                "mlp.up_proj": (spec.intermediate_size, width),
                "mlp.down_proj": (width, spec.intermediate_size),
            }.items()
        },
    }
    rng = torch.Generator().manual_seed(0)
    save_file(
        {name: _weights(shape, rng) for name, shape in shapes.items()}, folder / "model.safetensors"
    )
    return folder


def _weights(shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    """Of a norm ones, else such that a layer neither drowns its input nor drowns in it."""
    if len(shape) == 1:
        return torch.ones(shape)
    return torch.randn(shape, generator=rng) * shape[1] ** -0.5
