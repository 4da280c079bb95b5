import math

import pytest
import torch

from vllm_dpp.pruning import normalize_relevance, question_attention


def random_heads(seed, q=5, v=17, heads=6, kv_heads=2, dim=8):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(q, heads, dim, generator=generator)
    return query, torch.randn(v, kv_heads, dim, generator=generator)


def plain_attention(query, key, scale):
    """Head by head, question token by question token, in float64."""
    num_question, heads, _ = query.shape
    group = heads // key.shape[1]
    total = torch.zeros(len(key), dtype=torch.float64)
    for head in range(heads):
        for token in range(num_question):
            logits = key[:, head // group].double() @ query[token, head].double() * scale
            total += logits.softmax(dim=0)
    return total / (num_question * heads)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_plain_softmax_attention(kv_heads, dtype):
    query, key = (x.to(dtype) for x in random_heads(0, kv_heads=kv_heads))
    raw = question_attention(query, key, 8**-0.5)
    assert raw.dtype == torch.float32
    torch.testing.assert_close(raw.double(), plain_attention(query, key, 8**-0.5))
    assert float(raw.sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("max_weights", [1, 250, 400])  # one, two, three question tokens at once
def test_chunked_equals_unchunked(max_weights):
    query, key = random_heads(1)
    chunked = question_attention(query, key, 0.3, max_weights=max_weights)
    torch.testing.assert_close(chunked, question_attention(query, key, 0.3))


def test_tensor_parallel_parts_add_up():
    query, key = random_heads(2)
    parts = [
        question_attention(query[:, 3 * r : 3 * r + 3], key[:, r : r + 1], 0.3, total_num_heads=6)
        for r in range(2)
    ]
    torch.testing.assert_close(parts[0] + parts[1], question_attention(query, key, 0.3))


def test_nothing_asked_or_nothing_shown():
    query, key = random_heads(3)
    assert torch.equal(question_attention(query[:0], key, 1.0), torch.zeros(17))
    assert question_attention(query, key[:0], 1.0).shape == (0,)


@pytest.mark.parametrize(
    ("query_shape", "key_shape", "settings", "message"),
    [
        ((5, 6, 8), (7, 4, 8), {}, r"got shapes \[5, 6, 8\] and \[7, 4, 8\]"),
        ((5, 6, 8), (7, 2, 4), {}, r"query must be \[Q, H, d\]"),
        ((5, 8), (7, 2, 8), {}, r"got shapes \[5, 8\]"),
        ((5, 6, 8), (7, 0, 8), {}, r"got shapes .* \[7, 0, 8\]"),
        ((5, 6, 8), (7, 2, 8), {"total_num_heads": 0}, "total_num_heads must .* got 0"),
        ((5, 6, 8), (7, 2, 8), {"max_weights": 0}, "max_weights must .* got 0"),
    ],
)
def test_attention_errors(query_shape, key_shape, settings, message):
    with pytest.raises(ValueError, match=message):
        question_attention(torch.ones(query_shape), torch.ones(key_shape), 1.0, **settings)


@pytest.mark.parametrize("sign", ["positive", "negative"])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_normalisation_formula(sign, floor):
    raw = torch.rand(9, generator=torch.Generator().manual_seed(0))
    values = [value if sign == "positive" else -value for value in raw.double().tolist()]
    low, high = min(values), max(values)
    expected = [floor + (1 - floor) * (v - low + 1e-6) / (high - low + 1e-8) for v in values]
    got = normalize_relevance(raw, sign, floor)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(expected, rel=1e-5)


def test_normalised_range_and_order():
    raw = torch.tensor([0.3, 0.1, 0.2])
    positive = normalize_relevance(raw, "positive", 0.1)
    assert positive.argsort().tolist() == [1, 2, 0]
    assert normalize_relevance(raw, "negative", 0.1).argsort().tolist() == [0, 2, 1]
    assert float(positive.min()) == pytest.approx(0.1, abs=1e-4)
    assert float(positive.max()) == pytest.approx(1.0, abs=1e-4)


def test_constant_and_empty_relevance_normalise():
    constant = normalize_relevance(torch.full((4,), 0.2), "positive", 0.0)
    assert constant.isfinite().all() and (constant > 0).all() and (constant == constant[0]).all()
    assert normalize_relevance(torch.zeros(0), "positive", 0.0).shape == (0,)


@pytest.mark.parametrize(
    ("raw", "sign", "floor", "message"),
    [
        (torch.ones(2), "up", 0.1, "sign must be one of 'positive', 'negative', got 'up'"),
        (torch.ones(2), "positive", 1.5, r"floor must be a number in \[0, 1\], got 1\.5"),
        (torch.ones(2), "positive", math.nan, "floor .* got nan"),
        (torch.ones(2, 2), "positive", 0.5, r"raw must be \[V\], got shape \[2, 2\]"),
    ],
)
def test_normalisation_errors(raw, sign, floor, message):
    with pytest.raises(ValueError, match=message):
        normalize_relevance(raw, sign, floor)
