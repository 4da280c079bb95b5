"""A checkpoint whose decoder has four-bit weights, and the same with what these stand for."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

BITS, GROUP, MIDDLE = 4, 32, 8
WEIGHTS = "model.safetensors"
_PER_WORD = 32 // BITS


Format = Literal["gptq", "awq"]


def four_bit(source: Path, quantised: Path, rounded: Path, file_format: Format = "gptq") -> None:
    """Round the decoder's linear layers to four bits, by groups, symmetric.

    Args:
        source: A toy checkpoint in float32.
        quantised: Gets it in the format of files.
        rounded: Gets it in float32, with the weights that the other one stands for.
        file_format: Of both the same weights are made.
    """
    for folder in (quantised, rounded):
        shutil.copytree(source, folder, dirs_exist_ok=True)
    packed, plain = load_file(source / WEIGHTS), load_file(source / WEIGHTS)
    files = {"gptq": _gptq, "awq": _awq}[file_format]
    for name in [name for name in plain if _is_rounded(name)]:
        codes, scales = _codes(packed.pop(name).T)
        plain[name] = _meant(codes, scales).T.contiguous()
        module = name.removesuffix(".weight")
        packed |= {f"{module}.{key}": value for key, value in files(codes, scales).items()}
    save_file(packed, quantised / WEIGHTS)
    save_file(plain, rounded / WEIGHTS)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = _CONFIGS[file_format]
    (quantised / "config.json").write_text(json.dumps(config))


_CONFIGS: dict[Format, dict[str, Any]] = {
    "gptq": {
        "quant_method": "gptq",
        "bits": BITS,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "modules_in_block_to_quantize": None,
    },
    "awq": {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": GROUP,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["visual"],
    },
}


def _is_rounded(name: str) -> bool:
    return ".layers." in name and name.endswith("proj.weight")


def _codes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[in, out] int32 in [0, 16), and scales [in / GROUP, out] float16, of [in, out] float32."""
    groups = weight.unflatten(0, (-1, GROUP))
    scales = (groups.abs().amax(1) / (MIDDLE - 1)).half()
    codes = (groups / scales.float()[:, None]).round().clamp(-MIDDLE, MIDDLE - 1) + MIDDLE
    return codes.flatten(0, 1).int(), scales


def _meant(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[in, out] float32."""
    return (codes - MIDDLE).float() * scales.float().repeat_interleave(GROUP, 0)


def _gptq(codes: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a layer: GPTQ packs along the input, and stores zero points less one."""
    zeros = torch.full((len(scales), codes.shape[1]), MIDDLE - 1)
    return {
        "qweight": _packed(codes.T).T.contiguous(),
        "qzeros": _packed(zeros),
        "scales": scales,
        "g_idx": (torch.arange(len(codes)) // GROUP).int(),
    }


def _awq(codes: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a layer: AWQ packs along the output, the even ones of eight first."""
    zeros = torch.full((len(scales), codes.shape[1]), MIDDLE)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    qweight, qzeros = (
        _packed(values.unflatten(1, (-1, _PER_WORD))[..., order].flatten(1))
        for values in (codes, zeros)
    )
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales}


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """[m, n / 8] int32 of [m, n] codes, the first of eight in the lowest bits."""
    shifts = BITS * torch.arange(_PER_WORD, dtype=torch.int64)
    return _as_int32((codes.long().unflatten(1, (-1, _PER_WORD)) << shifts).sum(2))


def _as_int32(words: torch.Tensor) -> torch.Tensor:
    """The same 32 bits, signed."""
    return torch.where(words >= 2**31, words - 2**32, words).int().contiguous()
