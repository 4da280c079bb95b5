"""Arithmetic and tables of the pruner benchmark."""

import json

import pytest

from vllm_dpp.bench.pruner import report
from vllm_dpp.bench.pruner.arms import NAMES
from vllm_dpp.bench.pruner.options import growth_series

SECONDS = {"original": [0.4, 4.0, 0.6], "torch": [0.1, 0.5, 0.3], "gram": [0.1, 1.0, 0.1]}


def cases(exponents, sizes=(1024, 2048, 4096)):
    """Cases at which arms take 1 ms for 1,024 tokens and N ** exponent from there."""
    return [
        report.case_as_json(
            case,
            judged_segments=2,
            skipped={},
            checked={name: {"peak_bytes": 3 << 20, "near_ties": 0} for name in exponents},
            seconds={name: [1e-3 * (size / 1024) ** p] for name, p in exponents.items()},
        )
        for size, case in zip(sizes, growth_series(sizes, 64, 256, 8), strict=True)
    ]


def test_ratios_pair_rounds():
    """The machine was slower in the second round; its ratios are taken within it."""
    case = report.case_as_json(
        growth_series([1024], 64, 256, 8)[0],
        judged_segments=4,
        skipped={},
        checked={name: {"peak_bytes": 1} for name in SECONDS},
        seconds=SECONDS,
    )
    ours = case["arms"]["torch"]
    assert ours["median_seconds"] == 0.3
    assert ours["over_gram"] == pytest.approx((1, 0.5, 3))
    assert ours["speedup_over_original"] == pytest.approx((4, 2, 8))
    assert case["arms"]["gram"]["over_gram"] == (1, 1, 1)
    assert case["arms"]["original"]["over_keep_indices"] == pytest.approx((4, 2, 8))


def test_our_times_are_those_of_the_arm_that_is_taken_by_itself():
    seconds = {"torch": [0.4], "compiled": [0.2], NAMES: [0.25]}
    case = report.case_as_json(
        growth_series([1024], 64, 256, 8)[0],
        judged_segments=4,
        skipped={},
        checked={name: {"peak_bytes": 1} for name in seconds},
        seconds=seconds,
    )
    assert case["arms"][NAMES]["over_keep_indices"] == pytest.approx((1.25, 1.25, 1.25))


def test_nothing_to_compare_with():
    (case,) = cases({"torch": 1}, sizes=[1024])
    assert case["arms"]["torch"]["over_gram"] is None
    (other,) = cases({"cdpruner": 1}, sizes=[1024])
    assert other["arms"]["cdpruner"]["over_keep_indices"] is None
    assert case["arms"]["torch"]["speedup_over_original"] is None


def test_growth_is_the_slope_in_logarithms():
    growth = report.growth_of(cases({"original": 2, "torch": 1}))
    (arms,) = growth.values()
    assert arms["original"]["exponent"] == pytest.approx(2)
    assert arms["torch"]["exponent"] == pytest.approx(1)
    assert arms["torch"]["sizes"] == [1024, 2048, 4096]
    assert arms["torch"]["seconds_per_token"] == pytest.approx([1e-3 / 1024] * 3)
    assert arms["torch"]["peak_bytes"] == [3 << 20] * 3


def test_two_sizes_are_no_growth():
    assert report.growth_of(cases({"torch": 1}, sizes=[1024, 2048])) == {}


def test_tables():
    found = cases({"torch": 1, "gram": 1})
    found[2]["skipped"] = {"original": "2 s at N = 1024"}
    found[0]["arms"]["torch"]["peak_bytes"] = None
    document = {"arms": ["torch", "gram"], "cases": found, "growth": report.growth_of(found)}
    document = json.loads(json.dumps(document))  # tables are drawn from files too
    tables = list(report.render(document))
    titles = [title for title, _ in tables]
    assert titles[0] == "Arms"
    assert "N 4096, D 64: 16 segments of 256 tokens, 8 kept of each; 2 of 16 segments" in titles[3]
    assert "original: not run, 2 s at N = 1024" in tables[3][1]
    assert (tables[1][1].count(" 3.0 "), tables[2][1].count(" 3.0 ")) == (1, 2)
    assert "1024..4096" in tables[4][1]
