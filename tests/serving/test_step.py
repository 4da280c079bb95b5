"""The compact layout of a step, by hand and as a property of any chunking."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_dpp.serving.plan import MediaSpan, PrunedVideo, build_plan
from vllm_dpp.serving.step import ScheduledRequest, lay_out, lay_out_plain

PLAN = build_plan(
    [1] * 3 + [5] * 16 + [1] * 4 + [9, 1, 1],
    [MediaSpan(3, 16, True)],
    retention_ratio=0.25,
    turn_end_token_id=9,
    block_size=None,
)
"""26 tokens; the range [3, 24) loses 12."""

TWO_TURNS = build_plan(
    [1] * 2 + [5] * 8 + [1] * 2 + [5] * 8 + [1, 9] + [1] * 3 + [5] * 12 + [1, 9, 1],
    [MediaSpan(2, 8, True), MediaSpan(12, 8, True), MediaSpan(25, 12, True)],
    retention_ratio=0.5,
    turn_end_token_id=9,
    block_size=None,
)
"""40 tokens; [2, 22) has two videos and loses 8, [25, 39) loses 6."""


def request(name, plan, computed, scheduled):
    return ScheduledRequest(name, plan, computed, scheduled)


def lay(*requests, max_rows=1000):
    return lay_out(requests, max_rows)


def test_a_batch_without_plans_has_no_layout():
    assert lay(request("a", None, 0, 5), request("b", None, 7, 1)) is None
    assert lay() is None


def test_prefill_beside_a_decode_and_a_text_request():
    layout = lay(
        request("text", None, 0, 5), request("new", PLAN, 0, 26), request("old", PLAN, 26, 1)
    )
    assert (layout.num_rows, layout.num_compact_rows) == (32, 20)
    assert layout.num_pruned.tolist() == [0, 12, 12]
    (part,) = layout.ranges
    assert (part.request_id, part.row, part.first, part.num_rows) == ("new", 8, 0, 21)
    assert part.is_whole and part.compact_row == 8
    (video,) = PLAN.turns[0].videos
    assert part.pieces() == [(8, video), (12, (16, 21))]
    batch, compact = layout.plain
    assert batch.tolist() == [*range(8), 29, 30, 31]
    assert compact.tolist() == [*range(8), 17, 18, 19]
    (one,) = layout.passes
    assert one.query_start_loc.tolist() == [0, 5, 19, 20]
    assert one.seq_lens.tolist() == [5, 14, 15]
    assert one.positions().tolist() == [*range(5), *range(14), 14]


def test_decodes_past_a_range_run_as_without_pruning():
    layout = lay(request("text", None, 9, 1), request("old", PLAN, 30, 1))
    assert layout.is_plain and layout.num_compact_rows == layout.num_rows == 2
    assert layout.passes[0].positions().tolist() == [9, 18]


def test_a_chunk_that_ends_in_a_range_is_read_and_sends_up_what_comes_before():
    layout = lay(request("a", PLAN, 0, 10))
    (part,) = layout.ranges
    assert (part.row, part.first, part.num_rows, part.is_decided) == (3, 0, 7, False)
    assert layout.num_compact_rows == 3 and layout.passes[0].seq_lens.tolist() == [3]
    assert layout.num_pruned.tolist() == [7]


def test_a_chunk_inside_a_range_sends_nothing_up():
    layout = lay(request("a", PLAN, 10, 12))
    assert layout.passes == () and layout.num_compact_rows == 0
    assert (layout.ranges[0].first, layout.ranges[0].num_rows) == (7, 12)
    beside = lay(request("a", PLAN, 10, 12), request("text", None, 4, 1))
    assert beside.passes[0].requests.tolist() == [1], "no backend sees a request without rows"


def test_the_chunk_that_reaches_the_decision_sends_up_what_was_stored_as_well():
    layout = lay(request("a", PLAN, 22, 4))
    (part,) = layout.ranges
    assert (part.first, part.num_rows, part.is_decided, part.is_whole) == (19, 2, True, False)
    assert layout.num_compact_rows == 4 + 5 + 2, "kept tokens, the question, and two rows more"
    assert layout.passes[0].first_position.tolist() == [3]
    assert part.offsets_of((19, 24)) == (19, 21), "of the question only two tokens are in the step"


def test_a_chunk_over_two_turns():
    layout = lay(request("a", TWO_TURNS, 5, 25))
    first, second = layout.ranges
    assert (first.first, first.end, first.is_decided) == (3, 20, True)
    assert (second.first, second.end, second.is_decided) == (0, 5, False)
    videos = TWO_TURNS.turns[0].videos
    assert first.pieces() == [(0, videos[0]), (4, (8, 10)), (6, videos[1]), (10, (18, 20))]
    assert layout.plain.tolist() == [[17, 18, 19], [12, 13, 14]]


def test_rows_that_one_pass_cannot_take_go_in_order_of_tokens_computed():
    """The third found blocks that the first fills in this very step."""
    layout = lay(
        request("old", PLAN, 30, 1), request("new", PLAN, 22, 4), request("text", None, 0, 9),
        max_rows=8,
    )  # fmt: skip
    passes = [
        list(zip(p.requests.tolist(), p.num_scheduled.tolist(), strict=True)) for p in layout.passes
    ]
    assert passes == [[(2, 8)], [(1, 7), (2, 1)], [(0, 1), (1, 4)]]
    assert layout.passes[2].first_position.tolist() == [18, 10]
    rows = np.concatenate([one.rows for one in layout.passes])
    assert sorted(rows.tolist()) == list(range(layout.num_compact_rows))


BOUNDS = st.lists(st.integers(0, 44), min_size=2, unique=True).map(sorted)


@given(BOUNDS, st.integers(1, 30))
def test_chunks_fill_compact_positions_without_gap_or_overlap(bounds, max_rows):
    """Whatever the chunks, every token goes up once, if it is not pruned, and in order."""
    bounds = [0, *bounds] if bounds[0] else bounds
    positions, read = [], {turn.start: 0 for turn in TWO_TURNS.turns}
    for start, end in zip(bounds, bounds[1:], strict=False):
        layout = lay(request("a", TWO_TURNS, start, end - start), max_rows=max_rows)
        for one in layout.passes:
            assert 0 < one.num_rows <= max_rows
            positions += one.positions().tolist()
        placed = layout.plain[1].tolist()
        for part in layout.ranges:
            assert part.first == read[part.turn.start], "the range is read without a gap"
            read[part.turn.start] = part.end
            for row, piece in part.pieces() if part.is_decided else ():
                count = piece.num_kept if isinstance(piece, PrunedVideo) else piece[1] - piece[0]
                placed += range(row, row + count)
        assert sorted(placed) == list(range(layout.num_compact_rows))
        assert int(layout.num_pruned[0]) == end - TWO_TURNS.compact_length(end)
    assert positions == list(range(TWO_TURNS.compact_length(bounds[-1])))


@given(
    past=st.lists(
        st.tuples(st.sampled_from([None, PLAN, TWO_TURNS]), st.integers(0, 50)), min_size=1
    ),
    scheduled=st.integers(1, 6),
    max_rows=st.integers(1, 40),
)
def test_steps_past_all_ranges_have_a_shorter_way(past, scheduled, max_rows):
    """To the same layout."""
    plans = [plan for plan, _ in past]
    computed = [after + (plan.end if plan else 0) for plan, after in past]
    counts = [1 + (i * 7) % scheduled for i in range(len(past))]
    batch = zip(plans, computed, counts, strict=True)
    long = lay(*(request(str(i), *one) for i, one in enumerate(batch)), max_rows=max_rows)
    if long is None:
        assert not any(plans)
        return
    pruned = [plan.num_pruned if plan else 0 for plan in plans]
    short = lay_out_plain(computed, counts, pruned, max_rows)
    assert repr(short) == repr(long) and short.is_plain
    assert [one.positions().tolist() for one in short.passes] == [
        one.positions().tolist() for one in long.passes
    ]


def test_dtypes_are_what_the_kernels_read():
    layout = lay(request("a", PLAN, 0, 26))
    (one,) = layout.passes
    assert one.query_start_loc.dtype == layout.num_pruned.dtype == one.seq_lens.dtype == np.int32
    assert one.positions().dtype == one.rows.dtype == layout.plain.dtype == np.int64
