"""The compiled loop against the PyTorch loop and the float64 reference."""

import subprocess
import sys

import pytest
import torch

from vllm_dpp.pruning import compiled, naive
from vllm_dpp.pruning.greedy_map import greedy_keep, greedy_map
from vllm_dpp.pruning.kernel import conditioned_kernel


def ragged(seed: int, lengths: list[int], dim: int):
    """Padded features, relevance and the mask of what is not padding."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    features = torch.randn(len(lengths), longest, dim, generator=generator)
    relevance = 0.1 + 0.9 * torch.rand(len(lengths), longest, generator=generator)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return features, relevance, valid


@pytest.mark.parametrize(
    ("lengths", "budgets", "dim"),
    [
        ([63], [20], 96),
        ([1], [1], 8),
        ([40, 7, 23], [11, 0, 23], 64),
        ([130, 130], [60, 31], 256),
        ([30, 30], [25, 25], 8),  # more than the rank: the rest is filled by relevance
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_same_choice_as_the_other_paths(seed, lengths, budgets, dim):
    features, relevance, valid = ragged(seed, lengths, dim)
    counts = torch.tensor(budgets)
    keep = greedy_keep(features, relevance, valid, counts, max(budgets))
    assert torch.equal(keep, greedy_map(features, relevance, valid, counts, max(budgets)).keep)
    assert keep.sum(dim=1).tolist() == budgets
    for i, (length, budget) in enumerate(zip(lengths, budgets, strict=True)):
        kernel = conditioned_kernel(
            features[i, :length].double().float(), relevance[i, :length]
        ).double()
        order = naive.naive_greedy_map(kernel, budget, relevance[i, :length].tolist())
        assert keep[i].nonzero().flatten().tolist() == sorted(order)


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan"), float("inf")])
def test_degenerate_features_still_give_the_exact_count(value):
    features = torch.full((2, 9, 4), value)
    valid = torch.ones(2, 9, dtype=torch.bool)
    keep = greedy_keep(features, torch.ones(2, 9), valid, torch.tensor([4, 9]), 9)
    assert keep.sum(dim=1).tolist() == [4, 9]


def test_it_is_for_the_cpu_alone():
    assert compiled.is_available(torch.zeros(1))
    assert not compiled.is_available(torch.zeros(1, device="meta"))


def test_without_numba_pytorch_takes_over():
    program = """
import sys
sys.modules["numba"] = None
import torch
from vllm_dpp.pruning import PruningConfig, VideoTokens, compiled, keep_indices
assert not compiled.is_available(torch.zeros(1))
video = VideoTokens(torch.randn(24, 16), None, 7, 2)
assert keep_indices([video], PruningConfig())[0].shape == (7,)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
