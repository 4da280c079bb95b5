"""The compact layout of a step, by hand and as a property of any chunking."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dpp.serving.plan import MediaSpan, build_plan
from vllm_dpp.serving.step import ScheduledRequest, lay_out

PLAN = build_plan(
    [1] * 3 + [5] * 16 + [1] * 4 + [9, 1, 1],
    [MediaSpan(3, 16, True)],
    retention_ratio=0.25,
    turn_end_token_id=9,
    block_size=None,
)
"""26 tokens; the range [3, 24) loses 12."""


def request(name, plan, computed, scheduled):
    return ScheduledRequest(name, plan, computed, scheduled)


def test_a_batch_without_plans_has_no_layout():
    assert lay_out([request("a", None, 0, 5), request("b", None, 7, 1)]) is None
    assert lay_out([]) is None


def test_prefill_beside_a_decode_and_a_text_request():
    layout = lay_out(
        [request("text", None, 0, 5), request("new", PLAN, 0, 26), request("old", PLAN, 26, 1)]
    )
    assert layout.num_rows == 32
    assert layout.query_start_loc.tolist() == [0, 5, 19, 20]
    assert layout.num_pruned.tolist() == [0, 12, 12]
    assert layout.num_compact_rows == 20
    assert layout.num_scheduled.tolist() == [5, 14, 1]
    positions = layout.compact_positions().tolist()
    assert positions == [*range(5), *range(14), 14]
    (rows,) = layout.videos
    assert (rows.request_id, rows.start, rows.end) == ("new", 8, 24)
    assert rows.question == ((24, 29),)


def test_a_chunk_before_the_video_prunes_nothing_yet():
    layout = lay_out([request("a", PLAN, 0, 3)])
    assert layout.videos == () and layout.num_compact_rows == 3
    assert layout.num_pruned.tolist() == [0]


def test_the_chunk_after_that_starts_at_the_video():
    layout = lay_out([request("a", PLAN, 3, 21)])
    assert layout.videos[0].start == 0
    assert layout.first_position.tolist() == [3]
    assert layout.compact_positions().tolist() == list(range(3, 12))


def test_a_chunk_that_splits_a_range_is_an_error():
    with pytest.raises(ValueError, match="atomic range"):
        lay_out([request("a", PLAN, 0, 10)])


@given(st.lists(st.sampled_from([0, 1, 2, 3, 24, 25, 26, 27, 30]), min_size=2, unique=True))
def test_chunks_fill_compact_positions_without_gap_or_overlap(bounds):
    bounds = sorted(bounds)
    seen = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        layout = lay_out([request("a", PLAN, start, end - start)])
        seen += layout.compact_positions().tolist()
        assert int(layout.num_pruned[0]) == PLAN.num_pruned(end)
    assert seen == list(range(PLAN.compact_length(bounds[0]), PLAN.compact_length(bounds[-1])))


def test_dtypes_are_what_the_kernels_read():
    layout = lay_out([request("a", PLAN, 0, 26)])
    assert layout.query_start_loc.dtype == np.int32
    assert layout.num_pruned.dtype == np.int32
    assert layout.compact_positions().dtype == np.int64
