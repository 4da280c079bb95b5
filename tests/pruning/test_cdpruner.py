"""The original's names, against the original's algorithm written out in float64."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dpp.pruning import naive_greedy_map
from vllm_dpp.pruning.cdpruner import (
    _dpp_sampling_fast,
    global_cdpruner_segment_prune,
)

from .helpers import log_det, reference_kernel
from .memory import peak_bytes


def original(budgets, mask, features, attention):
    """One global kernel, then a slice and a greedy loop for each segment; sorted indices."""
    raw = -attention.double()
    relevance = (raw - raw.min() + 1e-6) / (raw.max() - raw.min() + 1e-8)
    kernel = reference_kernel(features, relevance)
    kept = []
    for segment, budget in budgets.items():
        places = (mask == segment).nonzero().flatten()
        part = kernel[places][:, places]
        chosen = naive_greedy_map(part, budget, relevance[places].tolist())
        kept += places[chosen].tolist()
    return sorted(kept)


def make(seed, lengths, ids=None, dim=64, shuffled=True):
    """Visual tokens of segments of these lengths, interleaved at random, with text among them."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)
    ids = torch.tensor(range(len(lengths)) if ids is None else ids)
    visual = ids.repeat_interleave(torch.tensor(lengths))
    if shuffled:
        visual = visual[torch.randperm(num_tokens, generator=generator)]
    mask = torch.full((num_tokens + 7,), -1)
    places = torch.randperm(num_tokens + 7, generator=generator)[:num_tokens].sort().values
    mask[places] = visual
    features = torch.randn(num_tokens, dim, generator=generator)
    attention = torch.rand(num_tokens, generator=generator)
    return mask, visual, features, attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batched", [False, True])
def test_keeps_what_the_original_keeps(dtype, batched):
    mask, visual, features, attention = make(0, [20, 5, 31, 1], ids=[7, 0, 3, 12])
    features = features.to(dtype)
    budgets = {7: 8, 0: 5, 3: 11, 12: 0}
    inputs = (features[None], attention[None]) if batched else (features, attention)
    kept = global_cdpruner_segment_prune(budgets, mask, *inputs, 24)
    assert kept.dtype == torch.int64
    assert kept.tolist() == original(budgets, visual, features, attention)


def test_low_attention_is_what_the_original_prefers():
    attention = torch.tensor([0.9, 0.1, 0.5, 0.2])
    kept = global_cdpruner_segment_prune(None, torch.zeros(4).int(), torch.eye(4), attention, 2)
    assert kept.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (None, [4, 2, 6]),  # by length
        ({0: 2, 1: 4, 2: 6}, [2, 4, 6]),
        ([2, 4, 6], [2, 4, 6]),
        ({0: 0, 1: 9, 2: 3}, [0, 8, 4]),  # segment 1 holds 8, what is left goes on
        ({0: 1.0, 1: 1.0, 2: 2.0}, [3, 3, 6]),
        ([0.25, 0.25, 0.5], [3, 3, 6]),
        ({0: 0.0, 1: 1.0, 2: 0.0}, [2, 8, 2]),  # no weight: only what the others cannot hold
        ({0: 2, 1: 2, 2: 4, 9: 4}, [3, 3, 6]),  # a segment without tokens
    ],
)
def test_budgets(info, expected):
    lengths = [16, 8, 24]
    mask, visual, features, attention = make(1, lengths)
    kept = global_cdpruner_segment_prune(info, mask, features, attention, 12)
    assert [int((visual[kept] == segment).sum()) for segment in range(3)] == expected


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    share=st.floats(0, 1),
    seed=st.integers(0, 100),
    kind=st.sampled_from(["random", "equal", "zero", "low_rank"]),
)
def test_count_order_and_names_of_segments(lengths, share, seed, kind):
    ids = torch.randperm(40, generator=torch.Generator().manual_seed(seed))[: len(lengths)]
    mask, visual, features, attention = make(seed, lengths, ids.tolist())
    if kind != "random":
        features = {
            "equal": features[:1].expand_as(features),
            "zero": torch.zeros_like(features),
            "low_rank": features[:, :1] * features[:1],
        }[kind]
    topk = round(share * len(features))
    kept = global_cdpruner_segment_prune(None, mask, features, attention, topk).tolist()
    assert len(kept) == topk and kept == sorted(set(kept))
    assert not kept or (kept[0] >= 0 and kept[-1] < len(features))
    renamed = torch.where(mask >= 0, mask + 100, mask)
    again = global_cdpruner_segment_prune(None, renamed, features, attention, topk)
    assert again.tolist() == kept


def test_all_and_nothing():
    mask, _, features, attention = make(2, [3, 4])
    assert global_cdpruner_segment_prune(None, mask, features, attention, 7).tolist() == [*range(7)]
    assert global_cdpruner_segment_prune(None, mask, features, attention, 0).tolist() == []
    nothing = torch.empty(0)
    text = torch.full((5,), -1)
    assert global_cdpruner_segment_prune(None, text, nothing[:, None], nothing, 0).tolist() == []


def test_a_log_line_for_each_segment(caplog):
    mask, _, features, attention = make(3, [3, 9], ids=[4, 2])
    with caplog.at_level(logging.DEBUG, "vllm_dpp.pruning.cdpruner"):
        global_cdpruner_segment_prune(None, mask, features, attention, 4)
    assert caplog.messages == ["segment 2: 9 tokens, 3 kept", "segment 4: 3 tokens, 1 kept"]


