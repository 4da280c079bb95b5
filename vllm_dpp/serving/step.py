"""The compact layout of one engine step: what the upper layers hold of each scheduled request.

Pure numpy on plans and counts that the host knows before the forward pass. Both model runners build
it; the model reads ``ranges`` and ``passes`` from it.

A *compact row* is a row of the upper layers. Compact rows are numbered through the whole step,
request by request in batch order, and run in one or more *passes*: a video that was read over many
steps may send up more rows at its decision than one step holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_dpp.serving.plan import PrunedTurn, PrunedVideo, PrunePlan, Span

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One row range of the batch.

    Args:
        request_id: vLLM's internal request id.
        plan: Its prune plan after its last cache hit, ``None`` where nothing is pruned.
        num_computed: Tokens computed before this step.
        num_scheduled: Tokens computed in this step.
    """

    request_id: str
    plan: PrunePlan | None
    num_computed: int
    num_scheduled: int


@dataclass(frozen=True, slots=True)
class RangeRows:
    """The part of one turn's range that this step computes.

    *Offsets* count positions from the start of the range.

    Args:
        request_id: vLLM's internal request id.
        turn: The turn.
        row: First batch row.
        first: Offset of that row.
        num_rows: Rows of the range in this step.
        compact_row: Where the range's kept rows go, if it is decided in this step.
    """

    request_id: str
    turn: PrunedTurn
    row: int
    first: int
    num_rows: int
    compact_row: int

    @property
    def key(self) -> tuple[str, int]:
        """Names the range among all those that are being read."""
        return self.request_id, self.turn.start

    @property
    def end(self) -> int:
        """Offset past the last row of this step."""
        return self.first + self.num_rows

    @property
    def is_decided(self) -> bool:
        """Whether the decision point is reached."""
        return self.end == self.turn.length

    @property
    def is_whole(self) -> bool:
        """Whether the whole range is in this step, so that nothing has to be stored."""
        return self.first == 0 and self.is_decided

    def place_of(self, video: PrunedVideo) -> Span:
        """Offsets of a video's tokens that are up for selection, and of the text among them."""
        return video.start - self.turn.start, video.end - self.turn.start

    def offsets_of(self, span: Span) -> Span:
        """The part of a span of prompt positions that is in this step, as offsets."""
        start, end = (position - self.turn.start for position in span)
        first = min(max(start, self.first), self.end)
        return first, min(max(end, first), self.end)

    @property
    def texts(self) -> list[Span]:
        """Offsets of the range's rows that are not up for selection, as spans."""
        spans, at = [], 0
        for video in self.turn.videos:
            start, end = self.place_of(video)
            spans.append((at, start))
            at = end
        return [span for span in (*spans, (at, self.turn.length)) if span[0] < span[1]]

    def pieces(self) -> list[tuple[int, Span | PrunedVideo]]:
        """What goes up at the decision, with its first compact row: texts and videos in order."""
        parts: list[tuple[int, Span | PrunedVideo, int]] = [
            (start, (start, end), end - start) for start, end in self.texts
        ]
        parts += [(v.start - self.turn.start, v, v.num_kept + v.num_text) for v in self.turn.videos]
        placed, row = [], self.compact_row
        for _, part, count in sorted(parts, key=lambda part: part[0]):
            placed.append((row, part))
            row += count
        return placed


