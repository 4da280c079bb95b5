"""The similarity of tokens, and the kernel conditioned on their relevance.

`S = X̂ X̂ᵀ` of the unit rows and `L = diag(r) S diag(r)`, the conditional DPP kernel of CDPruner
(arXiv 2506.10967). All in float32, whatever the dtype of the features.
"""

import torch
from torch import Tensor

# A gain at or below this fraction of the largest initial gain of its segment is rounding: the
# tokens taken span the others. Past the rank of a kernel, float32 leaves up to 6e-7 of it where
# tokens repeat and 3e-6 where up to 1,024 are mixtures of 512.
RANK_TOLERANCE = 1e-5

NORM_EPSILON = 1e-8
_SMALLEST_BLOCK = 64  # rows of a block of products on a CPU


def unit_rows(features: Tensor) -> Tensor:
    """Rows scaled to length 1, [..., D] float32; a zero row stays zero."""
    rows = features.float()
    norm: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / (norm + NORM_EPSILON)


def initial_gains(norm: Tensor, relevance: Tensor) -> Tensor:
    """The diagonal of L, [..., n] float32, from the norms of the rows.

    Exactly r² but for rows near zero, so that tokens of equal relevance tie exactly, which
    products of rounded rows would not.
    """
    return (relevance.float() * (norm / (norm + NORM_EPSILON))).square()


def similarity(features: Tensor) -> Tensor:
    """Cosine similarities S, [..., n, n] float32, of features [..., n, D]."""
    return conditioned_kernel(features, torch.ones_like(features[..., 0]))


def conditioned_kernel(features: Tensor, relevance: Tensor) -> Tensor:
    """The kernel L = diag(r) S diag(r), [..., n, n] float32.

    The products are taken before the rows are scaled: their diagonal holds the squared norms,
    which saves two passes over the features. Norms up to 1e19 are safe.

    Args:
        features: [..., n, D] float.
        relevance: [..., n] float, >= 0.
    """
    products = _gram(features.float())
    norm = products.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = relevance.float() / (norm + NORM_EPSILON)
    kernel = products.mul_(scale.unsqueeze(-1)).mul_(scale.unsqueeze(-2))
    kernel.diagonal(dim1=-2, dim2=-1).copy_(initial_gains(norm, relevance))
    return kernel


def _gram(rows: Tensor) -> Tensor:
    """Products of rows [..., n, D] with one another, [..., n, n].

    On a CPU, where products take the time, only the blocks on and under the diagonal are formed:
    with four blocks a side, five eighths of the work.
    """
    length = rows.shape[-2]
    size = max(_SMALLEST_BLOCK, -(-length // 4))
    if rows.device.type != "cpu" or length <= size:
        return rows @ rows.mT
    products = rows.new_empty(*rows.shape[:-1], length)
    for start in range(0, length, size):
        block = slice(start, min(start + size, length))
        products[..., block, : block.stop] = rows[..., block, :] @ rows[..., : block.stop, :].mT
        products[..., :start, block] = products[..., block, :start].mT
    return products
