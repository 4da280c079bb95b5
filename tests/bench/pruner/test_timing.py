"""Times and memory are those of the arms, in turns that rotate."""

import time
from collections import Counter
from dataclasses import replace

import pytest
import torch

from vllm_dpp.bench.pruner import timing
from vllm_dpp.bench.pruner.arms import ARMS, Arm

from .cases import SMALL, problem_of

CPU = torch.device("cpu")


def sleeping(seconds_per_segment2: float) -> Arm:
    """An arm whose time grows with the square of the number of segments."""

    def prepare(problem):
        return lambda: time.sleep(seconds_per_segment2 * problem.case.num_segments**2)

    return Arm("sleeps", prepare)


def test_every_round_starts_with_another_arm():
    turns: list[str] = []
    runs = {name: lambda: torch.zeros(1) for name in "abc"}
    seconds = timing.interleaved(runs, 4, CPU, turns.append)
    assert "".join(turns) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_fast_arms_are_repeated_within_a_turn():
    calls: Counter[str] = Counter()

    def run(name, seconds):
        def counted():
            calls[name] += 1
            time.sleep(seconds)

        return counted

    runs = {"fast": run("fast", 0.005), "slow": run("slow", timing.TURN_SECONDS)}
    seconds = timing.interleaved(runs, 2, CPU, lambda name: None)
    assert calls["slow"] == 1 + 2  # one to learn how long it takes
    assert calls["fast"] > 4
    assert 0.004 < min(seconds["fast"]) < min(seconds["slow"])


def test_too_slow_is_found_on_a_part():
    problem = problem_of(replace(SMALL, num_segments=16))
    assert timing.too_slow(sleeping(1e-4), problem, max_seconds=1) is None
    reason = timing.too_slow(sleeping(5e-3), problem, max_seconds=1)
    assert reason is not None  # 80 ms for 4 segments of 16
    assert "at N = 192, so up to 1." in reason and "at N = 768" in reason


def test_nothing_slow_is_started():
    started = []

    def prepare(problem):
        started.append(problem.case.num_segments)
        return lambda: time.sleep(0.02)

    problem = problem_of(replace(SMALL, num_segments=64, tokens_per_segment=8, kept_per_segment=2))
    assert timing.too_slow(Arm("slow", prepare), problem, max_seconds=0.1) is not None
    assert started == [1]


def test_one_segment_has_no_part():
    assert timing.too_slow(sleeping(0), problem_of(replace(SMALL, num_segments=1)), 1e-9) is None


@pytest.mark.parametrize(
    ("work", "floats"),
    [
        (lambda x: x + 1, 1000),
        (lambda x: (x + 1).mul_(2), 1000),
        (lambda x: (x + 1).view(10, 100)[3].t(), 1000),
        (lambda x: (x + 1) * 2, 2000),
        (lambda x: ((x + 1) * 2).mul(3), 2000),  # the first is gone when the third is made
        (lambda x: x.view(10, 100).t(), 0),
        (lambda x: x.mul_(2), 0),
        (lambda x: torch.mul(x, 2, out=torch.empty(1000)), 1000),
    ],
)
def test_live_memory(work, floats):
    ones = torch.ones(1000)
    _, peak = timing.with_peak_bytes(ARMS["torch"], lambda: work(ones), CPU)
    assert peak == 4 * floats


def test_memory_of_the_global_kernel_grows_with_the_square():
    peaks = {}
    for name in ("original", "per-segment", "gram"):
        for segments in (4, 8):
            problem = problem_of(replace(SMALL, num_segments=segments, dim=16))
            _, peak = timing.with_peak_bytes(ARMS[name], ARMS[name].prepare(problem), CPU)
            peaks[name, segments] = peak
    assert peaks["original", 8] > 3.5 * peaks["original", 4]
    assert peaks["per-segment", 8] < 1.5 * peaks["per-segment", 4]
    assert peaks["gram", 8] == 2 * peaks["gram", 4] == 8 * 48 * 48 * 4


@pytest.mark.parametrize("name", ["torch", "compiled"])
def test_memory_of_ours_is_bounded_by_the_setting(name):
    if reason := ARMS[name].missing(CPU):
        pytest.skip(reason)
    kernel_bytes = 4 * 48 * 48
    peaks = {}
    for segments in (32, 64):
        for at_once in (4, 1000):
            case = replace(SMALL, num_segments=segments, dim=16)
            problem = problem_of(case, max_kernel_bytes=at_once * kernel_bytes)
            _, peaks[segments, at_once] = timing.with_peak_bytes(
                ARMS[name], ARMS[name].prepare(problem), CPU
            )
    assert peaks[64, 1000] > 64 * kernel_bytes
    assert peaks[64, 1000] - peaks[32, 1000] > 32 * kernel_bytes
    assert peaks[64, 4] - peaks[32, 4] < 8 * kernel_bytes  # a few numbers a token
