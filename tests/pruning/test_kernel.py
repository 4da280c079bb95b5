import pytest
import torch

from vllm_dpp.pruning import rows as rows_module
from vllm_dpp.pruning.dpp.kernel import conditioned_kernel, segment_kernels, similarity
from vllm_dpp.pruning.rows import joined_rows, unit_rows

from .helpers import reference_kernel


@pytest.fixture
def features():
    return torch.randn(2, 7, 33, generator=torch.Generator().manual_seed(0)) * 300


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kernels_follow_their_definitions(features, dtype):
    features = features.to(dtype)
    relevance = torch.rand(2, 7, generator=torch.Generator().manual_seed(1))
    kernel = conditioned_kernel(features, relevance)
    assert kernel.dtype == torch.float32
    for s in range(2):
        expected = reference_kernel(features[s], relevance[s]).float()
        torch.testing.assert_close(kernel[s], expected, rtol=1e-5, atol=1e-6)
        plain = reference_kernel(features[s], torch.ones(7)).float()
        torch.testing.assert_close(similarity(features[s]), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_joined_rows_are_alike_by_both_kinds(features, share, dtype, error):
    first, second = features[0].to(dtype), features[1, :, :20].to(dtype)
    first[3] = 0
    joined = joined_rows(first, second, share)
    assert joined.shape == (7, 53) and joined.dtype == dtype
    expected = (1 - share) * similarity(first) + share * similarity(second)
    torch.testing.assert_close(joined.float() @ joined.float().T, expected, rtol=0, atol=error)
    some = torch.tensor([6, 0, 3])
    for rows in (some, slice(2, 5)):
        assert torch.equal(joined_rows(first, second, share, rows), joined[rows])


@pytest.mark.parametrize("n", [95, 96, 97, 200, 384])
def test_kernels_formed_in_blocks_are_whole(n):
    generator = torch.Generator().manual_seed(n)
    features = torch.randn(2, n, 40, generator=generator)
    relevance = torch.rand(2, n, generator=generator)
    kernel = conditioned_kernel(features, relevance)
    torch.testing.assert_close(kernel, kernel.mT, rtol=1e-6, atol=0)
    for s in range(2):
        expected = reference_kernel(features[s], relevance[s]).float()
        torch.testing.assert_close(kernel[s], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 50, 200])
@pytest.mark.parametrize("bound", [1, 40 * 4 * 70, 40 * 4 * 450])
def test_features_are_cast_in_parts_that_a_bound_allows(n, bound, monkeypatch):
    generator = torch.Generator().manual_seed(n)
    features = torch.randn(5, n, 40, generator=generator).bfloat16()
    relevance = torch.rand(5, n, generator=generator)
    whole = conditioned_kernel(features, relevance)
    monkeypatch.setattr(rows_module, "_MAX_CAST_BYTES", bound)
    sizes = []

    def read(part, places):
        sizes.append(features[part, places][..., 0].numel())
        return features[part, places]

    in_parts = segment_kernels(read, relevance, 40)
    torch.testing.assert_close(in_parts, whole, rtol=1e-5, atol=1e-7)
    assert torch.equal(conditioned_kernel(features.float(), relevance), in_parts)
    assert max(sizes) <= max(bound // 160, 64)


def test_unit_rows(features):
    lengths = unit_rows(features).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones(2, 7))


def test_zero_rows_stay_zero():
    features = torch.eye(3)
    features[1] = 0
    assert torch.equal(unit_rows(features)[1], torch.zeros(3))
    assert torch.equal(similarity(features)[1], torch.zeros(3))
    assert torch.equal(conditioned_kernel(features, torch.ones(3))[:, 1], torch.zeros(3))


def test_inputs_are_left_alone(features):
    before = features.clone()
    conditioned_kernel(features, torch.ones(2, 7))
    assert torch.equal(features, before)
