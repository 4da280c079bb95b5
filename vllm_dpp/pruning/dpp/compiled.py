"""The greedy loop of `greedy_map`, compiled for the CPU and run on several segments at once.

A step of the loop is a handful of passes over short rows, which costs PyTorch more to dispatch
than to compute. Numba compiles the same recurrence to machine code that holds no lock, so plain
threads run it; numba's own threads would not survive a fork. Where numba is not installed, or has
nowhere to keep machine code, the caller stays with PyTorch and a warning says so.
"""

import functools
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from vllm_dpp.pruning.dpp.greedy_map import Selection, fill_up
from vllm_dpp.pruning.dpp.objective import PLAIN, Objective

logger = logging.getLogger(__name__)

# Multiplications worth a thread of their own: about a millisecond.
_PER_THREAD = 1 << 22


def is_available(device: torch.device) -> bool:
    """Whether `greedy_map_compiled` can take tensors of this device."""
    return device.type == "cpu" and _compiled_loop() is not None


def greedy_map_compiled(
    kernel: Tensor, relevance: Tensor, budgets: Tensor, objective: Objective = PLAIN
) -> Selection:
    """Select in segments of equal length from their kernels.

    Args:
        kernel: [S, n, n] float32 on the CPU.
        relevance: [S, n] float32, >= 0.
        budgets: [S] int64 tokens to keep, each in [0, n].
        objective: when a segment stops, and what fills it up.

    Returns:
        `keep` [S, n] with exactly `budgets` per segment, and the greedy steps.
    """
    num_segments, length, _ = kernel.shape
    max_budget = int(budgets.max()) if num_segments else 0
    marginal_gain = kernel.diagonal(dim1=1, dim2=2).contiguous()
    # NaN is no number to compare with, so that nothing is taken by its gain.
    least = objective.least_gain
    threshold = least * marginal_gain.amax(dim=1) if length else budgets.float()
    keep = kernel.new_zeros(num_segments, length, dtype=torch.bool)
    order = kernel.new_full((num_segments, max_budget), -1, dtype=torch.int64)
    gains = kernel.new_zeros(num_segments, max_budget)
    arrays = [kernel.contiguous(), marginal_gain, threshold, budgets, keep, order, gains]
    _run(num_segments, length * max_budget**2, [array.detach().numpy() for array in arrays])
    if bool((keep.sum(dim=1) < budgets).any()):
        every = torch.ones_like(keep)
        keep = fill_up(keep, relevance, every, budgets, objective.rest_in_order)
    return Selection(keep, order, gains)


def _run(num_segments: int, work: int, arrays: list[Any]) -> None:
    """Run the loop on all segments, in as many threads as PyTorch has where that pays."""
    loop = _compiled_loop()
    assert loop is not None, "ask is_available first"
    num_threads = min(torch.get_num_threads(), num_segments, num_segments * work // _PER_THREAD)
    if num_threads < 2:
        loop(*arrays)
        return
    cuts = [part * num_segments // num_threads for part in range(num_threads + 1)]
    parts = [slice(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    list(_threads(num_threads).map(lambda part: loop(*(array[part] for array in arrays)), parts))


@functools.cache
def _threads(num_threads: int) -> ThreadPoolExecutor:
    """Threads that may use every CPU that the threads of this process are bound to.

    A thread inherits the CPU of its creator, and OpenMP binds each of its threads to one.
    """
    if not hasattr(os, "sched_setaffinity"):
        return ThreadPoolExecutor(num_threads, "greedy-map")
    cpus = set().union(*(_cpus(int(thread)) for thread in os.listdir("/proc/self/task")))
    return ThreadPoolExecutor(num_threads, "greedy-map", os.sched_setaffinity, (0, cpus))


def _cpus(thread: int) -> set[int]:
    try:
        return os.sched_getaffinity(thread)
    except ProcessLookupError:  # it has ended meanwhile
        return set()


if hasattr(os, "register_at_fork"):  # threads stay behind in the parent
    os.register_at_fork(after_in_child=_threads.cache_clear)


@functools.cache
def _compiled_loop() -> Callable[..., None] | None:
    """The loop, made machine code at its first call; `None`, with a warning, where it cannot be."""
    try:
        from vllm_dpp.pruning.dpp.compiled_loop import greedy_map_loop
    except ImportError as error:
        _warn_of_pytorch(error, "install numba")
        return None
    except RuntimeError as error:  # numba's, where it can write to none of the folders it knows
        _warn_of_pytorch(error, "set NUMBA_CACHE_DIR to a folder that can be written to")
        return None
    _make_llvmlite_scannable()
    loop: Callable[..., None] = greedy_map_loop
    return loop


def _warn_of_pytorch(error: Exception, remedy: str) -> None:
    logger.warning(
        "the compiled loop of the pruner is switched off, and PyTorch selects on this CPU, which "
        "takes longer: %s (%s). To switch it on, %s.",
        error,
        type(error).__name__,
        remedy,
    )


def _make_llvmlite_scannable() -> None:
    """Let code that walks over all loaded modules pass by llvmlite.

    Its proxy of the LLVM library answers any name, `__dict__` too, with a foreign function, at
    which vLLM's CPU worker stumbles when it starts (patches/llvmlite-proxy.md).
    """
    from llvmlite.binding import ffi

    proxy = type(ffi.lib)
    look_up = proxy.__getattr__
    if hasattr(ffi.lib, "__dict__"):

        def look_up_library(self: object, name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            return look_up(self, name)

        proxy.__getattr__ = look_up_library
