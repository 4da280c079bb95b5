"""Tensor-parallel ranks choose alike."""

import torch
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group


def agree(indices: torch.Tensor) -> torch.Tensor:
    """The first rank's choice, so that rounding cannot make tensor-parallel ranks differ."""
    if get_tensor_model_parallel_world_size() == 1:
        return indices
    return get_tp_group().broadcast(indices.contiguous(), src=0)
