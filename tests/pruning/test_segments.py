from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_dpp.pruning import PruningConfig, Segments, scene_offsets, segment_offsets
from vllm_dpp.pruning.segments import padded_batches, segment_order

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "num_slices", "offsets"),
    [
        ({"segment_by": "slices", "slices_per_segment": 3}, 8, [0, 15, 30, 40]),
        ({"segment_by": "slices", "slices_per_segment": 4}, 8, [0, 20, 40]),
        ({"segment_by": "slices", "slices_per_segment": 99}, 8, [0, 40]),
        ({"segment_by": "slices", "max_segment_tokens": 24}, 5, [0, 20, 25]),
        # Two tokens of each of four slices, and the three others of each; and so on.
        ({"segment_by": "slices", "max_segment_tokens": 15}, 5, [0, 8, 20, 22, 25]),
        ({"segment_by": "slices", "max_segment_tokens": 14}, 5, [0, 8, 20, 22, 25]),
        ({"segment_by": "slices", "max_segment_tokens": 5, "slices_per_segment": 1}, 2, [0, 5, 10]),
        ({"segment_by": "slices", "max_segment_tokens": 5}, 3, [0, 3, 6, 9, 12, 15]),
        ({"segment_by": "slices", "max_segment_tokens": 4}, 2, [0, 2, 6, 10]),
        ({"segment_by": "slices", "max_segment_tokens": 2}, 3, [0, 2, 4, 6, 8, 10, *range(11, 16)]),
        ({"segment_by": "slices", "max_segment_tokens": 1}, 1, [0, 1, 2, 3, 4, 5]),
        ({"segment_by": "slices", "max_segment_tokens": None}, 300, [*range(0, 1500, 80), 1500]),
        ({"segment_by": "slices"}, 300, [*range(0, 1500, 80), 1500]),
        ({"segment_by": "count", "num_segments": 3, "max_segment_tokens": 1}, 8, [0, 10, 25, 40]),
        ({"segment_by": "count", "num_segments": 3}, 8, [0, 10, 25, 40]),
        ({"segment_by": "count", "num_segments": 5}, 2, [0, 5, 10]),
        ({"segment_by": "one"}, 8, [0, 40]),
        ({"segment_by": "one"}, 0, [0]),
        ({"segment_by": "count"}, 0, [0]),
        ({"segment_by": "slices"}, 0, [0]),
    ],
)
def test_segment_offsets(settings, num_slices, offsets):
    assert segment_offsets(num_slices, 5, PruningConfig(**settings)) == offsets


@given(st.integers(1, 40), st.integers(1, 90), st.integers(1, 20), st.integers(1, 200))
def test_no_segment_is_larger_than_one_may_be(num_slices, cells, slices, most):
    config = PruningConfig(slices_per_segment=slices, max_segment_tokens=most)
    offsets = segment_offsets(num_slices, cells, config)
    lengths = [b - a for a, b in pairwise(offsets)]
    assert (offsets[0], offsets[-1]) == (0, num_slices * cells)
    assert 0 < min(lengths) and max(lengths) <= min(most, slices * cells)


@given(st.integers(1, 20), st.integers(1, 40), st.integers(1, 9), st.integers(1, 90), st.data())
def test_segments_hold_the_same_part_of_each_of_their_slices(num_slices, cells, slices, most, data):
    config = PruningConfig(slices_per_segment=slices, max_segment_tokens=most)
    tail = data.draw(st.integers(0, num_slices * cells - 1))
    num_tokens = num_slices * cells - tail
    offsets = segment_offsets(num_slices, cells, config, num_tail=tail)
    order = segment_order(num_tokens, num_slices, cells, config, CPU)
    tokens = list(range(num_tokens)) if order is None else order.tolist()
    assert sorted(tokens) == list(range(num_tokens)) and offsets[-1] == num_tokens
    for start, end in pairwise(offsets):
        own = tokens[start:end]
        assert own == sorted(own)
        times, places = {i // cells for i in own}, {i % cells for i in own}
        assert max(times) - min(times) < slices
        assert max(places) - min(places) == len(places) - 1, "a run of places"
        there = {t * cells + p for t in times for p in places}
        assert set(own) == {i for i in there if i < num_tokens}


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 70))
def test_count_makes_segments_of_nearly_equal_length(num_slices, tokens_per_slice, count):
    config = PruningConfig(segment_by="count", num_segments=count)
    offsets = segment_offsets(num_slices, tokens_per_slice, config)
    lengths = [b - a for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    assert len(lengths) == min(count, num_slices)
    assert (offsets[0], offsets[-1]) == (0, num_slices * tokens_per_slice)
    assert all(length % tokens_per_slice == 0 for length in lengths)
    assert 0 < min(lengths) and max(lengths) - min(lengths) <= tokens_per_slice


@pytest.mark.parametrize(
    ("args", "segment_by", "message"),
    [
        ((-1, 5), "one", "num_slices must be an integer >= 0, got -1"),
        ((2, -5), "one", "tokens_per_slice must be an integer >= 0, got -5"),
        ((2, 5), "scene", "segment_by 'scene' has no fixed offsets"),
    ],
)
def test_segment_offsets_errors(args, segment_by, message):
    with pytest.raises(ValueError, match=message):
        segment_offsets(*args, PruningConfig(segment_by=segment_by))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scene_cuts_are_found_where_planted(dtype):
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 1, 4, 2]
    scenes = torch.randn(4, 64, generator=generator).repeat_interleave(
        torch.tensor(lengths) * 6, dim=0
    )
    features = scenes + 0.1 * torch.randn(scenes.shape, generator=generator)
    offsets = scene_offsets(features.to(dtype), 6, 4)
    assert offsets.dtype == torch.int64
    assert offsets.tolist() == [0, 18, 24, 48, 60]


