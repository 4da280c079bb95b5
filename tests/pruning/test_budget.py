import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dpp.pruning import num_kept, share_by_length, share_by_weight
from vllm_dpp.pruning.naive import naive_shares

lengths_lists = st.lists(st.integers(0, 300), min_size=1, max_size=9)
weight_values = st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1e6), st.floats(1e-30, 1e30))


@st.composite
def weighted_shares(draw):
    lengths = draw(lengths_lists)
    count = len(lengths)
    weights = draw(st.lists(weight_values, min_size=count, max_size=count))
    return draw(st.integers(0, sum(lengths))), weights, lengths


def by_weight(total, weights, lengths):
    shares = share_by_weight(total, torch.tensor(weights), torch.tensor(lengths))
    assert shares.dtype == torch.int64
    return shares.tolist()


@pytest.mark.parametrize(
    ("num_tokens", "ratio", "kept"),
    [(0, 0.5, 0), (1, 0.01, 1), (10, 0.25, 3), (10, 0.24, 2), (7, 1.0, 7), (7, 1, 7), (3, 0.99, 3)],
)
def test_num_kept(num_tokens, ratio, kept):
    assert num_kept(num_tokens, ratio) == kept


@given(st.integers(1, 10**6), st.floats(0, 1, exclude_min=True))
def test_num_kept_is_the_nearest_possible_count(num_tokens, ratio):
    kept = num_kept(num_tokens, ratio)
    assert 1 <= kept <= num_tokens
    assert kept == 1 or abs(kept - num_tokens * ratio) <= 0.5


@pytest.mark.parametrize(
    ("num_tokens", "ratio", "message"),
    [
        (-1, 0.5, "num_tokens must be an integer >= 0, got -1"),
        (2.5, 0.5, r"num_tokens must be an integer >= 0, got 2\.5"),
        (4, 0.0, r"retention_ratio must be a number in \(0, 1\], got 0\.0"),
        (4, math.nan, "retention_ratio .* got nan"),
    ],
)
def test_num_kept_errors(num_tokens, ratio, message):
    with pytest.raises(ValueError, match=message):
        num_kept(num_tokens, ratio)


@pytest.mark.parametrize(
    ("total", "lengths", "shares"),
    [
        (5, [10, 10, 10], [2, 2, 1]),
        (1, [3, 3], [1, 0]),
        (4, [16, 16, 4], [2, 2, 0]),
        (3, [0, 3, 1], [0, 2, 1]),
        (0, [0, 0], [0, 0]),
        (0, [], []),
    ],
)
def test_share_by_length_examples(total, lengths, shares):
    assert share_by_length(total, lengths) == shares


@given(lengths_lists.flatmap(lambda ls: st.tuples(st.integers(0, sum(ls)), st.just(ls))))
def test_share_by_length_is_exact_and_fair(case):
    total, lengths = case
    shares = share_by_length(total, lengths)
    assert sum(shares) == total
    for share, length in zip(shares, lengths, strict=True):
        assert 0 <= share <= length
        assert abs(share * sum(lengths) - total * length) < max(1, sum(lengths))
    assert shares == naive_shares(total, [float(length) for length in lengths], lengths)


@pytest.mark.parametrize(
    ("total", "lengths", "message"),
    [
        (-1, [4], "total must be an integer >= 0, got -1"),
        (5, [2, 2], r"total must be <= sum\(lengths\) = 4, got 5"),
        (1, [2, -2], r"lengths\[1\] must be an integer >= 0, got -2"),
    ],
)
def test_share_by_length_errors(total, lengths, message):
    with pytest.raises(ValueError, match=message):
        share_by_length(total, lengths)


@pytest.mark.parametrize(
    ("total", "weights", "lengths", "shares"),
    [
        (6, [2.0, 1.0, 0.0], [10, 10, 10], [4, 2, 0]),
        (9, [100.0, 1.0, 1.0], [3, 10, 10], [3, 3, 3]),  # the surplus is shared again
        (7, [0.0, 0.0], [10, 4], [5, 2]),  # all zero: by length
        (7, [5.0, 5.0, 5.0], [9, 9, 9], [3, 2, 2]),  # all equal: ties to the earliest
        (8, [1.0, 0.0, 0.0], [2, 8, 4], [2, 4, 2]),  # weight 0 once the others are full
        (3, [1.0, 1e-30], [9, 9], [3, 0]),
        (5, [1.0, 2.0], [2, 3], [2, 3]),
        (2, [math.nan, 1.0, -1.0, math.inf], [4, 4, 4, 4], [0, 2, 0, 0]),
        (0, [1.0, 2.0], [2, 3], [0, 0]),
        (0, [1.0], [0], [0]),
        (0, [], [], []),
    ],
)
def test_share_by_weight_examples(total, weights, lengths, shares):
    got = share_by_weight(total, torch.tensor(weights), torch.tensor(lengths, dtype=torch.int64))
    assert got.tolist() == shares


@settings(deadline=None, max_examples=300)
@given(weighted_shares())
def test_share_by_weight_is_exact(case):
    total, weights, lengths = case
    shares = by_weight(total, weights, lengths)
    assert sum(shares) == total
    assert all(0 <= share <= length for share, length in zip(shares, lengths, strict=True))


@settings(deadline=None, max_examples=200)
@given(
    lengths_lists.flatmap(
        lambda ls: st.tuples(
            st.integers(0, sum(ls)),
            st.lists(st.integers(0, 50), min_size=len(ls), max_size=len(ls)),
            st.just(ls),
        )
    )
)
def test_share_by_weight_equals_exact_fractions(case):
    total, weights, lengths = case
    weights = [float(weight) for weight in weights]
    assert by_weight(total, weights, lengths) == naive_shares(total, weights, lengths)


@settings(deadline=None)
@given(lengths_lists.flatmap(lambda ls: st.tuples(st.integers(0, sum(ls)), st.just(ls))))
def test_weighing_by_length_is_sharing_by_length(case):
    total, lengths = case
    weights = [float(length) for length in lengths]
    assert by_weight(total, weights, lengths) == share_by_length(total, lengths)


def test_share_by_weight_errors():
    with pytest.raises(ValueError, match="total must be an integer >= 0, got -2"):
        share_by_weight(-2, torch.ones(2), torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got shapes \[3\] and \[2\]"):
        share_by_weight(1, torch.ones(3), torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"must be \[S\]"):
        share_by_weight(1, torch.ones(2, 2), torch.ones(2, 2, dtype=torch.int64))
