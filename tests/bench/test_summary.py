"""Arithmetic and layout that all benchmarks share."""

import pytest

from vllm_dpp.bench import summary


@pytest.mark.parametrize(
    ("percent", "value"), [(0, 1), (50, 2.5), (100, 4), (99, 3.97), (25, 1.75)]
)
def test_percentile(percent: float, value: float) -> None:
    assert summary.percentile([4, 1, 3, 2], percent) == pytest.approx(value)


def test_percentile_of_nothing() -> None:
    with pytest.raises(ValueError):
        summary.percentile([], 50)


def test_table_is_aligned() -> None:
    text = summary.table(("arm", "req/s"), [("stock", "1.25"), ("dpp@0.25", "12.50")])
    assert text.splitlines() == [
        "arm       req/s",
        "--------  -----",
        "stock      1.25",
        "dpp@0.25  12.50",
    ]


def test_spread() -> None:
    assert summary.spread([3, 1, 8]) == (3, 1, 8)
    assert summary.spread_text((3, 1, 8), digits=1) == "3.0 (1.0..8.0)"
