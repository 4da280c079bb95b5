"""A video whose last tokens the caller keeps: the others are selected from, in its segments."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_dpp.pruning import PruningConfig, VideoTokens, keep_indices, naive_keep_indices
from vllm_dpp.pruning.rules.dpp import _segments

from .helpers import ALL_CONFIGS, config_id, random_video

SLICES, COUNT, ONE = (
    PruningConfig(segment_by=segment_by, slices_per_segment=3, num_segments=3)
    for segment_by in ("slices", "count", "one")
)


@pytest.mark.parametrize(
    ("config", "num_tail", "offsets"),
    [
        (SLICES, 0, [0, 15, 30, 40]),
        (SLICES, 7, [0, 15, 30, 33]),
        (SLICES, 10, [0, 15, 30]),  # a segment is gone
        (SLICES, 12, [0, 15, 28]),  # and the next one cut short inside a slice
        (SLICES, 39, [0, 1]),
        (COUNT, 12, [0, 10, 25, 28]),
        (COUNT, 15, [0, 10, 25]),
        (COUNT, 36, [0, 4]),
        (ONE, 12, [0, 28]),
    ],
)
def test_segments_are_those_of_the_whole_video_clipped(config, num_tail, offsets):
    video = random_video(0, num_tail=num_tail, num_kept=1)
    assert video.tokens_per_slice == 5
    segments, _ = _segments(video, config)
    assert segments.offsets.tolist() == offsets
    assert segments.longest == max(segments.lengths)


def test_a_tail_by_hand():
    """Slices of three tokens, two of which are copies: each segment keeps one of each kind."""
    a, b, c, d = torch.eye(4).unsqueeze(1)
    features = torch.cat([a, a, b, c, c, d, a, a])
    config = PruningConfig(slices_per_segment=1)
    [kept] = keep_indices([VideoTokens(features, None, 5, 3, num_tail=1)], config)
    assert kept.tolist() == [0, 2, 3, 5, 6]
    # The tail takes the last slice and one token of the one before.
    [kept] = keep_indices([VideoTokens(features[:5], None, 3, 3, num_tail=4)], config)
    assert kept.tolist() == [0, 2, 3]


@pytest.mark.parametrize("config", ALL_CONFIGS, ids=config_id)
@pytest.mark.parametrize("backend", ["torch", "compiled"])
@settings(deadline=None, max_examples=15)
@given(data=st.data(), seed=st.integers(0, 99))
def test_equals_the_reference_with_any_tail(config, backend, data, seed):
    num_slices, tokens_per_slice = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 6))
    num_tail = data.draw(st.integers(0, num_slices * tokens_per_slice - 1))
    num_tokens = num_slices * tokens_per_slice - num_tail
    video = random_video(
        seed,
        num_slices=num_slices,
        tokens_per_slice=tokens_per_slice,
        num_tail=num_tail,
        num_kept=data.draw(st.integers(0, num_tokens)),
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
    )
    [kept] = keep_indices([video], config, backend=backend)
    assert [kept.tolist()] == naive_keep_indices([video], config)
    assert kept.shape == (video.num_kept,) and not (kept >= num_tokens).any()


@pytest.mark.parametrize("config", ALL_CONFIGS, ids=config_id)
def test_a_bound_on_the_longest_scene_holds(config):
    for num_tail in range(40):
        segments, _ = _segments(random_video(1, num_tail=num_tail, num_kept=1), config)
        assert max(segments.read_lengths()) <= segments.longest <= 40 - num_tail


@pytest.mark.parametrize("budget", ["length", "relevance", "spectrum", "gains"])
@pytest.mark.parametrize("segment_by", ["slices", "scene", "one"])
def test_a_tail_of_whole_slices_is_as_a_shorter_video(segment_by, budget):
    config = PruningConfig(segment_by=segment_by, budget=budget, slices_per_segment=2)
    video = random_video(2, num_tail=15)
    shorter = replace(video, num_slices=5, num_tail=0)
    [kept] = keep_indices([video], config)
    assert torch.equal(kept, keep_indices([shorter], config)[0])


@pytest.mark.parametrize("num_tail", [3, 8])
def test_a_video_that_is_all_tail_keeps_nothing_else(num_tail):
    video = VideoTokens(torch.zeros(0, 4), torch.zeros(0), 0, 1, num_tail)
    assert keep_indices([video], PruningConfig())[0].shape == (0,)