GOOD = {
    "segment_keep_info": None,
    "segment_mask": torch.tensor([0, -1, 0, 1, 1]),
    "image_features": torch.eye(4),
    "last_layer_attention_avg": torch.arange(4.0),
    "topk": 2,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": 5}, "topk must be <= N = 4, got 5"),
        ({"topk": -1}, "topk must be an integer >= 0, got -1"),
        ({"topk": 2.0}, r"topk must be an integer >= 0, got 2\.0"),
        (
            {"segment_mask": torch.tensor([0, 0, 1])},
            r"segment_mask must have one .* 4 visual tokens, got 3 .*image_features \[4, 4\]",
        ),
        ({"segment_mask": torch.zeros(4)}, r"segment_mask must be \[N'\] int.* of torch.float32"),
        ({"segment_mask": torch.zeros(4).bool()}, "segment_mask .* torch.bool"),
        ({"segment_mask": torch.zeros(4, 1).int()}, r"segment_mask .* got shape \[4, 1\]"),
        ({"segment_mask": torch.tensor([0, 0, 1, -2])}, "segment_mask must be >= -1, got -2"),
        ({"image_features": torch.eye(4).long()}, "image_features must be .* torch.int64"),
        ({"image_features": torch.zeros(2, 4, 4)}, r"image_features .* got shape \[2, 4, 4\]"),
        ({"image_features": torch.eye(4) / 0}, "image_features must be finite, got NaN or inf"),
        ({"last_layer_attention_avg": torch.ones(3)}, "last_layer_attention_avg must have one"),
        ({"last_layer_attention_avg": torch.ones(2, 4)}, r"attention_avg .* got shape \[2, 4\]"),
        (
            {"last_layer_attention_avg": torch.tensor([0, 1, torch.nan, 2])},
            "last_layer_attention_avg must be finite",
        ),
        ({"segment_keep_info": {0: 2}}, r"must name every segment .* got none for \[1\]"),
        ({"segment_keep_info": [1, 2]}, "must sum to topk = 2, got 3; give float weights"),
        ({"segment_keep_info": [1.0, -1.0]}, r"segment_keep_info\[1\] must be a finite number"),
        ({"segment_keep_info": [1.0, "2"]}, r"segment_keep_info\[1\] .* got '2'"),
        ({"segment_keep_info": [1.0, float("nan")]}, r"segment_keep_info\[1\] .* got nan"),
    ],
)
def test_bad_input_is_named(change, message):
    assert len(global_cdpruner_segment_prune(**GOOD)) == 2
    with pytest.raises(ValueError, match=message):
        global_cdpruner_segment_prune(**{**GOOD, **change})


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("info", "topk"),
    [(None, 9), ({0: 9, 1: 0, 2: 0}, 9), ({0: 0.0, 1: 1.0, 2: 0.0}, 9), (None, 0), (None, 40)],
)
def test_what_is_not_finite_is_found_wherever_it_is(info, topk, value, shuffled):
    """Also in segments that keep nothing or everything, whose kernels say nothing."""
    mask, _, features, attention = make(4, [20, 12, 8], shuffled=shuffled)
    for token in (0, 25, 39):
        spoiled = features.clone()
        spoiled[token, token] = value
        with pytest.raises(ValueError, match="image_features must be finite, got NaN or inf in"):
            global_cdpruner_segment_prune(info, mask, spoiled, attention, topk)
    assert len(global_cdpruner_segment_prune(info, mask, features, attention, topk)) == topk


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_that_are_large_but_finite_are_no_error(dtype):
    """Their squares are infinite in float32."""
    mask, _, features, attention = make(5, [9, 6])
    features = features.to(dtype) * 1e25
    assert len(global_cdpruner_segment_prune(None, mask, features, attention, 7)) == 7


def test_tokens_in_the_order_of_their_segments_are_not_copied():
    mask, _, features, attention = make(6, [64, 64], dim=4096, shuffled=False)

    def prune():
        global_cdpruner_segment_prune(None, mask, features, attention, 20)

    prune()
    assert peak_bytes(prune) < features.nbytes / 4


@pytest.mark.parametrize("n", [1, 2, 12, 63])
def test_sampling_fast_returns_the_order_of_selection(n):
    generator = torch.Generator().manual_seed(n)
    features = torch.randn(n, 80, generator=generator)
    kernel = reference_kernel(features, 0.1 + torch.rand(n, generator=generator))
    for k in {0, 1, n // 2, n}:
        order = _dpp_sampling_fast(kernel, k)
        assert order.dtype == torch.int64
        assert order.tolist() == naive_greedy_map(kernel, k, [1.0] * n)


def test_sampling_fast_stops_at_the_rank():
    features = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    kernel = reference_kernel(features, torch.ones(20))
    order = _dpp_sampling_fast(kernel, 10).tolist()
    assert len(order) == 3 and log_det(kernel, order) > -10
    assert _dpp_sampling_fast(torch.zeros(4, 4), 2).tolist() == []


@pytest.mark.parametrize(
    ("kernel", "k", "message"),
    [
        (torch.eye(3)[:2], 1, r"kernel must be \[n, n\], got shape \[2, 3\]"),
        (torch.eye(3) * torch.nan, 1, "kernel must be finite"),
        (torch.eye(3), 4, "k must be <= n = 3, got 4"),
        (torch.eye(3), -1, "k must be an integer >= 0, got -1"),
    ],
)
def test_sampling_fast_errors(kernel, k, message):
    with pytest.raises(ValueError, match=message):
        _dpp_sampling_fast(kernel, k)


def test_tensors_that_record_gradients_are_selected_from():
    features, kernel = torch.eye(4).requires_grad_(), torch.eye(4).requires_grad_()
    mask, attention = torch.zeros(4).int(), torch.arange(4.0).requires_grad_()
    kept = global_cdpruner_segment_prune(None, mask, features, attention, 2)
    assert kept.tolist() == [0, 1]
    assert _dpp_sampling_fast(kernel, 2).tolist() == [0, 1]
