"""Rows of features: read where they lie, a few segments at a time, and scaled to length 1.

Features of any dtype are cast to float32 in parts, so that a video is never held twice.
"""

from collections.abc import Callable

import torch
from torch import Tensor

NORM_EPSILON = 1e-8
# Features held in float32 at once: enough for products that are worth a launch, little beside a
# model. One bound for all dtypes, so that a dtype changes no shape and with it no rounding.
_MAX_CAST_BYTES = 1 << 25

Rows = Callable[[slice, slice], Tensor]
"""From some of S segments and some places in them to [s, m, D] float of any dtype."""


def unit_rows(features: Tensor) -> Tensor:
    """Rows scaled to length 1, [..., D] float32; a zero row stays zero."""
    rows = features.float()
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / (norm + NORM_EPSILON)


def joined_rows(
    first: Tensor, second: Tensor, share: float, rows: slice | Tensor = slice(None)
) -> Tensor:
    """Two kinds of features of the same tokens as one, whose similarity is (1 - f) S₁ + f S₂.

    Args:
        first: [M, D₁] float.
        second: [M, D₂] of the same dtype, on the same device.
        share: f, in [0, 1].
        rows: which N of the M are wanted; as a tensor [N] int64.

    Returns:
        [N, D₁ + D₂] of their dtype; beside it no copy of all of them is made.
    """
    if isinstance(rows, slice):
        first, second = first[rows], second[rows]
    width, number = first.shape[1], len(first if isinstance(rows, slice) else rows)
    joined = first.new_empty(number, width + second.shape[1])
    at_once = rows_per_cast(joined.shape[1])
    for start in range(0, number, at_once):
        part = slice(start, start + at_once)
        wanted = part if isinstance(rows, slice) else rows[part]
        joined[part, :width] = unit_rows(first[wanted]) * (1 - share) ** 0.5
        joined[part, width:] = unit_rows(second[wanted]) * share**0.5
    return joined


def rows_of(segments: Tensor) -> Rows:
    """The rows of segments that lie side by side, [S, n, D]."""
    return lambda part, places: segments[part, places]


def rows_per_cast(dim: int) -> int:
    """Rows of D features that may be held in float32 at once, at least 1."""
    return max(1, _MAX_CAST_BYTES // (4 * max(1, dim)))
