"""Prune plans: the arithmetic by hand, then the properties that the engine relies on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dpp.serving.plan import MediaSpan, PrunePlan, build_plan

END, TEXT, PAD = 9, 1, 5


def prompt(*parts):
    """Build (token ids, media) from parts: an int is text, "v8"/"i8" media, "e" a turn end."""
    tokens, media = [], []
    for part in parts:
        if part == "e":
            tokens.append(END)
        elif isinstance(part, int):
            tokens += [TEXT] * part
        else:
            media.append(MediaSpan(len(tokens), int(part[1:]), part[0] == "v"))
            tokens += [PAD] * int(part[1:])
    return tokens, media


def plan(*parts, ratio=0.25, block_size=None):
    tokens, media = prompt(*parts)
    return build_plan(
        tokens, media, retention_ratio=ratio, turn_end_token_id=END, block_size=block_size
    )


def test_one_video_keeps_a_quarter_and_ends_at_the_turn_end():
    (turn,) = plan(3, "v16", 4, "e", 2).turns
    (video,) = turn.videos
    assert (turn.start, turn.end) == (3, 3 + 16 + 4 + 1)
    assert (video.start, video.length, video.num_kept) == (3, 16, 4)
    assert video.question == ((19, 24),)


def test_without_a_turn_end_the_prompt_ends_the_turn():
    (turn,) = plan(3, "v16", 4).turns
    assert turn.end == 23


def test_two_videos_of_a_turn_share_the_decision_point():
    (turn,) = plan(1, "v8", 2, "v12", 3, "e", 5).turns
    assert turn.end == 1 + 8 + 2 + 12 + 3 + 1
    assert [v.num_kept for v in turn.videos] == [2, 3]
    assert [v.question for v in turn.videos] == [((9, 11), (23, 27)), ((23, 27),)]
    assert [v.media_index for v in turn.videos] == [0, 1]


def test_a_question_skips_images_between_video_and_turn_end():
    (turn,) = plan("v8", 1, "i4", 2, "e").turns
    assert turn.videos[0].question == ((8, 9), (13, 16))


def test_two_turns_are_planned_apart():
    two = plan(2, "v8", 1, "e", 3, "v16", 1, "e")
    assert [(t.start, t.end, t.num_pruned) for t in two.turns] == [(2, 12, 6), (15, 33, 12)]
    assert two.start == 2 and two.longest_range == 18


@pytest.mark.parametrize("parts", [(5, "e"), (2, "i8", 3, "e"), ()])
def test_nothing_to_prune_makes_no_plan(parts):
    assert plan(*parts) is None


def test_ratio_one_makes_no_plan():
    assert plan(2, "v8", "e", ratio=1.0) is None


def test_pruned_tokens_round_down_to_whole_blocks_from_the_last_video():
    """6 + 9 = 15 pruned tokens at block size 8: 7 go back, all to the last video."""
    (turn,) = plan("v8", "v12", 1, "e", block_size=8).turns
    assert [v.num_kept for v in turn.videos] == [2, 10]
    assert turn.num_pruned == 8


def test_a_turn_that_cannot_lose_a_block_is_not_pruned():
    assert plan("v8", 1, "e", block_size=8) is None


def test_surplus_reaches_earlier_videos():
    """30 + 3 = 33 pruned at block size 8: one token goes back, to the last video."""
    (turn,) = plan("v40", "v4", 1, "e", block_size=8).turns
    assert [v.num_kept for v in turn.videos] == [10, 2]
    # 30 + 3 = 33 pruned at block size 10: three go back, so the last video stays whole.
    (turn,) = plan("v40", "v4", 1, "e", block_size=10).turns
    assert [(v.media_index, v.num_kept) for v in turn.videos] == [(0, 10)]
    # At block size 29 four go back: three to the last video, one to the first.
    (turn,) = plan("v40", "v4", 1, "e", block_size=29).turns
    assert [(v.media_index, v.num_kept) for v in turn.videos] == [(0, 11)]


def test_counts_before_inside_and_after_a_range():
    one = plan(3, "v16", 4, "e", 2)
    assert [one.num_pruned(n) for n in (0, 3, 24, 26)] == [0, 0, 12, 12]
    assert one.compact_length(26) == 14
    for inside in (4, 19, 23):
        with pytest.raises(ValueError, match="inside the atomic range"):
            one.num_pruned(inside)


def test_chunks_end_at_the_range_start_or_not_at_all():
    one = plan(3, "v16", 4, "e", 2)
    assert [one.range_start(n) for n in (2, 3, 4, 23, 24, 26)] == [2, 3, 3, 3, 24, 26]
    assert [one.range_end(n) for n in (2, 3, 4, 23, 24, 26)] == [2, 3, 24, 24, 24, 26]


PARTS = st.lists(
    st.one_of(
        st.integers(1, 6),
        st.just("e"),
        st.integers(1, 40).map(lambda n: f"v{n}"),
        st.integers(1, 9).map(lambda n: f"i{n}"),
    ),
    max_size=12,
)


@given(PARTS, st.floats(0.05, 1.0), st.sampled_from([None, 4, 16]))
def test_any_plan_is_sound(parts, ratio, block_size):
    made = plan(*parts, ratio=ratio, block_size=block_size)
    if made is None:
        return
    tokens, media = prompt(*parts)
    end = 0
    for turn in made.turns:
        assert end <= turn.start < turn.end <= len(tokens)
        end = turn.end
        assert block_size is None or turn.num_pruned % block_size == 0
        assert all(1 <= v.num_kept < v.length for v in turn.videos)
        assert turn.end == len(tokens) or tokens[turn.end - 1] == END
        for video in turn.videos:
            assert media[video.media_index].start == video.start
            assert all(tokens[i] != PAD for a, b in video.question for i in range(a, b))
    lengths = [made.compact_length(n) for n in range(len(tokens)) if made.range_start(n) == n]
    assert lengths == sorted(lengths)


@given(PARTS, PARTS)
def test_what_follows_a_turn_does_not_change_it(before, after):
    """Nothing past the decision point is read, so a cached prefix and a fresh one agree."""
    short = plan(*before, 1, "v20", 2, "e")
    long = plan(*before, 1, "v20", 2, "e", *after)
    assert long.turns[: len(short.turns)] == short.turns


def test_the_plan_is_a_value():
    assert plan(3, "v16", "e") == plan(3, "v16", "e")
    assert isinstance(hash(plan(3, "v16", "e")), int)
    assert isinstance(plan(3, "v16", "e"), PrunePlan)
