"""Projected features: cosines survive to within what the dimension promises."""

from dataclasses import replace

import pytest
import torch

from vllm_dpp.pruning import PruningConfig, VideoTokens, keep_indices, project
from vllm_dpp.pruning.dpp.kernel import similarity

from .helpers import ALL_CONFIGS, config_id, log_det, random_video, reference_kernel


def clustered(seed, num_tokens, dim):
    """Eight kinds of token, and noise about them."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, dim, generator=generator)
    kinds = torch.randint(8, (num_tokens,), generator=generator)
    return centres[kinds] + 0.4 * torch.randn(num_tokens, dim, generator=generator)


@pytest.mark.parametrize("dim", [64, 256, 1024])
def test_cosines_are_off_by_the_root_of_the_dimension(dim):
    features = clustered(0, 200, 2048)
    error = (similarity(project(features, dim)) - similarity(features)).square().mean().sqrt()
    assert 0.2 / dim**0.5 < error < 1.2 / dim**0.5


def test_the_same_rows_project_alike_wherever_they_are():
    features = clustered(1, 50, 300).bfloat16()
    alone = torch.cat([project(row[None], 40) for row in features])
    torch.testing.assert_close(project(features, 40), alone)
    assert alone.dtype == torch.float32


def test_nothing_is_done_where_it_would_not_shrink():
    features = torch.randn(3, 40)
    assert project(features, 40) is features and project(features, 50) is features
    with pytest.raises(ValueError, match="dim must be an integer >= 1, got 0"):
        project(features, 0)


@pytest.mark.parametrize("config", ALL_CONFIGS, ids=config_id)
def test_counts_stay_exact_below_the_rank_too(config):
    video = random_video(0, dim=64, num_kept=20)
    for dim in (1, 3, 30):
        [kept] = keep_indices([video], replace(config, projection_dim=dim))
        assert len(set(kept.tolist())) == 20


def test_a_wide_projection_loses_less_than_a_narrow_one_and_both_beat_chance():
    features, num_kept = clustered(2, 400, 2048), 40
    video = VideoTokens(features, None, num_kept, 1)
    kernel = reference_kernel(features, torch.ones(400))

    def volume(dim):
        config = PruningConfig(segment_by="one", projection_dim=dim)
        return log_det(kernel, keep_indices([video], config)[0].tolist())

    generator = torch.Generator().manual_seed(0)
    chance = log_det(kernel, torch.randperm(400, generator=generator)[:num_kept].tolist())
    gained = [(volume(dim) - chance) / (volume(None) - chance) for dim in (1024, 128)]
    assert 1 > gained[0] > 0.5 and gained[0] > gained[1] > 0.1, gained
