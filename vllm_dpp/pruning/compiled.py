"""The greedy loop of `greedy_map`, compiled for the CPU.

One step of the loop is a handful of passes over short rows, which costs PyTorch more to dispatch
than to compute. Numba compiles the same recurrence to machine code; where it is not installed, the
caller stays with PyTorch.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_dpp.pruning.kernel import RANK_TOLERANCE


def is_available(kernel: Tensor) -> bool:
    """Whether `greedy_keep` can take this tensor."""
    return kernel.device.type == "cpu" and _compiled_loop() is not None


def greedy_keep(kernel: Tensor, valid: Tensor, budgets: Tensor) -> Tensor:
    """Select in padded segments until the budget or the rank is used up.

    Args:
        kernel: [S, n, n] float32 on the CPU.
        valid: [S, n] bool, False on padding.
        budgets: [S] int64.

    Returns:
        [S, n] bool, True on at most `budgets` tokens of each segment.
    """
    loop = _compiled_loop()
    if loop is None:
        raise ValueError("greedy_keep needs numba: ask is_available first")
    keep = torch.zeros_like(valid)
    initial_gain = kernel.diagonal(dim1=1, dim2=2).masked_fill(~valid, -torch.inf)
    factor = kernel.new_empty(max(int(budgets.max()), 1), kernel.shape[1])
    loop(
        kernel.contiguous().numpy(),
        initial_gain.numpy(),
        (RANK_TOLERANCE * initial_gain.amax(dim=1)).numpy(),
        budgets.numpy(),
        factor.numpy(),
        keep.numpy(),
    )
    return keep


@functools.cache
def _compiled_loop() -> Callable[..., None] | None:
    """The loop in machine code, made at its first use; `None` without numba."""
    try:
        import numba
    except ImportError:  # numba comes with vLLM; the pruner alone does not need it
        return None
    loop: Callable[..., None] = numba.njit(cache=True, nogil=True)(_keep_all)
    return loop


def _keep_all(
    kernel: Any, gains: Any, thresholds: Any, budgets: Any, factor: Any, keep: Any
) -> None:
    """Fill `keep` [S, n] and use up `gains` [S, n], the initial gains.

    `factor` [largest budget, n] holds the Cholesky rows of one segment at a time.
    """
    length = kernel.shape[1]
    for segment in range(kernel.shape[0]):
        gain = gains[segment]
        for step in range(budgets[segment]):
            token = gain.argmax()  # the lowest index of the largest
            if not gain[token] > thresholds[segment]:
                break
            row = factor[step]
            row[:] = kernel[segment, token]
            for earlier in range(step):
                weight = factor[earlier, token]
                for i in range(length):
                    row[i] -= weight * factor[earlier, i]
            scale = 1 / gain[token] ** 0.5
            for i in range(length):
                row[i] *= scale
                gain[i] -= row[i] * row[i]
            gain[token] = -float("inf")
            keep[segment, token] = True
