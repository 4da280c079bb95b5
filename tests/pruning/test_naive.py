"""The judge is judged by exhaustive search over determinants."""

import pytest
import torch

from vllm_dpp.pruning import naive_greedy_map
from vllm_dpp.pruning.naive import naive_shares

from .helpers import gains_along, log_det, reference_kernel


def random_kernel(seed, n, dim):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, dim, generator=generator)
    return reference_kernel(features, 0.1 + torch.rand(n, generator=generator))


@pytest.mark.parametrize("n", [1, 2, 5, 10])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_step_is_the_exhaustive_argmax_of_the_determinant(n, seed):
    kernel = random_kernel(seed, n, dim=n + 4)
    order = naive_greedy_map(kernel, n, [0.0] * n)
    for step, token in enumerate(order):
        determinants = {
            i: float(torch.linalg.det(kernel[order[:step] + [i]][:, order[:step] + [i]]))
            for i in range(n)
            if i not in order[:step]
        }
        assert token == max(determinants, key=determinants.__getitem__)


def test_gains_multiply_to_the_determinant():
    kernel = random_kernel(3, 20, 30)
    order = naive_greedy_map(kernel, 12, [0.0] * 20)
    gains = torch.tensor([pair[0] for pair in gains_along(kernel, order)], dtype=torch.float64)
    assert float(gains.log().sum()) == pytest.approx(log_det(kernel, order), abs=1e-9)


def test_the_rest_is_filled_by_relevance_with_ties_to_the_lowest():
    kernel = torch.ones(6, 6)  # rank 1
    assert naive_greedy_map(kernel, 4, [0.0, 1.0, 3.0, 1.0, 3.0, 1.0]) == [0, 2, 4, 1]
    assert naive_greedy_map(torch.zeros(3, 3), 3, [1.0, 1.0, 2.0]) == [2, 0, 1]


def test_nothing_asked():
    assert naive_greedy_map(torch.eye(3), 0, [1.0] * 3) == []
    assert naive_greedy_map(torch.zeros(0, 0), 0, []) == []


@pytest.mark.parametrize(
    ("shape", "k", "message"),
    [
        ((3, 2), 1, r"kernel must be \[n, n\], got shape \[3, 2\]"),
        ((3,), 1, r"got shape \[3\]"),
        ((3, 3), 4, r"k must be in \[0, 3\], got 4"),
        ((3, 3), -1, r"k must be in \[0, 3\], got -1"),
    ],
)
def test_errors(shape, k, message):
    with pytest.raises(ValueError, match=message):
        naive_greedy_map(torch.ones(shape), k, [1.0] * 3)


def test_shares_by_hand():
    assert naive_shares(9, [100.0, 1.0, 1.0], [3, 10, 10]) == [3, 3, 3]
    assert naive_shares(8, [1.0, 0.0, 0.0], [2, 8, 4]) == [2, 4, 2]
