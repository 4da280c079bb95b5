"""The original's benchmark, by its own name."""

import subprocess
import sys
from pathlib import Path

import pytest

from vllm_dpp.bench.pruner.one_number import benchmark_dpp_pruning


def test_as_a_call() -> None:
    result, milliseconds = benchmark_dpp_pruning(2, 24, 16, 3, 8, 2, "cpu", 2)
    assert [kept.shape for kept in result] == [(6,), (6,)] and milliseconds > 0
    with pytest.raises(ValueError, match="num_tokens must be .* = 24, got 25"):
        benchmark_dpp_pruning(2, 25, 16, 3, 8, 2, "cpu", 2)
    with pytest.raises(ValueError, match="num_iterations must be an integer >= 1, got 0"):
        benchmark_dpp_pruning(2, 24, 16, 3, 8, 2, "cpu", 0)


def test_as_a_command() -> None:
    flags = ["--num-tokens=16", "--hidden-dim=8", "--num-segments=2", "--tokens-per-segment=8"]
    done = subprocess.run(
        [sys.executable, "-m", "vllm_dpp.bench.pruner.one_number", *flags, "--topk-per-segment=3"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "6 of 16 tokens kept" in done.stdout
