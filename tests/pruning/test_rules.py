"""The door, and what each rule does; the DPP has tests of its own, and so have its backends."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vllm_dpp.pruning import PruningConfig, VideoTokens, keep_indices, naive_keep_indices, rows
from vllm_dpp.pruning.rules import RULES, each
from vllm_dpp.pruning.rules.change import FLOOR, change, quality

from .helpers import random_video

CELLS = 6


def moving(scene: Tensor, *moved: int) -> Tensor:
    """The next slice of [CELLS, D]: the same but for some cells."""
    after = scene.clone()
    after[list(moved)] = torch.randn(len(moved), scene.shape[1])
    return after


def scene(seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(CELLS, 32)


def video(slices: list[Tensor], num_kept: int, num_tail: int = 0) -> VideoTokens:
    features = torch.cat(slices)
    features = features[: len(features) - num_tail]
    return VideoTokens(features, torch.rand(len(features)), num_kept, len(slices), num_tail)


def kept(tokens: VideoTokens, rule: str) -> list[int]:
    (indices,) = keep_indices([tokens], PruningConfig(rule=rule, segment_by="one"))
    return indices.tolist()


def test_a_rule_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def last(video: VideoTokens) -> Tensor:
        return torch.arange(len(video.features) - video.num_kept, len(video.features))

    monkeypatch.setitem(RULES, "last", each(last))
    assert kept(random_video(0, num_kept=3), "last") == [37, 38, 39]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_kept", [0, 1, 12, 37])
@pytest.mark.parametrize("num_tail", [0, 3])
def test_how_many_stay_is_never_a_rules_business(rule: str, num_kept: int, num_tail: int) -> None:
    tokens = random_video(3, num_kept=num_kept, num_tail=num_tail)
    beside = random_video(4, num_slices=3, num_kept=2)
    alone, together = (
        keep_indices(v, PruningConfig(rule=rule)) for v in ([tokens], [beside, tokens])
    )
    assert alone[0].tolist() == together[1].tolist() == sorted(set(alone[0].tolist()))
    assert len(alone[0]) == num_kept and alone[0].dtype == torch.int64


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="rule must be one of"):
        PruningConfig(rule="best")


def test_of_what_is_alike_the_last_slice_stays_where_no_question_is_read() -> None:
    still = torch.cat([scene()] * 4)
    last = PruningConfig(relevance="none", last_slice_weight=3.0)

    def chosen(config: PruningConfig, raw: Tensor | None = None, **of_video: int) -> list[int]:
        [indices] = keep_indices([VideoTokens(still, raw, CELLS, 4, **of_video)], config)
        return indices.tolist()

    assert chosen(PruningConfig(relevance="none")) == [0, 1, 2, 3, 4, 5]
    assert chosen(last) == [18, 19, 20, 21, 22, 23]
    assert chosen(last, num_last=2) == [0, 1, 2, 3, 22, 23]
    asked, raw = replace(last, relevance="question"), torch.linspace(1, 0, len(still))
    assert chosen(asked, raw) == chosen(replace(asked, last_slice_weight=1.0), raw)
    with pytest.raises(ValueError, match="num_last must be <= N = 24, got 25"):
        chosen(last, num_last=25)


def test_attention_keeps_what_the_question_looks_at() -> None:
    features, raw = torch.randn(6, 4), torch.tensor([0.1, 0.5, 0.2, 0.5, 0.0, 0.3])
    assert kept(VideoTokens(features, raw, 3, 2), "attention") == [1, 3, 5]
    with pytest.raises(ValueError, match="relevance 'question'"):
        kept(VideoTokens(features, None, 3, 2), "attention")
    with pytest.raises(ValueError, match="rule 'attention' needs relevance 'question'"):
        PruningConfig(rule="attention", relevance="none")


def test_uniform_keeps_as_many_of_every_slice() -> None:
    tokens = random_video(0, num_slices=6, tokens_per_slice=10, num_kept=21)
    counts = torch.tensor(kept(tokens, "uniform")).div(10, rounding_mode="floor").bincount()
    assert sorted(counts.tolist()) == [3, 3, 3, 4, 4, 4]


def test_random_keeps_more_of_the_same() -> None:
    few, many = (set(kept(random_video(0, num_kept=n), "random")) for n in (5, 20))
    assert few < many and few != set(range(5))


def test_change_is_the_distance_to_the_most_alike_of_the_slice_before() -> None:
    first = scene()
    second = moving(first, 2, 5)
    found = change(video([first, second], 3))
    cosine = torch.nn.functional.cosine_similarity(first[None], second[:, None], dim=2)
    expected = (1 - cosine.amax(1)).clamp(min=0).sqrt()
    assert torch.allclose(found[CELLS:], expected, atol=5e-3)
    assert found[CELLS:].nonzero().flatten().tolist() == [2, 5]
    assert (found[:CELLS] == found[CELLS:].max()).all(), "the first slice is as new as it gets"
    assert quality(found).aminmax() == (pytest.approx(FLOOR), pytest.approx(1))


def test_what_has_only_moved_is_not_new() -> None:
    """What a slice shows, the next one shows elsewhere; two of its cells show something else."""
    first = scene()
    second = moving(first.roll(3, dims=0), 2, 5)
    found = change(video([first, second], 3))
    assert found[CELLS:].nonzero().flatten().tolist() == [2, 5]


@pytest.mark.parametrize("cells", [3, 40, 700])
def test_change_is_the_same_in_any_parts(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tokens = video(list(torch.randn(5, cells, 6)), 3, num_tail=2)
    whole = change(tokens)
    monkeypatch.setattr(rows, "_MAX_CAST_BYTES", 4 * 300)
    assert torch.allclose(change(tokens), whole, atol=1e-6)


def test_what_moved_is_kept_before_what_stood_still() -> None:
    first = scene()
    second = moving(first, 2)
    third = moving(second, 4)
    found = kept(video([first, second, third], CELLS + 2), "change")
    assert found == [*range(CELLS), CELLS + 2, 2 * CELLS + 4]


def test_a_cut_is_new_in_whole() -> None:
    first, other = scene(), scene(1)
    found = kept(video([first, first, other, other], 2 * CELLS), "change")
    assert found == [*range(CELLS), *range(2 * CELLS, 3 * CELLS)]


def test_what_adds_next_to_nothing_is_kept_in_order_of_time() -> None:
    """A cell that changes by an eighth is kept before others; by a thirtieth, it is like them."""
    first = torch.eye(CELLS, 32)
    for size, kept_then in ((1 / 8, 2 * CELLS + 3), (1 / 30, CELLS)):
        later = first.clone()
        later[3, CELLS] = size
        found = kept(video([first, first, later, first], CELLS + 1), "change")
        assert found == [*range(CELLS), kept_then], size


@pytest.mark.parametrize("num_slices", [1, 4])
def test_without_change_it_is_diversity_alone(num_slices: int) -> None:
    """A picture, a still video, one whose identical slices differ by rounding."""
    tokens = video([scene()] * num_slices, 4)
    assert len(quality(change(tokens)).unique()) == 1
    noisy = tokens.features * (1 + 1e-6 * torch.rand(len(tokens.features), 1))
    noisy_tokens = VideoTokens(noisy, None, 4, num_slices)
    assert quality(change(noisy_tokens)).std(correction=0) < 1e-3
    assert kept(tokens, "change") == kept(tokens, "change")
    assert len({index % CELLS for index in kept(tokens, "change")}) == 4, "no cell twice"


def test_constant_change_is_diversity_alone() -> None:
    """Every token goes round by one angle from slice to slice."""
    plane = torch.eye(2 * CELLS).reshape(CELLS, 2, 2 * CELLS)
    angles = torch.arange(4) * 0.5
    slices = [plane[:, 0] * a.cos() + plane[:, 1] * a.sin() for a in angles]
    found = quality(change(video(slices, 4)))
    assert found.std() < 1e-5


@pytest.mark.parametrize("num_tail", [0, 4, 7])
def test_a_tail_is_not_looked_at(num_tail: int) -> None:
    slices = [scene(i) for i in range(4)]
    whole, cut = change(video(slices, 3)), change(video(slices, 3, num_tail))
    assert torch.allclose(cut[CELLS:], whole[CELLS : 4 * CELLS - num_tail], atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_values_that_are_none(value: float) -> None:
    slices = [scene(i) for i in range(3)]
    slices[1][2] = value
    found = kept(video(slices, 7), "change")
    assert len(set(found)) == 7


def test_the_reference_knows_no_rules_for_comparison() -> None:
    with pytest.raises(ValueError, match="the reference knows"):
        naive_keep_indices([random_video(0)], PruningConfig(rule="uniform"))
