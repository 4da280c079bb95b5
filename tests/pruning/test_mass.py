"""What segments weigh, against sums and eigenvalues in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dpp.pruning import Segments, relevance_mass, share_by_weight, spectral_mass

from .helpers import reference_kernel

CPU = torch.device("cpu")


def make(lengths, seed, dim=12):
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)
    features = torch.randn(num_tokens, dim, generator=generator)
    relevance = 0.05 + torch.rand(num_tokens, generator=generator)
    offsets = [sum(lengths[:s]) for s in range(len(lengths) + 1)]
    return features, relevance, Segments.between(offsets, CPU)


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any),
    seed=st.integers(0, 99),
    max_kernel_bytes=st.sampled_from([1, 2000, 1 << 28]),
)
def test_masses_follow_their_definitions(lengths, seed, max_kernel_bytes):
    features, relevance, segments = make(lengths, seed)
    spectral = spectral_mass(features, relevance, segments, max_kernel_bytes)
    summed = relevance_mass(relevance, segments)
    assert spectral.dtype == summed.dtype == torch.float64
    for s, (x, r) in enumerate(zip(features.split(lengths), relevance.split(lengths), strict=True)):
        values = torch.linalg.eigvalsh(reference_kernel(x, r)).clamp(min=0)
        assert float(spectral[s]) == pytest.approx(float((values / (1 + values)).sum()), abs=1e-5)
        assert float(summed[s]) == pytest.approx(float(r.double().sum()))
    for weights in (spectral, summed):
        for total in (0, 1, sum(lengths) // 2, sum(lengths)):
            shares = share_by_weight(total, weights, torch.tensor(lengths))
            assert int(shares.sum()) == total
            assert (shares <= torch.tensor(lengths)).all() and (shares >= 0).all()


def test_lengths_that_only_the_device_knows_change_nothing():
    features, relevance, segments = make([5, 2, 9], 0)
    unknown = Segments(segments.offsets, None, 11)
    known = spectral_mass(features, relevance, segments, 1 << 20)
    torch.testing.assert_close(spectral_mass(features, relevance, unknown, 1 << 20), known)


def test_copies_weigh_less_than_as_many_distinct_tokens():
    still, busy = torch.eye(16)[:1].expand(8, 16), torch.eye(16)[8:]
    segments = Segments.between([0, 8, 16], CPU)
    still_mass, busy_mass = spectral_mass(
        torch.cat([still, busy]), torch.ones(16), segments, 1 << 20
    ).tolist()
    assert still_mass == pytest.approx(8 / 9)  # one eigenvalue of 8
    assert busy_mass == pytest.approx(8 * 1 / 2)  # eight of 1
    assert share_by_weight(
        6, torch.tensor([still_mass, busy_mass]), torch.tensor([8, 8])
    ).tolist() == [1, 5]


def test_nan_weighs_nothing_but_the_total_stays():
    features, relevance, segments = make([6, 6], 1)
    features[2] = torch.nan
    weights = spectral_mass(features, relevance, segments, 1 << 20)
    assert share_by_weight(5, weights, torch.tensor([6, 6])).tolist() == [0, 5]
