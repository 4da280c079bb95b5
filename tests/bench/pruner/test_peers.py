"""The algorithms that the pruner is measured against select what the definition says."""

import shutil
from dataclasses import replace

import pytest
import torch

from vllm_dpp.bench.pruner import peers
from vllm_dpp.bench.pruner.arms import ARMS, NAMES, choose
from vllm_dpp.bench.pruner.options import parse
from vllm_dpp.pruning import naive_keep_indices

from .cases import SMALL, problem_of

CPU = torch.device("cpu")
CASES = [
    SMALL,
    replace(SMALL, num_segments=1),
    replace(SMALL, tokens_per_segment=63, kept_per_segment=1),
    replace(SMALL, tokens_per_segment=1, kept_per_segment=1),
    replace(SMALL, tokens_per_segment=24, kept_per_segment=24),
]
SELECTING = ["original", "per-segment", "cdpruner", "torch", "compiled"]


@pytest.mark.parametrize("name", SELECTING)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("sign", ["positive", "negative"])
def test_arms_select_what_the_reference_does(name, case, sign):
    if reason := ARMS[name].missing(CPU):
        pytest.skip(reason)
    problem = problem_of(case, seed=3, relevance_sign=sign)
    kept = ARMS[name].prepare(problem)()
    assert kept.tolist() == naive_keep_indices([problem.video], problem.settings)[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_original_names_select_the_same_by_the_relevance_of_the_original(case):
    settings = parse([]).settings
    assert (settings.relevance_sign, settings.relevance_floor) == ("negative", 0.0)
    problem = problem_of(case, 3, **vars(settings))
    kept = ARMS[NAMES].prepare(problem)()
    assert kept.tolist() == naive_keep_indices([problem.video], problem.settings)[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_compiled_peer_selects_the_same():
    problem = problem_of(replace(SMALL, kept_per_segment=4))
    kept = ARMS["torch.compile"].prepare(problem)()
    assert torch.equal(kept, peers.batched(problem))


def test_the_gram_is_that_of_each_segment():
    problem = problem_of()
    products = ARMS["gram"].prepare(problem)()
    rows = problem.features[48:96]
    torch.testing.assert_close(products[1], rows @ rows.T)


def test_defaults_are_the_arms_of_the_device():
    chosen, lacking = choose(None, CPU)
    assert {"original", "per-segment", "cdpruner", "torch", NAMES, "gram"} <= set(chosen)
    assert "torch.compile" not in chosen and "torch.compile" not in lacking
    assert "fused" not in chosen and "GPU" in lacking["fused"]


def test_asking_for_what_is_not_there():
    with pytest.raises(ValueError, match="unknown arm 'fast'"):
        choose(["fast"], CPU)
    with pytest.raises(ValueError, match="no arm can run: fused needs"):
        choose(["fused"], CPU)
