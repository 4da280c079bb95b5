"""What a selection holds: never a video in float32, never more than `workspace_bytes` says."""

from dataclasses import replace

import pytest
import torch

from vllm_dpp.pruning import PruningConfig, VideoTokens, keep_indices, rows, workspace_bytes

from .helpers import random_video
from .memory import peak_bytes

CPU = torch.device("cpu")
CONFIGS = [
    PruningConfig(slices_per_segment=3),
    PruningConfig(segment_by="count", num_segments=5, budget="relevance"),
    PruningConfig(segment_by="scene", num_segments=3),
    PruningConfig(segment_by="one"),
    PruningConfig(slices_per_segment=2, budget="spectrum"),
    PruningConfig(slices_per_segment=2, budget="gains"),
    PruningConfig(max_segment_tokens=60),
    PruningConfig(rule="change", max_segment_tokens=60, budget="gains"),
    PruningConfig(slices_per_segment=3, projection_dim=64),
    PruningConfig(slices_per_segment=1, max_kernel_bytes=1 << 17),
]
SHAPES = [
    {"num_slices": 10, "tokens_per_slice": 80, "dim": 512, "num_kept": 200},
    {"num_slices": 10, "tokens_per_slice": 120, "dim": 200, "num_kept": 90, "num_tail": 170},
    {"num_slices": 48, "tokens_per_slice": 20, "dim": 128, "num_kept": 500},
]


def bound_on(video, config, backend):
    return workspace_bytes(
        len(video.features),
        video.features.shape[1],
        video.num_kept,
        config,
        CPU,
        num_slices=video.num_slices,
        num_tail=video.num_tail,
        dtype=video.features.dtype,
        backend=backend,
    )


def peak_of(video, config, backend):
    def run():
        return keep_indices([video], config, backend=backend)

    run()  # makes what is made once
    return peak_bytes(run)


def describe(config):
    most = config.max_segment_tokens, config.max_kernel_bytes
    return f"{config.rule}-{config.segment_by}-{config.budget}-{config.projection_dim}-{most}"


@pytest.mark.parametrize("config", CONFIGS, ids=describe)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape["dim"]))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bound_holds_and_is_near(config, shape, dtype):
    video = random_video(0, dtype=dtype, **shape)
    peak = peak_of(video, config, "torch")
    assert peak <= bound_on(video, config, "torch") <= 2 * peak


@pytest.mark.parametrize("config", CONFIGS, ids=describe)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_bound_holds_where_features_are_cast_in_small_parts(config, dtype, monkeypatch):
    monkeypatch.setattr(rows, "_MAX_CAST_BYTES", 100_000)
    for backend in ("torch", "compiled"):
        for shape in SHAPES:
            video = random_video(0, dtype=dtype, **shape)
            assert peak_of(video, config, backend) <= bound_on(video, config, backend)


def test_the_bound_counts_rows_that_the_allocator_does_not_see():
    """Machine code allocates its Cholesky rows itself."""
    config = PruningConfig(segment_by="one")
    kernel_and_rows = 4 * 800 * (800 + 200)
    assert kernel_and_rows <= bound_on(random_video(0, **SHAPES[0]), config, "compiled")


@pytest.mark.parametrize("segment_by", ["slices", "scene", "one"])
@pytest.mark.parametrize("backend", ["torch", "compiled"])
def test_a_video_is_not_held_in_float32(segment_by, backend, monkeypatch):
    monkeypatch.setattr(rows, "_MAX_CAST_BYTES", 1 << 20)
    shape = {"num_slices": 8, "tokens_per_slice": 64, "dim": 8192, "num_kept": 50}
    video = random_video(0, dtype=torch.bfloat16, **shape)
    config = PruningConfig(segment_by=segment_by, slices_per_segment=2, budget="relevance")
    whole = 4 * video.features.numel()
    assert peak_of(video, config, backend) < whole / 2
    projected = replace(config, projection_dim=100)
    assert peak_of(video, projected, backend) < whole / 2


def test_by_hand():
    """Sixteen segments of 256 tokens, a quarter kept: kernels, Cholesky rows, and a cast."""
    config = PruningConfig(slices_per_segment=2)
    got = workspace_bytes(4096, 3584, 1024, config, CPU, num_slices=32, backend="torch")
    kernels, cholesky_rows, cast = 16 * 256**2 * 4, 16 * 64 * 256 * 4, 32 << 20
    assert max(kernels + cast, kernels + cholesky_rows) < got < 1.2 * (kernels + cast)


@pytest.mark.parametrize("num_kept", [0, 40])
def test_nothing_to_decide_takes_the_indices_alone(num_kept):
    video = random_video(1, num_kept=num_kept)
    assert bound_on(video, PruningConfig(), None) == 8 * num_kept


def test_numbers_that_fit_no_video():
    with pytest.raises(ValueError, match=r"num_slices must divide N \+ num_tail = 10 \+ 0, got 3"):
        workspace_bytes(10, 4, 5, PruningConfig(), CPU, num_slices=3)
    with pytest.raises(ValueError, match="num_kept must be <= N = 10, got 11"):
        workspace_bytes(10, 4, 11, PruningConfig(), CPU, num_slices=2)


def test_nothing_is_allocated_to_know():
    config = PruningConfig(segment_by="scene", budget="spectrum")

    def know():
        workspace_bytes(1 << 17, 3584, 1 << 15, config, CPU, num_slices=1 << 7)

    assert peak_bytes(know) < 1 << 16


def test_the_peak_is_that_of_the_allocator():
    ones = torch.ones(1000)
    assert 8000 <= peak_bytes(lambda: (ones + ones) * ones) < 8100
    assert 4000 <= peak_bytes(lambda: (ones + ones).sum()) < 4100


def test_tokens_are_those_of_features_cast_first(monkeypatch):
    monkeypatch.setattr(rows, "_MAX_CAST_BYTES", 40_000)
    for config in CONFIGS:
        for backend in ("torch", "compiled"):
            video = random_video(2, dtype=torch.float16, **SHAPES[1])
            cast = VideoTokens(
                video.features.float(), video.raw_relevance, 90, 10, num_tail=video.num_tail
            )
            kept = [keep_indices([v], config, backend=backend)[0] for v in (video, cast)]
            assert torch.equal(*kept)
