"""Every way to select gives the same tokens, and says where it cannot be had."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vllm_dpp.pruning import Segments, keep_indices, naive_keep_indices
from vllm_dpp.pruning.dpp.select import SegmentedTokens, select, warm_up

from .helpers import ALL_CONFIGS, config_id, random_video, still_video

each_config = pytest.mark.parametrize("config", ALL_CONFIGS, ids=config_id)

# Run by Triton's interpreter, in a process of its own: Triton chooses when it is imported.
FUSED = """
from dataclasses import replace
import torch
from tests.pruning.helpers import ALL_CONFIGS, random_video, still_video
from tests.pruning.memory import peak_bytes
from vllm_dpp.pruning import PruningConfig, keep_indices, naive_keep_indices
from vllm_dpp.pruning.dpp import select
from vllm_dpp.pruning.dpp.fused import fused_bytes
from vllm_dpp.pruning.rules.dpp import objective_of, relevance_of, segmented
from vllm_dpp.pruning.dpp.select import warm_up

videos = [
    random_video(0),
    random_video(1, num_slices=7, tokens_per_slice=9, num_kept=20),
    random_video(2, num_kept=0),
    random_video(3, num_slices=1, tokens_per_slice=4, num_kept=2),
    random_video(5, num_slices=7, num_tail=8),
    still_video(6),
]
others = [random_video(4, dtype=dtype, dim=dim) for dtype, dim in
          [(torch.bfloat16, 48), (torch.float64, 48), (torch.float32, 30)]]
configs = [*ALL_CONFIGS[::5], ALL_CONFIGS[-3]]  # the interpreter is slow
for config in configs:
    for batch in (videos, [*videos, *others][::-1]):
        got = [keep.tolist() for keep in keep_indices(batch, config, backend="fused")]
        assert got == naive_keep_indices(batch, config), config
    small = PruningConfig(**{**vars(config), "max_kernel_bytes": 1})
    got = [keep.tolist() for keep in keep_indices(videos, small, backend="fused")]
    assert got == naive_keep_indices(videos, config), config
    # The interpreter keeps what it was given, so no more than the selection can be measured.
    for settings in (config, small):
        of_rule = relevance_of(videos[1], settings), settings, objective_of(settings)
        problem = segmented(videos[1], *of_rule)
        problem = replace(problem, total=None)  # what follows then is counted elsewhere
        at_once = settings.max_kernel_bytes
        sizes = 63, len(problem.segments), problem.segments.longest, problem.max_budget, at_once
        peak = peak_bytes(lambda: select.select([problem], at_once, "fused"))
        assert fused_bytes(*sizes) / 2 <= peak <= fused_bytes(*sizes), (peak, sizes)
warm_up(torch.device("cpu"), 32, torch.float32)
# As on a GPU, where the longest of these videos are left to PyTorch.
select.fastest_backend, select._MOST_FUSED = lambda device: "fused", 120
got = [keep.tolist() for keep in keep_indices(videos, configs[0])]
assert got == naive_keep_indices(videos, configs[0])
print(*(config.segment_by for config in configs))
"""


@each_config
@pytest.mark.parametrize("backend", ["torch", "compiled"])
@pytest.mark.parametrize("max_kernel_bytes", [1, 4 * 15**2 * 2, 1 << 28])
def test_memory_bounds_change_no_token(config, backend, max_kernel_bytes):
    longer = random_video(1, num_slices=7, tokens_per_slice=9, num_kept=20)
    videos = [random_video(0), longer, still_video(2)]
    bounded = replace(config, max_kernel_bytes=max_kernel_bytes)
    got = [keep.tolist() for keep in keep_indices(videos, bounded, backend=backend)]
    assert got == naive_keep_indices(videos, config)


def test_fused_kernels_select_for_all_videos_at_once():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", FUSED],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"slices", "count", "scene", "one"}


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("fast", "backend must be one of 'torch', 'compiled', 'fused', got 'fast'"),
        ("fused", "backend 'fused' needs an NVIDIA GPU and Triton, got cpu; leave it out"),
    ],
)
def test_backends_that_cannot_be_had(backend, message):
    with pytest.raises(ValueError, match=message):
        keep_indices([random_video(0)], ALL_CONFIGS[0], backend=backend)


@pytest.mark.parametrize("backend", ["torch", "compiled"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bound", [1, 1 << 28])
def test_a_segment_that_is_not_finite_takes_no_step(backend, value, bound):
    """Nor does one of zeros or of budget 0; all others do."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 8, generator=generator)
    features[7, 3], features[10:15] = value, 0
    segments = Segments.between([0, 5, 10, 15, 20, 30], features.device)
    budgets = torch.tensor([2, 3, 2, 0, 1])
    relevance = torch.rand(30, generator=generator)
    video = SegmentedTokens(features, relevance, segments, budgets, 3)
    [selected] = select([video], bound, backend)
    assert selected.began.tolist() == [True, False, False, False, True]
    assert int(selected.keep.sum()) == 8


def test_nothing_to_select_and_nothing_to_compile_twice():
    assert select([], 1) == []
    for _ in range(2):
        warm_up(torch.device("cpu"), 5, torch.bfloat16)
