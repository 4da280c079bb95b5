"""Counts, decision points and questions, worked out by hand."""

import pytest
import torch

from tests.reference import MediaItem, Prompt, plan_videos

END = 9
NO_PIXELS = torch.empty(0)


def layout(*pieces: tuple[str, int] | int) -> Prompt:
    """A prompt of text tokens (given by id) and media items (given by modality and length)."""
    token_ids: list[int] = []
    media = []
    for piece in pieces:
        if isinstance(piece, int):
            token_ids.append(piece)
        else:
            modality, length = piece
            media.append(MediaItem(modality, len(token_ids), length, NO_PIXELS, (1, 2, 2 * length)))
            token_ids += [0] * length
    return Prompt(tuple(token_ids), tuple(media), turn_end_token_id=END)


@pytest.mark.parametrize(
    ("length", "ratio", "kept"),
    [
        (10, 0.25, 3),  # 2.5 rounds up
        (10, 0.24, 2),
        (1, 0.01, 1),  # never none
        (7, 0.5, 4),
        (64, 0.25, 16),
        (7, 0.999, 7),  # 6.993
        (7, 1.0, 7),
    ],
)
def test_number_kept(length: int, ratio: float, kept: int) -> None:
    (plan,) = plan_videos(layout(1, ("video", length), 2), ratio)
    assert plan.num_kept == kept


def test_the_turn_of_a_video_ends_at_the_next_turn_end_token() -> None:
    prompt = layout(1, END, ("video", 4), 5, ("image", 2), 6, END, 7, ("video", 3), 8)
    first, second = plan_videos(prompt, 0.5)
    assert (first.start, first.length, first.decision_point) == (2, 4, 11)
    assert first.question == (6, 9, 10)  # text between the video and d, without the image
    assert (second.start, second.decision_point) == (12, 16)  # no turn end: the end of the prompt
    assert second.question == (15,)


def test_videos_of_one_turn_share_its_decision_point_and_not_each_others_tokens() -> None:
    prompt = layout(("video", 2), 1, ("video", 2), 2, END, 3)
    first, second = plan_videos(prompt, 0.5)
    assert first.decision_point == second.decision_point == 7
    assert first.question == (2, 5, 6)
    assert second.question == (5, 6)


def test_a_video_at_the_end_has_no_question() -> None:
    (plan,) = plan_videos(layout(1, ("video", 4)), 0.5)
    assert (plan.decision_point, plan.question) == (5, ())


@pytest.mark.parametrize(
    ("lengths", "block_size", "kept"),
    [
        ([64], 16, [32]),  # ends at 65: a tail of 1, of 63 47 dropped, 15 given back
        ([60], 16, [28]),  # a tail of 13, of 47 35 dropped, 3 given back
        ([10], 16, [10]),  # fewer than a block: nothing is dropped
        ([40, 40], 16, [10, 22]),  # a tail of 1, 30 + 29 dropped, 11 given back to the last
        ([40, 4], 16, [24, 4]),  # the last is all tail; of the first, with 9, 23 dropped, 7 back
        ([24, 4], 16, [24, 4]),  # of the first 11 of 15 dropped, less than a block
    ],
)
def test_a_turn_drops_a_multiple_of_the_block_size(
    lengths: list[int], block_size: int, kept: list[int]
) -> None:
    prompt = layout(1, *(("video", length) for length in lengths), 2, END)
    plans = plan_videos(prompt, 0.25, block_size)
    assert [plan.num_kept for plan in plans] == kept
    assert sum(plan.length - plan.num_kept for plan in plans) % block_size == 0


def test_every_turn_is_rounded_by_itself() -> None:
    prompt = layout(("video", 40), 1, END, ("video", 40), 1, END)
    plans = plan_videos(prompt, 0.25, 16)
    assert [(plan.num_tail, plan.num_kept) for plan in plans] == [(8, 24), (2, 24)]
    assert [plan.num_kept for plan in plan_videos(prompt, 0.25)] == [10, 10]


def test_without_a_question_every_video_is_rounded_and_decided_by_itself() -> None:
    prompt = layout(("video", 40), ("video", 40), 1, END)
    first, second = plan_videos(prompt, 0.25, 16, question_free=True)
    assert (first.decision_point, first.question, first.num_tail) == (40, (), 8)
    assert (second.decision_point, second.question, second.num_tail) == (80, (), 0)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.01])
def test_ratio_outside_its_range_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="retention_ratio"):
        plan_videos(layout(("video", 4), 1), ratio)