@dataclass(frozen=True, slots=True)
class UpperPass:
    """One run of the upper layers over some of the compact rows.

    Args:
        requests: [n] int64, which requests of the batch, ascending.
        query_start_loc: [n + 1] int32, where each one's rows start in the pass.
        first_position: [n] int64, compact position of each one's first row.
        rows: [query_start_loc[n]] int64, the compact rows of the step.
    """

    requests: Rows
    query_start_loc: NDArray[np.int32]
    first_position: Rows
    rows: Rows

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_scheduled(self) -> NDArray[np.int32]:
        """[n] int32, rows of each request."""
        return np.diff(self.query_start_loc)

    @property
    def seq_lens(self) -> NDArray[np.int32]:
        """[n] int32, tokens of each request in the upper layers after the pass."""
        return (self.first_position + self.num_scheduled).astype(np.int32)

    def positions(self) -> Rows:
        """[num_rows] int64, the position of every row in its upper-layer KV."""
        shift = self.first_position - self.query_start_loc[:-1]
        return np.arange(self.num_rows) + np.repeat(shift, self.num_scheduled)


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Compact rows of one batch of n requests.

    Args:
        num_rows: Batch rows.
        num_compact_rows: Rows of the upper layers.
        ranges: What the step computes of turns that are not decided yet, in batch order.
        plain: [2, m] int64, the rows outside of such ranges: batch rows and their compact rows.
        num_pruned: [n] int32, tokens of each request that the upper layers lack after this step.
        passes: The runs of the upper layers; none where no row goes up.
    """

    num_rows: int
    num_compact_rows: int
    ranges: tuple[RangeRows, ...]
    plain: Rows
    num_pruned: NDArray[np.int32]
    passes: tuple[UpperPass, ...]

    @property
    def decided(self) -> tuple[RangeRows, ...]:
        """The ranges whose decision point is reached in this step."""
        return tuple(part for part in self.ranges if part.is_decided)

    @property
    def is_plain(self) -> bool:
        """Whether every batch row goes up, so that the step runs as without pruning."""
        return not self.ranges


def lay_out(requests: Sequence[ScheduledRequest], max_rows: int) -> StepLayout | None:
    """Lay out one step; ``None`` where no request of the batch has a plan.

    Args:
        requests: The batch, in order.
        max_rows: Compact rows that one pass can take.
    """
    if all(request.plan is None for request in requests):
        return None
    n = len(requests)
    before, after, ends = np.zeros((3, n), np.int64)
    ranges: list[RangeRows] = []
    plain: list[tuple[int, int, int]] = []  # batch row, compact row, length
    row = compact_row = 0
    for i, request in enumerate(requests):
        ends[i] = request.num_computed + request.num_scheduled
        before[i], after[i] = _compact_lengths(request)
        found, between = _split(request, row, compact_row)
        ranges += found
        plain += between
        row += request.num_scheduled
        compact_row += int(after[i] - before[i])
    order = np.argsort([_first_going_up(request) for request in requests], kind="stable")
    return StepLayout(
        num_rows=row,
        num_compact_rows=compact_row,
        ranges=tuple(ranges),
        plain=_expand(plain),
        num_pruned=(ends - after).astype(np.int32),
        passes=_passes(before, after - before, order, max_rows),
    )


def lay_out_plain(
    num_computed: Sequence[int],
    num_scheduled: Sequence[int],
    num_pruned: Sequence[int],
    max_rows: int,
) -> StepLayout:
    """Lay out a step of requests past all of their ranges, as almost every step of an engine is.

    Args:
        num_computed: Of each request, tokens computed before this step.
        num_scheduled: Tokens computed in it.
        num_pruned: Tokens that the upper layers lack.
        max_rows: Compact rows that one pass can take.
    """
    computed, scheduled, pruned = (
        np.array(values, np.int64) for values in (num_computed, num_scheduled, num_pruned)
    )
    num_rows = int(scheduled.sum())
    rows = np.arange(num_rows)
    if num_rows <= max_rows:
        query_start_loc = np.zeros(len(scheduled) + 1, np.int32)
        np.cumsum(scheduled, out=query_start_loc[1:])
        every = np.arange(len(scheduled))
        passes: tuple[UpperPass, ...] = (
            UpperPass(every, query_start_loc, computed - pruned, rows),
        )
    else:
        order = np.argsort(computed, kind="stable")
        passes = _passes(computed - pruned, scheduled, order, max_rows)
    return StepLayout(
        num_rows=num_rows,
        num_compact_rows=num_rows,
        ranges=(),
        plain=np.stack([rows, rows]),
        num_pruned=pruned.astype(np.int32),
        passes=passes,
    )


def _compact_lengths(request: ScheduledRequest) -> tuple[int, int]:
    start, end = request.num_computed, request.num_computed + request.num_scheduled
    if request.plan is None:
        return start, end
    return request.plan.compact_length(start), request.plan.compact_length(end)


def _first_going_up(request: ScheduledRequest) -> int:
    """The prompt position of the first row that the request may send up in this step."""
    turn = request.plan.turn_at(request.num_computed) if request.plan else None
    return request.num_computed if turn is None else turn.start


def _split(
    request: ScheduledRequest, row: int, compact_row: int
) -> tuple[list[RangeRows], list[tuple[int, int, int]]]:
    """The undecided ranges in a request's chunk, and the runs of rows between them.

    Args:
        request: The request.
        row: Its first batch row.
        compact_row: Its first compact row.
    """
    ranges: list[RangeRows] = []
    plain: list[tuple[int, int, int]] = []
    at, end = request.num_computed, request.num_computed + request.num_scheduled

    def advance(position: int) -> None:
        nonlocal at, row, compact_row
        if position > at:
            plain.append((row, compact_row, position - at))
            row, compact_row, at = row + position - at, compact_row + position - at, position

    for turn in request.plan.turns_in(at, end) if request.plan else ():
        advance(turn.start)
        stop = min(end, turn.end)
        part = RangeRows(request.request_id, turn, row, at - turn.start, stop - at, compact_row)
        ranges.append(part)
        row, at = row + part.num_rows, stop
        if part.is_decided:
            compact_row += turn.length - turn.num_pruned
    advance(end)
    return ranges, plain


def _expand(runs: Sequence[tuple[int, int, int]]) -> Rows:
    """[2, m]: every row of the runs, by batch row and by compact row."""
    if not runs:
        return np.empty((2, 0), np.int64)
    return np.concatenate(
        [np.arange(n) + np.array([[row], [compact]]) for row, compact, n in runs], axis=1
    )


def _passes(
    first_position: Rows, counts: Rows, order: Rows, max_rows: int
) -> tuple[UpperPass, ...]:
    """Share out the compact rows, in order of ``order`` where they do not fit in one pass.

    A request may have found blocks in the prefix cache that another one fills in this very step.
    It starts behind them, and so behind the first row that the other one sends up: in order of
    these rows it comes after it.
    """
    starts = np.cumsum(counts) - counts
    done = np.zeros_like(counts)
    passes = []
    while (left := counts - done).any():
        room, taken = max_rows, np.zeros_like(counts)
        for i in order:
            taken[i] = min(left[i], room)
            room -= taken[i]
        which = np.flatnonzero(taken)
        query_start_loc = np.zeros(len(which) + 1, np.int32)
        np.cumsum(taken[which], out=query_start_loc[1:])
        rows = [
            np.arange(n) + starts[i] + done[i] for i, n in zip(which, taken[which], strict=True)
        ]
        passes.append(
            UpperPass(which, query_start_loc, (first_position + done)[which], np.concatenate(rows))
        )
        done += taken
    return tuple(passes)
