"""The videos of the pruner benchmark."""

import torch

from .cases import SMALL, problem_of


def test_shapes():
    problem = problem_of()
    assert problem.features.shape == (192, 96)
    assert problem.by_segment.shape == (4, 48, 96)
    assert problem.segment_ids.bincount().tolist() == [48] * 4
    assert problem.video.num_kept == SMALL.num_kept == 48


def test_a_segment_of_ours_is_a_segment_of_theirs():
    problem = problem_of(num_segments=7, slices_per_segment=16)
    assert problem.video.tokens_per_slice == SMALL.tokens_per_segment
    assert (problem.settings.segment_by, problem.settings.slices_per_segment) == ("slices", 1)


def test_tokens_repeat_as_in_a_video():
    """Tokens resemble others of their cluster and nothing else: neither copies nor orthogonal."""
    rows = torch.nn.functional.normalize(problem_of().by_segment[0], dim=1)
    cosines = (rows @ rows.T)[~torch.eye(len(rows), dtype=torch.bool)]
    assert 0.6 < cosines.max() < 0.95
    assert cosines.abs().median() < 0.3


def test_a_part_is_the_start():
    problem = problem_of()
    part = problem.first(2)
    assert part.case.num_tokens == len(part.raw_relevance) == 96
    assert part.features.data_ptr() == problem.features.data_ptr()
    assert torch.equal(part.by_segment[1], problem.by_segment[1])


def test_a_seed_gives_one_video():
    assert torch.equal(problem_of(seed=5).features, problem_of(seed=5).features)
    assert not torch.equal(problem_of(seed=5).features, problem_of(seed=6).features)
