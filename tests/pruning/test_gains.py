"""Budgets by gains: one selection of the video from segments that were ordered apart."""

import pytest
import torch

from vllm_dpp.pruning import PruningConfig, VideoTokens, keep_indices
from vllm_dpp.pruning.budget import most_by_gains, share_by_length
from vllm_dpp.pruning.dpp.gains import keep_largest_gains
from vllm_dpp.pruning.dpp.greedy_map import Selection

from .helpers import random_video

SEGMENTS = {"slices_per_segment": 2, "budget": "gains"}


def test_segments_that_share_no_direction_are_one_selection():
    parts = [random_video(i, num_slices=2, num_kept=1) for i in range(4)]
    features = torch.block_diag(*(part.features for part in parts))
    video = VideoTokens(features, torch.cat([part.raw_relevance for part in parts]), 16, 8)
    (apart,) = keep_indices([video], PruningConfig(**SEGMENTS))
    assert torch.equal(apart, keep_indices([video], PruningConfig(segment_by="one"))[0])


@pytest.mark.parametrize("seed", range(4))
def test_where_nothing_is_new_little_is_kept(seed):
    still, lively = random_video(seed).features[:5], random_video(seed + 9).features
    video = VideoTokens(torch.cat([still.repeat(8, 1), lively]), None, 16, 16)
    (kept,) = keep_indices([video], PruningConfig(rule="change", **SEGMENTS))
    assert int((kept < 40).sum()) == 4, "of the first slice, as many as its segment may keep"
    equal = PruningConfig(rule="change", slices_per_segment=2)
    assert int((keep_indices([video], equal)[0] < 40).sum()) == 8


@pytest.mark.parametrize("total", [0, 1, 7, 40])
def test_most_of_a_segment(total):
    lengths = [16, 0, 3, 21]
    shares = torch.tensor(share_by_length(total, lengths))
    most = most_by_gains(total, shares, torch.tensor(lengths))
    expected = [
        min(total, n, s + -(-n // 8)) for s, n in zip(shares.tolist(), lengths, strict=True)
    ]
    assert most.tolist() == expected
    assert most.sum() >= total


def kept_of(order, gains, total, in_order, relevance=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)):
    steps = Selection(torch.zeros(6, dtype=torch.bool), torch.tensor(order), torch.tensor(gains))
    offsets, relevance = torch.tensor([0, 3, 6]), torch.tensor(relevance)
    keep = keep_largest_gains(steps, offsets, relevance, total, rest_in_order=in_order)
    return keep.nonzero().flatten().tolist()


def test_the_largest_gains_of_all():
    order, gains = [[2, 0], [1, 2]], [[5.0, 1.0], [4.0, 3.0]]
    assert kept_of(order, gains, 1, False) == [2]
    assert kept_of(order, gains, 3, False) == [2, 4, 5]


def test_ties_go_to_the_earliest_segment():
    assert kept_of([[2, 0], [1, 2]], [[4.0, 4.0], [4.0, 4.0]], 2, False) == [0, 2]


def test_no_step_without_the_one_before():
    """Rounding lets a gain rise."""
    assert kept_of([[2, 0], [1, 2]], [[4.0, 4.001], [4.0005, 3.0]], 2, False) == [2, 4]


def test_what_gains_nothing_follows_by_relevance_or_in_order():
    order, gains = [[2, -1], [-1, -1]], [[5.0, 0.0], [0.0, 0.0]]
    assert kept_of(order, gains, 3, False) == [2, 4, 5]
    assert kept_of(order, gains, 3, True) == [0, 1, 2]
    assert kept_of(order, gains, 6, True) == [0, 1, 2, 3, 4, 5]
