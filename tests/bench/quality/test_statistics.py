"""Paired differences, against values worked out by hand or by simulation."""

import random

import pytest

from vllm_dpp.bench.quality.statistics import holm, mcnemar, paired_difference


@pytest.mark.parametrize(
    ("ours", "theirs", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (2, 8, 0.109375), (10, 0, 1 / 512)],
)
def test_mcnemar(ours: int, theirs: int, p: float) -> None:
    assert mcnemar(ours, theirs) == mcnemar(theirs, ours) == p


def test_difference_of_independent_questions() -> None:
    ours, theirs = [True, True, True, False], [True, False, False, True]
    difference = paired_difference(ours, theirs, [0, 1, 2, 3])
    assert difference.points == 25.0
    # Differences 0, 1, 1, -1: variance 11/12, of the mean 11/48.
    half = 100 * 1.959964 * (11 / 48) ** 0.5
    assert (difference.low, difference.high) == pytest.approx((25 - half, 25 + half))
    assert difference.p_signs == 1.0
    assert difference.p == pytest.approx(0.6015, abs=1e-4)  # 2 (1 - Phi(25 / (half / 1.96)))


def test_p_and_interval_agree() -> None:
    for right in (4, 5, 6, 7):
        ours, theirs = [True] * right + [False] * (10 - right), [False] * 9 + [True]
        difference = paired_difference(ours, theirs, list(range(10)))
        assert (difference.p < 0.05) == (difference.low > 0)
    same = paired_difference([True] * 4, [True] * 4, [0, 1, 2, 3])
    assert (same.points, same.p) == (0, 1)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_questions_of_one_video_count_as_one() -> None:
    ours, theirs = [True, False] * 50, [False, False] * 50
    alone = paired_difference(ours, theirs, list(range(100)))
    doubled = paired_difference(ours * 2, theirs * 2, [*range(100), *range(100)])
    assert doubled.points == alone.points == 50
    assert doubled.low == pytest.approx(alone.low)
    assert doubled.p_signs == alone.p_signs == mcnemar(50, 0)
    assert paired_difference(ours * 2, theirs * 2, list(range(200))).low > alone.low + 2


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Clusters of five questions that stand or fall together, in part."""
    rng = random.Random(0)
    covered = 0
    for _ in range(400):
        ours, theirs, groups = [], [], []
        for video in range(60):
            luck = rng.random()
            for _ in range(5):
                ours.append(rng.random() < 0.4 + 0.4 * luck)
                theirs.append(rng.random() < 0.3 + 0.4 * luck**2)
                groups.append(video)
        found = paired_difference(ours, theirs, groups)
        truth = 100 * (0.6 - (0.3 + 0.4 / 3))
        covered += found.low < truth < found.high
    assert 0.92 < covered / 400 < 0.975