def test_scene_ties_cut_earliest_and_clamp_to_the_slices():
    same = torch.ones(8, 3)
    assert scene_offsets(same, 2, 3).tolist() == [0, 2, 4, 8]
    assert scene_offsets(same, 2, 9).tolist() == [0, 2, 4, 6, 8]
    assert scene_offsets(same, 8, 4).tolist() == [0, 8]
    assert scene_offsets(same[:0], 2, 4).tolist() == [0]


def test_a_last_slice_that_is_cut_short_counts_by_what_is_there():
    before, after = torch.eye(4)[:1], torch.eye(4)[1:2]
    assert scene_offsets(torch.cat([before] * 6 + [after]), 3, 2).tolist() == [0, 6, 7]
    # Of its three tokens only the first is there, and that is one of the scene before.
    assert scene_offsets(torch.cat([before] * 3 + [after] * 4), 3, 2).tolist() == [0, 3, 7]
    assert scene_offsets(torch.ones(2, 4), 3, 2).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("shape", "tokens_per_slice", "num_segments", "message"),
    [
        ((8, 3), 0, 2, "tokens_per_slice must be an integer >= 1, got 0"),
        ((8, 3), 2, 0, "num_segments must be an integer >= 1, got 0"),
        ((8,), 2, 2, r"features must be \[N, D\], got shape \[8\]"),
    ],
)
def test_scene_errors(shape, tokens_per_slice, num_segments, message):
    with pytest.raises(ValueError, match=message):
        scene_offsets(torch.ones(shape), tokens_per_slice, num_segments)


def only_on_device(offsets):
    """The same segments as if the host did not know their lengths, only a bound on the longest."""
    known = Segments.between(offsets, CPU)
    return Segments(known.offsets, None, known.longest + 1)


@pytest.mark.parametrize("max_kernel_bytes", [1, 200, 1 << 28])
@pytest.mark.parametrize("offsets", [[0, 3, 4, 9], [0, 4, 8], [0, 5], [0, 0, 2, 2]])
@pytest.mark.parametrize("make", [lambda o: Segments.between(o, CPU), only_on_device])
def test_padded_batches_hold_every_token_once(make, offsets, max_kernel_bytes):
    segments = make(offsets)
    values = torch.arange(offsets[-1] * 2).view(-1, 2)
    seen, batches = [], list(padded_batches(segments, offsets[-1], max_kernel_bytes))
    for batch, padded in batches:
        assert torch.equal(padded.valid.sum(dim=1), segments.device_lengths[batch])
        seen += padded.positions[padded.valid].tolist()
        assert torch.equal(padded.pad(values)[padded.valid], values[padded.positions[padded.valid]])
        size, length = padded.valid.shape
        assert size == 1 or size * length**2 * 4 <= max_kernel_bytes
    assert seen == list(range(offsets[-1]))
    if max_kernel_bytes == 1 << 28:
        assert len(batches) == 1


def test_equal_segments_are_not_copied():
    segments = Segments.between([0, 4, 8, 12], CPU)
    values = torch.rand(12, 5)
    for _, padded in padded_batches(segments, 12, 130):
        assert padded.pad(values).untyped_storage().data_ptr() == values.data_ptr()


def test_lengths_are_read_from_the_device_where_only_it_knows_them():
    segments = only_on_device([0, 3, 4, 9])
    assert segments.lengths is None and segments.read_lengths() == [3, 1, 5]
    assert len(segments) == 3 and segments.starts.tolist() == [0, 3, 4]
