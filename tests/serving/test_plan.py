"""Prune plans: the arithmetic by hand, then the properties that the engine relies on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dpp.serving.plan import MediaSpan, PrunePlan, build_plan, loses_a_block

END, TEXT, PAD = 9, 1, 5


def prompt(*parts):
    """Build (token ids, media) from parts: an int is text, "v8"/"i8" media, "e" a turn end, and
    "v8+6" a video of 8 tokens with 6 of text among them."""
    tokens, media = [], []
    for part in parts:
        if part == "e":
            tokens.append(END)
        elif isinstance(part, int):
            tokens += [TEXT] * part
        else:
            own, _, among = part[1:].partition("+")
            length, text = int(own) + int(among or 0), int(among or 0)
            media.append(MediaSpan(len(tokens), length, part[0] == "v", text))
            tokens += [PAD] * length
    return tokens, media


def plan(*parts, ratio=0.25, block_size=None, turn_end=END):
    tokens, media = prompt(*parts)
    return build_plan(
        tokens, media, retention_ratio=ratio, turn_end_token_id=turn_end, block_size=block_size
    )


def counts(turn):
    """Start, tokens up for selection, tokens kept of these, and tail of each video."""
    return [(v.start, v.length, v.num_kept, v.num_tail) for v in turn.videos]


def test_one_video_keeps_a_quarter_and_ends_at_the_turn_end():
    (turn,) = plan(3, "v16", 4, "e", 2).turns
    assert (turn.start, turn.decided, turn.end, turn.length) == (3, 19, 24, 21)
    assert counts(turn) == [(3, 16, 4, 0)]
    assert turn.videos[0].question == ((19, 24),) and turn.videos[0].question_length == 5


@pytest.mark.parametrize("ratio", [0.1, 0.25, 1 / 3, 0.5, 0.9])
@pytest.mark.parametrize("block_size", [8, 32])
def test_a_video_of_so_many_tokens_loses_a_block_wherever_it_stands(ratio, block_size):
    def losing(length):
        return [plan(1 + at, f"v{length}", ratio=ratio, block_size=block_size) is not None
                for at in range(block_size)]  # fmt: skip

    length = loses_a_block(block_size, ratio)
    assert all(losing(length)) and not all(losing(length - 1))


def test_without_a_turn_end_the_prompt_ends_the_turn():
    (turn,) = plan(3, "v16", 4).turns
    assert turn.end == 23


def test_two_videos_of_a_turn_share_the_decision_point():
    (turn,) = plan(1, "v8", 2, "v12", 3, "e", 5).turns
    assert turn.end == 1 + 8 + 2 + 12 + 3 + 1
    assert counts(turn) == [(1, 8, 2, 0), (11, 12, 3, 0)]
    assert [v.question for v in turn.videos] == [((9, 11), (23, 27)), ((23, 27),)]


def test_without_a_question_each_video_is_decided_at_its_own_end():
    first, second = plan(1, "v8", 2, "v12", 3, "e", turn_end=None).turns
    assert (first.start, first.decided, first.end) == (1, 9, 9)
    assert (second.start, second.decided, second.end) == (11, 23, 23)
    assert first.videos[0].question == second.videos[0].question == ()


def test_a_question_skips_images_between_video_and_turn_end():
    (turn,) = plan("v8", 1, "i4", 2, "e").turns
    assert turn.videos[0].question == ((8, 9), (13, 16))


def test_two_turns_are_planned_apart():
    two = plan(2, "v8", 1, "e", 3, "v16", 1, "e")
    assert [(t.start, t.end, t.num_pruned) for t in two.turns] == [(2, 12, 6), (15, 33, 12)]
    assert (two.start, two.num_pruned) == (2, 18)


@pytest.mark.parametrize("parts", [(5, "e"), (2, "i8", 3, "e"), ()])
def test_nothing_to_prune_makes_no_plan(parts):
    assert plan(*parts) is None


def test_ratio_one_makes_no_plan():
    assert plan(2, "v8", "e", ratio=1.0) is None


def test_pruned_tokens_end_with_a_block_and_fill_whole_ones():
    """The video ends at 43, three tokens into a block: 37 are up for selection, 9 stay of them
    and 28 go; at block size 8 four come back."""
    (turn,) = plan(3, "v40", 6, "e", block_size=8).turns
    assert counts(turn) == [(3, 37, 13, 3)]
    assert (turn.decided, turn.end, turn.num_pruned) == (40, 50, 24)


def test_only_the_last_video_of_a_turn_has_a_tail():
    """6 + 12 of 8 + 16 go, the last video ends at 24; two come back, to the last."""
    (turn,) = plan("v8", "v18", 1, "e", block_size=8).turns
    assert counts(turn) == [(0, 8, 2, 0), (8, 16, 6, 2)]


def test_a_turn_that_cannot_lose_a_block_is_not_pruned():
    assert plan("v8", 1, "e", block_size=8) is None
    assert plan(5, "v10", 1, "e", block_size=16) is None


def test_a_last_video_that_loses_nothing_is_left_out_and_the_one_before_it_is_the_last():
    """Of "v40" and "v4" the second ends at 44, 4 after a block of 10: all of it would be tail."""
    (turn,) = plan("v40", "v4", 1, "e", block_size=10).turns
    assert counts(turn) == [(0, 40, 10, 0)]
    # "v40" loses 30 and "v8" 4 of 5 (it ends 3 after a block): 34, of which 4 go back to the last,
    # which then loses nothing. So "v40" is the last: it loses 22 of 30, and 7 come back.
    (turn,) = plan("v40", "v8", 1, "e", block_size=15).turns
    assert counts(turn) == [(0, 30, 15, 10)]


def test_text_between_slices_stays_and_counts():
    """40 tokens and 9 of text end at 52, four past a block: 36 are up for selection, and end at 48
    with all of the text that may stand there. 27 of them go, and three come back."""
    (turn,) = plan(3, "v40+9", 6, "e", block_size=8).turns
    assert counts(turn) == [(3, 36, 12, 4)]
    assert (turn.videos[0].num_text, turn.decided, turn.end, turn.num_pruned) == (9, 48, 59, 24)
    (turn,) = plan(3, "v16+4", 4, "e").turns
    assert counts(turn) == [(3, 16, 4, 0)]
    assert (turn.decided, turn.end, turn.length) == (23, 28, 25)
    assert turn.videos[0].question == ((23, 28),)


@given(
    st.integers(1, 60), st.integers(0, 30), st.integers(0, 9), st.sampled_from([4, 16]), st.data()
)
def test_wherever_text_stands_the_first_tokens_end_before_the_block(
    own, among, before, block_size, data
):
    made = plan(before, f"v{own}+{among}", 2, "e", block_size=block_size)
    if made is None:
        return
    (video,) = made.turns[0].videos
    is_text = data.draw(st.permutations([True] * among + [False] * own))
    places = [place for place, text in enumerate(is_text) if not text]
    assert places[video.length - 1] < video.end - video.start
    assert video.length + video.num_tail == own
    assert video.end - video.start == video.length + video.num_text


def test_the_upper_layers_hold_nothing_of_a_range_until_it_is_decided():
    one = plan(3, "v16", 4, "e", 2)
    assert [one.compact_length(n) for n in (0, 3, 4, 19, 23, 24, 26)] == [0, 3, 3, 3, 3, 12, 14]
    assert one.turn_at(3) is None and one.turn_at(24) is None
    assert one.turn_at(4) is one.turn_at(23) is one.turns[0]


def test_a_hit_ends_before_the_pruned_tokens_or_past_them():
    one = plan(3, "v40", 6, "e", block_size=8)  # pruned tokens are in [3, 40)
    assert [one.hit_length(n, 8) for n in (2, 3, 20, 39, 40, 44, 50)] == [0, 0, 0, 0, 40, 40, 48]


def test_a_turn_that_was_found_in_the_cache_is_decided_where_its_pruned_tokens_end():
    two = plan(3, "v40", 6, "e", 6, "v40", 5, "e", block_size=8)
    first, second = two.turns
    assert two.after_hit(0) is two and two.after_hit(3) is two
    hit = two.after_hit(40)
    assert [t.end for t in hit.turns] == [40, second.end]
    assert hit.compact_length(45) == 45 - first.num_pruned and hit.turn_at(45) is None
    assert two.compact_length(45) == 3 and two.turn_at(45) is first
    assert two.after_hit(second.decided).turns[1].end == second.decided


PARTS = st.lists(
    st.one_of(
        st.integers(1, 6),
        st.just("e"),
        st.integers(1, 40).map(lambda n: f"v{n}"),
        st.tuples(st.integers(1, 40), st.integers(1, 20)).map(lambda n: f"v{n[0]}+{n[1]}"),
        st.integers(1, 9).map(lambda n: f"i{n}"),
    ),
    max_size=12,
)


@given(PARTS, st.floats(0.05, 1.0), st.sampled_from([None, 4, 16]), st.sampled_from([END, None]))
def test_any_plan_is_sound(parts, ratio, block_size, turn_end):
    made = plan(*parts, ratio=ratio, block_size=block_size, turn_end=turn_end)
    if made is None:
        return
    tokens, media = prompt(*parts)
    videos = {item.start: item for item in media if item.is_prunable}
    end = 0
    for turn in made.turns:
        assert end <= turn.start < turn.decided <= turn.end <= len(tokens)
        end = turn.end
        if block_size is not None:
            assert turn.num_pruned % block_size == turn.decided % block_size == 0
        if turn_end is None:
            assert turn.end == turn.decided and len(turn.videos) == 1
        else:
            assert turn.end == len(tokens) or tokens[turn.end - 1] == END
        assert all(v.num_tail == 0 for v in turn.videos[:-1])
        for video in turn.videos:
            assert 0 <= video.num_kept < video.length
            assert video.length + video.num_tail == videos[video.start].num_tokens
            assert all(tokens[i] != PAD for a, b in video.question for i in range(a, b))


@given(PARTS, st.sampled_from([4, 16]), st.data())
def test_lengths_never_shrink_and_no_hit_changes_what_is_held_past_it(parts, block_size, data):
    made = plan(*parts, block_size=block_size)
    if made is None:
        return
    tokens, _ = prompt(*parts)
    lengths = [made.compact_length(n) for n in range(len(tokens) + 1)]
    assert lengths == sorted(lengths) and lengths[-1] == len(tokens) - made.num_pruned
    num_cached = made.hit_length(data.draw(st.integers(0, len(tokens))), block_size)
    hit = made.after_hit(num_cached)
    assert hit.compact_length(num_cached) % block_size == 0, "a hit holds whole compact blocks"
    assert hit.turn_at(num_cached) is None
    for n in range(num_cached, len(tokens) + 1):
        turn = made.turn_at(n)
        if turn is None or turn.decided > num_cached:
            assert hit.compact_length(n) == lengths[n]
        else:
            assert hit.compact_length(n) == n - (turn.end - made.compact_length(turn.end))


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
