"""Features of fewer dimensions, whose Gram matrices cost less: the low-rank path.

A Gaussian projection keeps the cosine of two rows to within about 1 / sqrt(dim) (Johnson and
Lindenstrauss 1984). Kernels have at most that rank: beyond `dim` tokens of a segment the greedy
loop falls back on relevance. So it approximates, and is off unless asked for.
"""

import functools

import torch
from torch import Tensor

from vllm_dpp.pruning.checks import require_integer
from vllm_dpp.pruning.rows import rows_per_cast


def project(features: Tensor, dim: int) -> Tensor:
    """Project rows to `dim` dimensions by one fixed Gaussian matrix.

    The matrix depends on the two widths alone, so that every video, batch and rank uses the same.

    Args:
        features: [N, D] float.
        dim: dimensions wanted, >= 1.

    Returns:
        [N, dim] float32; `features` as they are where D <= dim.

    Raises:
        ValueError: `dim` is below 1.
    """
    require_integer("dim", dim, minimum=1)
    if features.shape[1] <= dim:
        return features
    matrix = _matrix(features.shape[1], dim, features.device)
    projected = features.new_empty(len(features), dim, dtype=torch.float32)
    at_once = rows_per_cast(features.shape[1])
    for first in range(0, len(features), at_once):
        rows = slice(first, first + at_once)
        projected[rows] = features[rows].float() @ matrix
    return projected


@functools.lru_cache(maxsize=4)
def _matrix(from_dim: int, to_dim: int, device: torch.device) -> Tensor:
    """[from_dim, to_dim] float32, independent normal entries of variance 1 / to_dim."""
    generator = torch.Generator("cpu").manual_seed(0)
    matrix: Tensor = torch.randn(
        from_dim, to_dim, generator=generator, dtype=torch.float32, device="cpu"
    )
    matrix = matrix / to_dim**0.5
    return matrix.to(device)
