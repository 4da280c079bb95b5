from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_dpp.pruning import (
    PruningConfig,
    VideoTokens,
    keep_indices,
    naive_keep_indices,
)
from vllm_dpp.pruning.dpp import low_rank
from vllm_dpp.pruning.dpp.select import warm_up

from .helpers import ALL_CONFIGS, config_id, random_video

each_config = pytest.mark.parametrize("config", ALL_CONFIGS, ids=config_id)


class NoHostSync(TorchDispatchMode):
    """Raises on what reads a tensor on the host, or sizes a result by its values."""

    FORBIDDEN = {
        "aten::_local_scalar_dense",
        "aten::item",
        "aten::equal",
        "aten::nonzero",
        "aten::masked_select",
        "aten::repeat_interleave",
        "aten::_unique2",
        "aten::unique_dim",
        "aten::unique_consecutive",
    }
    INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        indices = args[1] if name in self.INDEXING else []
        by_mask = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if name in self.FORBIDDEN or by_mask:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@each_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_reference(config, dtype):
    videos = [
        random_video(0, dtype=dtype),
        random_video(1, num_slices=7, tokens_per_slice=9, num_kept=20, dtype=dtype),
        random_video(2, num_slices=1, tokens_per_slice=1, num_kept=1, dtype=dtype),
        random_video(3, num_slices=2, num_kept=9, dtype=dtype),
    ]
    got = [keep.tolist() for keep in keep_indices(videos, config)]
    assert got == naive_keep_indices(videos, config)


@pytest.mark.parametrize("budget", ["length", "relevance"])
def test_scenes_of_one_slice_are_selected_to_the_last_token(budget):
    config = PruningConfig(segment_by="scene", num_segments=3, budget=budget)
    shape = {"num_slices": 3, "tokens_per_slice": 12, "dim": 10}  # few dimensions: diversity counts
    videos = [random_video(seed, num_kept=18, **shape) for seed in range(3)]
    got = [keep.tolist() for keep in keep_indices(videos, config)]
    assert got == naive_keep_indices(videos, config)


@each_config
def test_equals_the_reference_without_relevance(config):
    config = replace(config, relevance="none")
    videos = [random_video(20, dim=96), random_video(21, num_slices=7, dim=96, num_kept=15)]
    got = [keep.tolist() for keep in keep_indices(videos, config)]
    assert got == naive_keep_indices(videos, config)


@each_config
@pytest.mark.parametrize("num_kept", [0, 1, 2, 39, 40])
@pytest.mark.parametrize("kind", ["random", "equal", "zero", "half_zero"])
def test_keeps_the_exact_count_ascending_and_distinct(config, num_kept, kind):
    video = random_video(4, num_kept=num_kept)
    if kind == "equal":
        video = replace(video, features=torch.ones(40, 6), raw_relevance=torch.ones(40))
    elif kind != "random":
        features = torch.zeros(40, 6)
        features[: 20 if kind == "half_zero" else 0] = 1
        video = replace(video, features=features)
    [keep] = keep_indices([video], config)
    assert keep.dtype == torch.int64 and keep.shape == (num_kept,)
    kept = keep.tolist()
    assert kept == sorted(set(kept))
    assert not kept or (kept[0] >= 0 and kept[-1] < 40)


@each_config
def test_a_video_does_not_depend_on_its_neighbours(config):
    videos = [random_video(s, num_slices=2 + s, num_kept=5 + s) for s in range(4)]
    together = keep_indices(videos, config)
    for video, keep in zip(videos, together, strict=True):
        assert torch.equal(keep, keep_indices([video], config)[0])
    assert keep_indices([], config) == []


@each_config
def test_nothing_is_read_on_the_host(config):
    videos = [random_video(5), random_video(6, num_slices=7, num_kept=17)]
    with NoHostSync():
        keep_indices(videos, config, backend="torch")


@each_config
def test_works_on_tensors_without_values(config):
    """The meta device has shapes but no values, so nothing can have been read."""
    video = random_video(7)
    shadow = replace(
        video, features=video.features.to("meta"), raw_relevance=video.raw_relevance.to("meta")
    )
    [keep] = keep_indices([shadow], config)
    assert keep.device.type == "meta"
    assert keep.dtype == torch.int64 and keep.shape == (13,)


@pytest.mark.parametrize(
    "read", [lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0], torch.nonzero]
)
def test_the_guard_notices_reads(read):
    with pytest.raises(AssertionError, match="waits for the device"), NoHostSync():
        read(torch.ones(3))


def test_without_relevance_selection_is_by_diversity_alone():
    video = random_video(8)
    config = PruningConfig(segment_by="one")
    diverse = keep_indices([video], replace(config, relevance="none"))[0]
    assert torch.equal(diverse, keep_indices([replace(video, raw_relevance=None)], config)[0])
    assert torch.equal(diverse, keep_indices([video], replace(config, relevance_floor=1.0))[0])
    assert not torch.equal(diverse, keep_indices([video], config)[0])


