"""The compact layout of one engine step: what the upper layers hold of each scheduled request.

Pure numpy on plans and counts that the host knows before the forward pass. Both model runners build
it; the model reads ``videos`` from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_dpp.serving.plan import PrunedVideo, PrunePlan, Span


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """One row range of the batch.

    Args:
        request_id: vLLM's internal request id.
        plan: Its prune plan, ``None`` where nothing is pruned.
        num_computed: Tokens computed before this step.
        num_scheduled: Tokens computed in this step.
    """

    request_id: str
    plan: PrunePlan | None
    num_computed: int
    num_scheduled: int


@dataclass(frozen=True, slots=True)
class VideoRows:
    """One video to prune in this step, in rows of the batch.

    Args:
        request_id: vLLM's internal request id.
        video: Its part of the plan.
        start: First row.
        question: Row ranges of its question.
    """

    request_id: str
    video: PrunedVideo
    start: int
    question: tuple[Span, ...]

    @property
    def end(self) -> int:
        return self.start + self.video.length


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Compact rows of one batch of n requests.

    Args:
        num_rows: Rows before pruning.
        query_start_loc: [n + 1] int32, compact rows.
        first_position: [n] int64, compact position of each request's first compact row.
        num_pruned: [n] int32, tokens of each request that are pruned once this step is done.
        videos: Videos decided in this step, in row order.
    """

    num_rows: int
    query_start_loc: NDArray[np.int32]
    first_position: NDArray[np.int64]
    num_pruned: NDArray[np.int32]
    videos: tuple[VideoRows, ...]

    @property
    def num_compact_rows(self) -> int:
        return int(self.query_start_loc[-1])

    @property
    def num_scheduled(self) -> NDArray[np.int32]:
        """[n] int32, compact rows of each request."""
        return np.diff(self.query_start_loc)

    def compact_positions(self) -> NDArray[np.int64]:
        """[num_compact_rows] int64, the position of every compact row in its upper-layer KV."""
        shift = self.first_position - self.query_start_loc[:-1]
        return np.arange(self.num_compact_rows) + np.repeat(shift, self.num_scheduled)


def lay_out(requests: Sequence[ScheduledRequest]) -> StepLayout | None:
    """Lay out one step; ``None`` where no request of the batch has a plan.

    Raises:
        ValueError: A chunk ends inside an atomic range: the scheduler broke its promise.
    """
    if all(request.plan is None for request in requests):
        return None
    before = np.zeros(len(requests), np.int64)
    after = np.zeros(len(requests), np.int64)
    videos: list[VideoRows] = []
    row = 0
    for i, request in enumerate(requests):
        if request.plan is not None:
            end = request.num_computed + request.num_scheduled
            before[i] = request.plan.num_pruned(request.num_computed)
            after[i] = request.plan.num_pruned(end)
            if after[i] > before[i]:
                videos += _video_rows(request, request.plan, row - request.num_computed)
        row += request.num_scheduled
    computed = np.array([r.num_computed for r in requests], np.int64)
    scheduled = np.array([r.num_scheduled for r in requests], np.int64)
    query_start_loc = np.zeros(len(requests) + 1, np.int32)
    np.cumsum(scheduled - (after - before), out=query_start_loc[1:])
    return StepLayout(
        num_rows=row,
        query_start_loc=query_start_loc,
        first_position=computed - before,
        num_pruned=after.astype(np.int32),
        videos=tuple(videos),
    )


def _video_rows(request: ScheduledRequest, plan: PrunePlan, shift: int) -> list[VideoRows]:
    """The videos of the turns inside this chunk; ``shift`` turns positions into rows."""
    end = request.num_computed + request.num_scheduled
    return [
        VideoRows(
            request_id=request.request_id,
            video=video,
            start=video.start + shift,
            question=tuple((a + shift, b + shift) for a, b in video.question),
        )
        for turn in plan.turns
        if request.num_computed <= turn.start and turn.end <= end
        for video in turn.videos
    ]
