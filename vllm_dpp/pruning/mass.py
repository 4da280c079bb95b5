"""What a segment weighs when a budget is shared: its relevance, or the spectrum of its kernel."""

import torch
from torch import Tensor

from vllm_dpp.pruning.kernel import conditioned_kernel
from vllm_dpp.pruning.segments import Segments, padded_batches


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
    features: Tensor, relevance: Tensor, segments: Segments, max_kernel_bytes: int
) -> Tensor:
    """Expected size of a set drawn from the DPP of each segment: Σ λ / (1 + λ) over its spectrum.

    The eigenvalues λ are those of the kernel L (Kulesza and Taskar 2012, arXiv 1207.6083,
    equation 15). Copies of one token count as one direction, of weight below 1, however many they
    are; so a still scene weighs little and a busy one much.

    Args:
        features: [N, D] float.
        relevance: [N] float32, >= 0.
        segments: S segments of the N tokens.
        max_kernel_bytes: bound on the float32 kernels of a batch; here they take twice that.

    Returns:
        [S] float64, each in [0, length of the segment].
    """
    masses = []
    for _, padded in padded_batches(segments, len(features), max_kernel_bytes):
        kernel = conditioned_kernel(padded.pad(features), padded.pad(relevance))
        both = padded.valid.unsqueeze(1) & padded.valid.unsqueeze(2)
        masses.append(_expected_size(kernel.double().where(both, 0.0)))
    return torch.cat(masses)


def _expected_size(kernel: Tensor) -> Tensor:
    """[B] trace of L (I + L)⁻¹ for kernels [B, n, n]: n less the trace of (I + L)⁻¹."""
    identity = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    # Its eigenvalues are at least 1: this cannot fail but by NaN, and need not be checked.
    factor, _ = torch.linalg.cholesky_ex(kernel + identity)
    inverse = torch.linalg.solve_triangular(factor, identity.expand_as(kernel), upper=False)
    lacking: Tensor = inverse.square().sum(dim=(1, 2))
    return kernel.shape[-1] - lacking
