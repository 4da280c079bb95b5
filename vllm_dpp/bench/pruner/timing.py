"""Times and memory of the arms of the pruner benchmark."""

import math
import time
import weakref
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from vllm_dpp.bench.pruner.arms import Arm, Run
from vllm_dpp.bench.pruner.problem import Problem

TURN_SECONDS = 0.1  # a turn repeats a fast arm for about as long, and counts the median call
MOST_CALLS = 50
PARTS = (64, 16, 4)  # `too_slow` tries this fraction of the segments, then the next larger one
TRIES = 2  # of each part; the faster counts, since other work on the machine only adds time


def too_slow(arm: Arm, problem: Problem, max_seconds: float) -> str | None:
    """Why an arm is not run on a whole video, found by running it on growing parts of it.

    Time is taken to grow with the square of the number of segments, as it does where one kernel
    spans the video. Nothing that is expected to take longer than `max_seconds` is started.
    """
    known: tuple[int, float] | None = None
    total = problem.case.num_segments
    for segments in (*(total // part for part in PARTS), total):
        if segments == 0:
            continue
        if known is not None:
            tried, seconds = known
            expected = seconds * (segments / tried) ** 2
            if expected > max_seconds:
                tokens = problem.case.tokens_per_segment
                return (
                    f"{seconds:.2g} s at N = {tried * tokens}, so up to {expected:.3g} s at "
                    f"N = {segments * tokens}: above --max-seconds {max_seconds:g}"
                )
        if segments < total:
            run = arm.prepare(problem.first(segments))
            run()  # may compile
            tries = [seconds_of_call(run, problem.features.device) for _ in range(TRIES)]
            known = segments, min(tries)
    return None


def interleaved(
    runs: Mapping[str, Run],
    repeats: int,
    device: torch.device,
    advance: Callable[[str], None],
) -> dict[str, list[float]]:
    """Seconds of a call of each arm in every round.

    Every round starts with another arm, so that none always follows the same one.

    Args:
        runs: what is timed, each warm.
        repeats: rounds.
        device: it is waited for before a clock is read.
        advance: told the arm after each turn.
    """
    calls = {name: _calls_of_turn(run, device) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for _ in range(repeats):
        for name in names:
            taken = [seconds_of_call(runs[name], device) for _ in range(calls[name])]
            seconds[name].append(median(taken))
            advance(name)
        names = names[1:] + names[:1]
    return seconds


def seconds_of_call(run: Run, device: torch.device) -> float:
    """Wall-clock seconds from the call to the end of its work on the device."""
    _wait_for(device)
    start = time.perf_counter()
    run()
    _wait_for(device)
    return time.perf_counter() - start


def with_peak_bytes(arm: Arm, run: Run, device: torch.device) -> tuple[Tensor, int | None]:
    """The result of a call, and the most memory that it held beyond what was there before.

    On CUDA that is PyTorch's own count. On a CPU it is the sum of the tensors alive, the result
    included; what an operator allocates and frees inside itself is not seen, and `None` stands
    where the calls are compiled away.
    """
    if device.type == "cuda":
        _wait_for(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        _wait_for(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    if arm.by_shape:
        return run(), None
    with LiveBytes() as live:
        result = run()
    return result, live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the memory of tensors made while it is active.

    `peak` is the largest sum of bytes that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            _address(value) for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and _address(value) not in given:
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, num_bytes: int) -> None:
        self._now -= num_bytes


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _calls_of_turn(run: Run, device: torch.device) -> int:
    seconds = seconds_of_call(run, device)
    return max(1, min(MOST_CALLS, math.ceil(TURN_SECONDS / seconds)))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