def test_relevance_sign_and_strength_matter():
    """Orthogonal tokens: only relevance decides."""
    raw = torch.arange(12.0)
    video = VideoTokens(torch.eye(12), raw, 4, 3)
    keep = keep_indices([video], PruningConfig(segment_by="one"))[0]
    assert keep.tolist() == [8, 9, 10, 11]
    negative = PruningConfig(segment_by="one", relevance_sign="negative")
    assert keep_indices([video], negative)[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("segment_by", ["count", "scene"])
def test_budgets_follow_relevance(segment_by):
    generator = torch.Generator().manual_seed(0)
    scenes = torch.eye(2, 64).repeat_interleave(20, dim=0) * 5
    features = scenes + torch.randn(40, 64, generator=generator)
    raw = torch.cat([torch.rand(20, generator=generator) / 100, torch.ones(20)])
    video = VideoTokens(features, raw, 10, 4)
    config = PruningConfig(segment_by=segment_by, num_segments=2, relevance_floor=0.1)
    even = keep_indices([video], config)[0]
    assert int((even < 20).sum()) == 5
    uneven = keep_indices([video], replace(config, budget="relevance"))[0]
    assert int((uneven < 20).sum()) == 1


def test_no_other_choice_of_a_segment_repeats_a_token():
    """Every distinct token of a video of repeated frames is kept before any copy."""
    frame = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    video = VideoTokens(frame.repeat(4, 1), None, 6, 4)
    keep = keep_indices([video], PruningConfig(segment_by="one"))[0]
    assert sorted(index % 6 for index in keep.tolist()) == list(range(6))


def test_float_features_give_the_same_choice_in_every_dtype_that_holds_them():
    video = random_video(9, dtype=torch.bfloat16)
    wider = replace(video, features=video.features.float())
    double = replace(video, features=video.features.double())
    for config in ALL_CONFIGS[:4]:
        keeps = keep_indices([video, wider, double], config)
        assert torch.equal(keeps[0], keeps[1]) and torch.equal(keeps[0], keeps[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.ones(40)}, r"features must be \[N, D\] float, got shape \[40\]"),
        ({"features": torch.ones(40, 2).long()}, r"features .* got shape \[40, 2\] of torch.int64"),
        ({"num_kept": 41}, r"num_kept must be <= N = 40, got 41"),
        ({"num_kept": -1}, r"num_kept must be an integer >= 0, got -1"),
        ({"num_kept": 2.0}, r"num_kept must be an integer >= 0, got 2\.0"),
        ({"num_slices": 7}, r"num_slices must divide N \+ num_tail = 40 \+ 0, got 7"),
        ({"num_tail": 3}, r"num_slices must divide N \+ num_tail = 40 \+ 3, got 8"),
        ({"num_tail": -8}, r"num_tail must be an integer >= 0, got -8"),
        ({"num_tail": 8.0}, r"num_tail must be an integer >= 0, got 8\.0"),
        ({"num_slices": 0}, r"num_slices must be an integer >= 1, got 0"),
        ({"raw_relevance": torch.ones(39)}, r"raw_relevance must be \[40\] float, got .* \[39\]"),
        ({"raw_relevance": torch.ones(40, 1)}, r"raw_relevance .* got shape \[40, 1\]"),
        ({"raw_relevance": torch.ones(40).bool()}, r"raw_relevance .* of torch.bool"),
        ({"raw_relevance": torch.ones(40, device="meta")}, r"must be on cpu, got meta"),
    ],
)
def test_bad_videos(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(random_video(10), **changes)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["features", "raw_relevance"])
def test_validate_finds_what_is_not_finite(name, value):
    video = random_video(11)
    getattr(video, name)[3] = value
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        keep_indices([video], PruningConfig(), validate=True)


@each_config
@pytest.mark.parametrize("name", ["features", "raw_relevance"])
def test_not_finite_values_still_give_the_exact_count(config, name):
    video = random_video(12)
    getattr(video, name)[3] = torch.nan
    kept = keep_indices([video], config)[0].tolist()
    assert kept == sorted(set(kept)) and len(kept) == 13 and kept[-1] < 40


def test_validate_changes_nothing_on_good_input():
    video, config = random_video(13), PruningConfig()
    checked = keep_indices([video, replace(video, raw_relevance=None)], config, validate=True)
    assert torch.equal(checked[0], keep_indices([video], config)[0])


def test_empty_video():
    empty = VideoTokens(torch.zeros(0, 4), torch.zeros(0), 0, 1)
    assert keep_indices([empty], PruningConfig())[0].shape == (0,)


@pytest.mark.parametrize("backend", ["torch", "compiled"])
@each_config
def test_default_dtype_and_device_do_not_matter(config, backend):
    """vLLM builds models with defaults of its own."""
    config = replace(config, projection_dim=40)
    videos = [random_video(14), replace(random_video(15), raw_relevance=None)]
    expected = keep_indices(videos, config, backend=backend)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            low_rank._matrix.cache_clear()
            warm_up(torch.device("cpu"), 8, torch.float32)
            got = keep_indices(videos, config, backend=backend)
    finally:
        torch.set_default_dtype(dtype)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("backend", ["torch", "compiled"])
@each_config
def test_tensors_that_record_gradients_are_selected_from(config, backend):
    video = random_video(16)
    recording = replace(
        video,
        features=video.features.clone().requires_grad_(),
        raw_relevance=video.raw_relevance.clone().requires_grad_(),
    )
    [expected] = keep_indices([video], config)
    [kept] = keep_indices([recording], config, backend=backend)
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("config", [{"slices_per_segment": 1}, {"segment_by": "scene"}])
@pytest.mark.parametrize(("num_slices", "num_kept"), [(1, 2), (3000, 2999)])
def test_one_slice_and_thousands(config, num_slices, num_kept):
    video = random_video(17, num_slices=num_slices, tokens_per_slice=3, dim=8, num_kept=num_kept)
    config = PruningConfig(**config, num_segments=2000)
    assert keep_indices([video], config)[0].unique().numel() == num_kept
