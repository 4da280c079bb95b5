import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_dpp.pruning import PruningConfig, scene_segment_ids, segment_offsets
from vllm_dpp.pruning.segments import pad_segments


@pytest.mark.parametrize(
    ("settings", "num_slices", "offsets"),
    [
        ({"segment_by": "slices", "slices_per_segment": 3}, 8, [0, 15, 30, 40]),
        ({"segment_by": "slices", "slices_per_segment": 4}, 8, [0, 20, 40]),
        ({"segment_by": "slices", "slices_per_segment": 99}, 8, [0, 40]),
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
    ids = scene_segment_ids(features.to(dtype), 6, 4)
    expected = [scene for scene, length in enumerate(lengths) for _ in range(6 * length)]
    assert ids.dtype == torch.int64
    assert ids.tolist() == expected


def test_scene_ties_cut_earliest_and_clamp_to_the_slices():
    same = torch.ones(8, 3)
    assert scene_segment_ids(same, 2, 3).tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    assert scene_segment_ids(same, 2, 9).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert scene_segment_ids(same, 8, 4).tolist() == [0] * 8
    assert scene_segment_ids(same[:0], 2, 4).tolist() == []


@pytest.mark.parametrize(
    ("shape", "tokens_per_slice", "num_segments", "message"),
    [
        ((8, 3), 0, 2, "tokens_per_slice must be an integer >= 1, got 0"),
        ((8, 3), 2, 0, "num_segments must be an integer >= 1, got 0"),
        ((8, 3), 3, 2, r"N a multiple of tokens_per_slice = 3, got shape \[8, 3\]"),
        ((8,), 2, 2, r"got shape \[8\]"),
    ],
)
def test_scene_errors(shape, tokens_per_slice, num_segments, message):
    with pytest.raises(ValueError, match=message):
        scene_segment_ids(torch.ones(shape), tokens_per_slice, num_segments)


@pytest.mark.parametrize("offsets", [[0, 3, 4, 9], [0, 4, 8], [0, 5]])
def test_padding_holds_every_token_once(offsets):
    padded = pad_segments(offsets, torch.device("cpu"))
    assert padded.positions[padded.valid].tolist() == list(range(offsets[-1]))
    values = torch.arange(offsets[-1] * 2).view(-1, 2)
    assert torch.equal(padded.pad(values)[padded.valid], values)
    assert padded.valid.sum(dim=1).tolist() == padded.lengths
