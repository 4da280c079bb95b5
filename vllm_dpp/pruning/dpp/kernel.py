"""The similarity of tokens, and the kernel conditioned on their relevance.

`S = X̂ X̂ᵀ` of the unit rows and `L = diag(r) S diag(r)`, the conditional DPP kernel of CDPruner
(arXiv 2506.10967). A share of S may be replaced by S⁴, elementwise, which is positive semidefinite
too (Schur) and of higher rank. All in float32, whatever the dtype of the features.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from vllm_dpp.pruning.rows import NORM_EPSILON, Rows, rows_of, rows_per_cast

_SMALLEST_BLOCK = 64  # rows of a block of products


def initial_gains(norm: Tensor, relevance: Tensor, quartic: float = 0.0) -> Tensor:
    """The diagonal of L, [..., n] float32, from the norms of the rows.

    Exactly r² but for rows near zero, so that tokens of equal relevance tie exactly, which
    products of rounded rows would not.
    """
    unit = norm / (norm + NORM_EPSILON)
    if quartic:
        unit = unit * (1 - quartic + quartic * unit**6).sqrt()
    return (relevance.float() * unit).square()


def similarity(features: Tensor) -> Tensor:
    """Cosine similarities S, [..., n, n] float32, of features [..., n, D]."""
    return conditioned_kernel(features, torch.ones_like(features[..., 0]))


def conditioned_kernel(features: Tensor, relevance: Tensor, quartic: float = 0.0) -> Tensor:
    """The kernel L = diag(r) S diag(r), [..., n, n] float32.

    The products are taken before the rows are scaled: their diagonal holds the squared norms,
    which saves two passes over the features. Norms up to 1e19 are safe.

    Args:
        features: [..., n, D] float.
        relevance: [..., n] float, >= 0.
        quartic: share of S⁴ in the similarity, in [0, 1).
    """
    *batch, length, dim = features.shape
    segments = features.flatten(0, -3) if batch else features.unsqueeze(0)
    relevance = relevance.reshape(segments.shape[:2])
    kernels = segment_kernels(rows_of(segments), relevance, dim, quartic)
    return kernels.view(*batch, length, length)


def segment_kernels(rows: Rows, relevance: Tensor, dim: int, quartic: float = 0.0) -> Tensor:
    """`conditioned_kernel` of S segments whose rows are read when they are needed.

    Args:
        rows: reads the features of the segments.
        relevance: [S, n] float, >= 0.
        dim: D.
        quartic: share of S⁴ in the similarity, in [0, 1).

    Returns:
        [S, n, n] float32.
    """
    num_segments, length = relevance.shape
    products = relevance.new_empty(num_segments, length, length, dtype=torch.float32)
    _multiply(rows, dim, out=products)
    norm = products.diagonal(dim1=-2, dim2=-1).sqrt()
    if quartic:
        _scale(products, 1 / (norm + NORM_EPSILON))
        for kernel in products:  # one by one: each needs as much again
            kernel.mul_(kernel.square().mul_(kernel).mul_(quartic).add_(1 - quartic))
        kernels = _scale(products, relevance.float())
    else:
        kernels = _scale(products, relevance.float() / (norm + NORM_EPSILON))
    kernels.diagonal(dim1=-2, dim2=-1).copy_(initial_gains(norm, relevance, quartic))
    return kernels


def _scale(kernels: Tensor, by: Tensor) -> Tensor:
    """diag(by) K diag(by), in place."""
    return kernels.mul_(by.unsqueeze(-1)).mul_(by.unsqueeze(-2))


def kernel_bytes(
    num_segments: int,
    length: int,
    num_rows: int,
    dim: int,
    device: torch.device,
    *,
    bytes_per_feature: int,
) -> int:
    """At least the bytes that `segment_kernels` holds at once, its result included.

    Args:
        num_segments: S.
        length: n, tokens of the longest.
        num_rows: tokens of all, padding included.
        dim: D.
        device: where they are.
        bytes_per_feature: what reading and casting a feature takes; 0 for a view of float32.
    """
    at_once = rows_per_cast(dim)
    size = _block_size(length, dim, device)
    cast = min(num_rows, max(at_once, 2 * _SMALLEST_BLOCK)) * dim
    block = min(size, length) * min(num_rows, max(at_once, size))
    vectors = 4 * num_segments * length
    return 4 * (num_segments * length**2 + block + vectors) + bytes_per_feature * cast


def _multiply(rows: Rows, dim: int, out: Tensor) -> None:
    """Write the products of the rows of each segment with one another to [S, n, n] `out`."""
    num_segments, length, _ = out.shape
    fits = rows_per_cast(dim) // max(1, length)
    size = _block_size(length, dim, out.device)
    num_parts = -(-num_segments // max(1, fits))
    for at in range(num_parts):  # of equal length, so that threads share each of them evenly
        part = slice(at * num_segments // num_parts, (at + 1) * num_segments // num_parts)
        read = partial(rows, part)
        if fits:
            read = partial(_at, read(slice(None)).float())
        _multiply_blocks(read, size, length if fits else size, out[part])


def _block_size(length: int, dim: int, device: torch.device) -> int:
    """Rows of a block of products.

    On a CPU, where products take the time, four blocks a side leave out three eighths of the
    work. A segment that is too long to be cast at once has blocks of which two can be.
    """
    size = max(_SMALLEST_BLOCK, -(-length // 4)) if device.type == "cpu" else length
    at_once = rows_per_cast(dim)
    return max(1, size) if length <= at_once else min(size, max(_SMALLEST_BLOCK, at_once // 2))


def _multiply_blocks(read: Callable[[slice], Tensor], size: int, wide: int, out: Tensor) -> None:
    """Form the blocks on and under the diagonal, `size` rows by `wide` columns; mirror them."""
    length = out.shape[1]
    for start in range(0, length, size):
        block = slice(start, min(start + size, length))
        left = read(block).float()
        for first in range(0, block.stop, wide):
            columns = slice(first, min(first + wide, block.stop))
            # Without a name, so that it goes before the next one comes.
            out[:, block, columns] = left @ (left if columns == block else read(columns).float()).mT
        out[:, :start, block] = out[:, block, :start].mT


def _at(segments: Tensor, places: slice) -> Tensor:
    return segments[:, places]
