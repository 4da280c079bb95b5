"""What a segment weighs when a budget is shared: its relevance, or the spectrum of its kernel."""

import torch
from torch import Tensor

from vllm_dpp.pruning.dpp.kernel import segment_kernels
from vllm_dpp.pruning.segments import PaddedSegments, Segments, padded_batches

BYTES_PER_ENTRY = 32
"""Held at most for each entry of a kernel: I + L, its factor, the inverse of that, and I."""


def relevance_mass(relevance: Tensor, segments: Segments) -> Tensor:
    """Sum of the relevance in each segment.

    Args:
        relevance: [N] float, >= 0.
        segments: S segments of the N tokens.

    Returns:
        [S] float64.
    """
    before = torch.nn.functional.pad(relevance.double().cumsum(0), (1, 0))
    return before[segments.offsets].diff()


def spectral_mass(
    features: Tensor,
    relevance: Tensor,
    segments: Segments,
    max_kernel_bytes: int,
    *,
    quartic: float = 0.0,
) -> Tensor:
    """Expected size of a set drawn from the DPP of each segment: Σ λ / (1 + λ) over its spectrum.

    The eigenvalues λ are those of the kernel L (Kulesza and Taskar 2012, arXiv 1207.6083,
    equation 15). Copies of one token count as one direction, of weight below 1, however many they
    are; so a still scene weighs little and a busy one much.

    Args:
        features: [N, D] float.
        relevance: [N] float32, >= 0.
        segments: S segments of the N tokens.
        max_kernel_bytes: bound on what is held of the kernels at once, unless one segment needs
            more.
        quartic: share of S⁴ in the similarity, see `kernel`.

    Returns:
        [S] float64, each in [0, length of the segment].
    """
    kernel_bytes = max_kernel_bytes * 4 // BYTES_PER_ENTRY
    masses = [
        _expected_size(_plus_identity(features, relevance, padded, quartic))
        for _, padded in padded_batches(segments, len(features), kernel_bytes)
    ]
    return torch.cat(masses)


def _plus_identity(
    features: Tensor, relevance: Tensor, padded: PaddedSegments, quartic: float
) -> Tensor:
    """[B, n, n] float64: I + L, with zeros for L on padding."""
    rows, dim = padded.rows(features), features.shape[1]
    kernel = segment_kernels(rows, padded.pad(relevance), dim, quartic)
    both = padded.valid.unsqueeze(1) & padded.valid.unsqueeze(2)
    wide = kernel.double().masked_fill_(~both, 0.0)
    wide.diagonal(dim1=1, dim2=2).add_(1.0)
    return wide


def _expected_size(plus_identity: Tensor) -> Tensor:
    """[B] trace of L (I + L)⁻¹ from I + L [B, n, n]: n less the trace of (I + L)⁻¹."""
    identity = torch.eye(
        plus_identity.shape[-1], dtype=plus_identity.dtype, device=plus_identity.device
    )
    # Its eigenvalues are at least 1: this cannot fail but by NaN, and need not be checked.
    factor, _ = torch.linalg.cholesky_ex(plus_identity)
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    lacking: Tensor = torch.linalg.vector_norm(inverse, dim=(1, 2)).square()
    return plus_identity.shape[-1] - lacking
