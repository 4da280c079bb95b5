"""The judge of the pruner benchmark lets near-ties pass and nothing else."""

from dataclasses import replace

import pytest
import torch

from vllm_dpp.bench.pruner.judge import Judge, largest_shortfall, num_judged
from vllm_dpp.bench.pruner.peers import batched
from vllm_dpp.pruning import keep_indices

from .cases import SMALL, problem_of


@pytest.fixture
def judge():
    return Judge(problem_of(), seed=0)


@pytest.fixture
def right():
    return batched(problem_of())


def test_the_right_tokens(judge, right):
    assert judge.num_segments == SMALL.num_segments
    assert judge.verdict(right).fault is None
    assert judge.verdict(right).near_ties == 0


def test_a_rule_is_judged_by_itself(right):
    problem = problem_of()
    [kept] = keep_indices([problem.video], replace(problem.settings, rule="change"))
    by_change = Judge(problem, seed=0, rule="change")
    assert by_change.verdict(kept).fault is None
    assert by_change.verdict(right).fault is not None


def test_one_wrong_token(judge, right):
    """Every token of the last segment is exchanged in turn for the next one that is not kept."""
    free = sorted(set(range(144, 192)) - set(right.tolist()))
    for place in range(36, 48):
        wrong = right.clone()
        wrong[place] = free[place % len(free)]
        fault = judge.verdict(wrong.sort().values).fault
        assert fault is not None and fault.startswith("segment 3: a token taken has a gain")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda kept: kept[:-1], "48 int64 indices wanted, got [47]"),
        (lambda kept: kept.int(), "got [48] of torch.int32"),
        (lambda kept: kept.flip(0), "not ascending"),
        (lambda kept: torch.cat([kept[:1], kept[:-1]]), "not ascending and distinct"),
        (lambda kept: torch.arange(48), "not every segment keeps its 12"),
        (lambda kept: kept + 192, "not every segment keeps its 12"),
    ],
)
def test_wrong_forms(judge, right, spoil, expected):
    fault = judge.verdict(spoil(right)).fault
    assert fault is not None and expected in fault


def with_twins(difference):
    """A problem whose most relevant token of segment 0 has a twin, almost as relevant."""
    problem = problem_of()
    features, raw = problem.features.clone(), problem.raw_relevance.clone()
    features[20] = features[10]
    raw[10], raw[20] = 1.5, 1.5 * (1 - difference)
    return replace(problem, features=features, raw_relevance=raw)


def test_a_near_tie_may_go_either_way():
    """Taking the twin in place of its better costs 2e-6 of the first gain."""
    problem = with_twins(1e-6)
    kept = batched(problem)
    assert 10 in kept and 20 not in kept
    verdict = Judge(problem, seed=0).verdict(torch.where(kept == 10, 20, kept).sort().values)
    assert verdict.fault is None
    assert verdict.near_ties == 1


def test_a_wider_gap_may_not():
    problem = with_twins(1e-4)
    kept = batched(problem)
    assert 10 in kept and 20 not in kept
    fault = Judge(problem, seed=0).verdict(torch.where(kept == 10, 20, kept).sort().values).fault
    assert fault is not None and fault.startswith("segment 0")


def test_shortfall():
    """Gains 4, 2 and 1 of orthogonal tokens: leaving out the second falls short by half."""
    kernel = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    assert largest_shortfall(kernel, {0, 1}) == 0
    assert largest_shortfall(kernel, {0, 2}) == 0.5
    assert largest_shortfall(kernel, {1}) == 0.5


@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
def test_where_all_tie_at_the_start_any_may_be_first(first, second):
    """From `first`, `second` is the most unlike; from `second`, token 0 would be."""
    kernel = torch.eye(4, dtype=torch.float64)
    for i, j, similarity in ((first, second, 0.1), (first, 0, 0.5), (first, 3, 0.6)):
        kernel[i, j] = kernel[j, i] = similarity
    assert largest_shortfall(kernel, {first, second}) == 0
    assert largest_shortfall(kernel, {second, 3}) == 0
    assert largest_shortfall(kernel, {first, 3}) > 0.1


def test_large_videos_are_judged_in_part():
    large = replace(SMALL, num_segments=10_000, tokens_per_segment=256, kept_per_segment=64)
    assert 1 <= num_judged(large) < 100
    assert num_judged(SMALL) == 4
    with pytest.raises(ValueError, match="the reference is too slow"):
        num_judged(replace(SMALL, tokens_per_segment=65536, kept_per_segment=64))
