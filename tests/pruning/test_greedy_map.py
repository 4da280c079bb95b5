"""The loops in PyTorch and in machine code against the float64 reference, segment by segment."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dpp.pruning import naive_greedy_map
from vllm_dpp.pruning.dpp.compiled import greedy_map_compiled
from vllm_dpp.pruning.dpp.greedy_map import greedy_map
from vllm_dpp.pruning.dpp.kernel import conditioned_kernel, segment_kernels
from vllm_dpp.pruning.segments import Segments, padded_batches

from .helpers import NEAR_TIE, gains_along, log_det, reference_kernel

KINDS = ["random", "low_rank", "repeated", "equal", "zero", "some_zero", "correlated"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATHS = ["torch", "compiled"]


def make_features(kind, n, dim, generator):
    features = torch.randn(n, dim, generator=generator)
    if kind == "low_rank":
        basis = torch.randn(max(1, dim // 8), dim, generator=generator)
        features = torch.randn(n, len(basis), generator=generator) @ basis
    elif kind == "repeated":
        features = features[torch.randint(0, max(1, n // 4), (n,), generator=generator)]
    elif kind == "equal":
        features = features[:1].expand(n, dim)
    elif kind == "zero":
        features = torch.zeros(n, dim)
    elif kind == "some_zero":
        features = features * (torch.arange(n) % 3 > 0)[:, None]
    elif kind == "correlated":
        features = features + 3
    return features


def select(path, features, relevance, offsets, budgets, max_budget=None):
    """Per segment: the kept tokens, the greedy order and its gains, all relative to the segment."""
    if path == "compiled":
        spans = [slice(start, end) for start, end in pairwise(offsets)]
        selections = [
            greedy_map_compiled(
                conditioned_kernel(features[None, span], relevance[None, span]),
                relevance[None, span],
                torch.tensor([budget]),
            )
            for span, budget in zip(spans, budgets, strict=True)
        ]
        return [_steps(s.keep[0], s.order[0], s.gains[0]) for s in selections]
    segments = Segments.between(offsets, features.device)
    [(_, padded)] = padded_batches(segments, len(features), 1 << 28)
    steps = max(budgets) if max_budget is None else max_budget
    weights = padded.pad(relevance)
    kernel = segment_kernels(padded.rows(features), weights, features.shape[1])
    selection = greedy_map(kernel, weights, padded.valid, torch.tensor(budgets), steps)
    keep = [row[ok] for row, ok in zip(selection.keep, padded.valid, strict=True)]
    return [_steps(*s) for s in zip(keep, selection.order, selection.gains, strict=True)]


def _steps(keep, order, gains):
    taken = order >= 0
    return keep.nonzero().flatten().tolist(), order[taken].tolist(), gains[taken]


def check_segment(features, relevance, budget, result):
    """One segment of a selection against its invariants and the reference."""
    keep, order, gains = result
    kernel = reference_kernel(features, relevance)
    largest = float(kernel.diagonal().max())
    assert len(keep) == budget
    assert len(set(order)) == len(order) <= budget
    assert set(order) <= set(keep)
    assert (gains[1:] <= gains[:-1] * (1 + 1e-6)).all()
    # Every step took the best token, up to what float32 cannot tell apart.
    for (gain, best), reported in zip(gains_along(kernel, order), gains.tolist(), strict=True):
        assert best - gain <= NEAR_TIE * largest
        assert abs(reported - gain) <= NEAR_TIE * largest
    # What was not taken was chosen by relevance.
    filled = [i for i in keep if i not in order]
    left_out = [i for i in range(len(features)) if i not in keep]
    if filled and left_out:
        worst_filled = max((-float(relevance[i]), i) for i in filled)
        assert worst_filled < min((-float(relevance[i]), i) for i in left_out)
    expected = naive_greedy_map(kernel, budget, relevance.tolist())
    if sorted(expected) != keep:
        reference = expected[: len(order)]
        assert log_det(kernel, order) == pytest.approx(log_det(kernel, reference), abs=1e-4)


def check_all(path, features, relevance, offsets, budgets):
    results = select(path, features, relevance, offsets, budgets)
    for s, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        check_segment(features[start:end], relevance[start:end], budgets[s], results[s])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_segments_against_the_reference(path, dtype, kind):
    generator = torch.Generator().manual_seed(0)
    offsets = [0, 1, 64, 80, 81, 94]  # segments of 1, 63, 16, 1 and 13 tokens
    features = make_features(kind, 94, 80, generator).to(dtype)
    relevance = 0.1 + 0.9 * torch.rand(94, generator=generator)
    for budgets in ([1, 20, 0, 0, 11], [0, 63, 16, 1, 1]):
        check_all(path, features, relevance, offsets, budgets)


@st.composite
def ragged_inputs(draw):
    lengths = draw(st.lists(st.integers(1, 14), min_size=1, max_size=5))
    budgets = [draw(st.integers(0, length)) for length in lengths]
    kind, seed = draw(st.sampled_from(KINDS)), draw(st.integers(0, 1000))
    return lengths, budgets, kind, draw(st.sampled_from([3, 16, 40])), seed


@pytest.mark.parametrize("path", PATHS)
@settings(deadline=None, max_examples=60)
@given(case=ragged_inputs())
def test_random_shapes_against_the_reference(path, case):
    lengths, budgets, kind, dim, seed = case
    generator = torch.Generator().manual_seed(seed)
    features = make_features(kind, sum(lengths), dim, generator)
    relevance = torch.rand(sum(lengths), generator=generator)
    offsets = [sum(lengths[:s]) for s in range(len(lengths) + 1)]
    check_all(path, features, relevance, offsets, budgets)


@pytest.mark.parametrize("path", PATHS)
def test_indices_equal_the_reference_where_no_tie_is_near(path):
    generator = torch.Generator().manual_seed(4)
    offsets = [0, 40, 63, 126]
    features = torch.randn(126, 200, generator=generator)
    relevance = 0.1 + 0.9 * torch.rand(126, generator=generator)
    budgets = [13, 23, 30]
    results = select(path, features, relevance, offsets, budgets)
    for s, (_, order, _) in enumerate(results):
        span = slice(offsets[s], offsets[s + 1])
        kernel = reference_kernel(features[span], relevance[span])
        assert order == naive_greedy_map(kernel, budgets[s], relevance[span].tolist())


@pytest.mark.parametrize("path", PATHS)
def test_tokens_of_equal_relevance_tie_at_first(path):
    """The first choice must not hang on how the norms were rounded."""
    features = torch.randn(63, 200, generator=torch.Generator().manual_seed(9)) * 7
    [(_, order, _)] = select(path, features, torch.ones(63), [0, 63], [20])
    assert order[0] == 0
    assert order == naive_greedy_map(reference_kernel(features, torch.ones(63)), 20, [1.0] * 63)


@pytest.mark.parametrize("path", PATHS)
def test_log_gains_sum_to_the_log_determinant(path):
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(50, 90, generator=generator)
    relevance = 0.1 + torch.rand(50, generator=generator)
    [(_, order, gains)] = select(path, features, relevance, [0, 50], [25])
    kernel = reference_kernel(features, relevance)
    assert float(gains.double().log().sum()) == pytest.approx(log_det(kernel, order), abs=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_each_step_is_the_exhaustive_argmax_of_the_determinant(seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(10, 16, generator=generator)
    relevance = 0.1 + torch.rand(10, generator=generator)
    kernel = reference_kernel(features, relevance)
    for path in PATHS:
        [(_, order, _)] = select(path, features, relevance, [0, 10], [10])
        for step, token in enumerate(order):
            options = [i for i in range(10) if i not in order[:step]]
            values = [log_det(kernel, order[:step] + [i]) for i in options]
            assert token == options[values.index(max(values))]


@pytest.mark.parametrize("path", PATHS)
def test_ties_go_to_the_lowest_index(path):
    [(keep, order, _)] = select(path, torch.eye(6), torch.ones(6), [0, 6], [3])
    assert order == keep == [0, 1, 2]
    [(keep, order, _)] = select(path, torch.ones(6, 4), torch.ones(6), [0, 6], [3])
    assert order == [0] and keep == [0, 1, 2]


@pytest.mark.parametrize("path", PATHS)
def test_zero_vectors_are_filled_by_relevance(path):
    relevance = torch.tensor([0.1, 0.9, 0.5, 0.9])
    [(keep, order, _)] = select(path, torch.zeros(4, 3), relevance, [0, 4], [3])
    assert order == [] and keep == [1, 2, 3]


def test_more_steps_than_budgets_change_nothing():
    generator = torch.Generator().manual_seed(6)
    features, relevance = torch.randn(30, 20, generator=generator), torch.ones(30)
    offsets, budgets = [0, 4, 17, 30], [4, 0, 5]
    exact = select("torch", features, relevance, offsets, budgets)
    padded = select("torch", features, relevance, offsets, budgets, max_budget=13)
    assert [result[:2] for result in exact] == [result[:2] for result in padded]


@pytest.mark.parametrize("path", PATHS)
def test_permuting_segments_permutes_the_selection(path):
    generator = torch.Generator().manual_seed(7)
    features, relevance = torch.randn(36, 30, generator=generator), torch.rand(36)
    budgets = [3, 7, 5]
    permutation = [2, 0, 1]
    rows = torch.arange(36).view(3, 12)[permutation].flatten()
    plain = select(path, features, relevance, [0, 12, 24, 36], budgets)
    moved = select(
        path, features[rows], relevance[rows], [0, 12, 24, 36], [budgets[s] for s in permutation]
    )
    assert [result[:2] for result in moved] == [plain[s][:2] for s in permutation]


def test_no_budget_at_all():
    kernel = torch.eye(3).expand(2, 3, 3)
    valid = torch.ones(2, 3, dtype=torch.bool)
    none = torch.zeros(2, dtype=torch.int64)
    selection = greedy_map(kernel, torch.ones(2, 3), valid, none, 0)
    assert not selection.keep.any() and selection.order.shape == selection.gains.shape == (2, 0)
