"""What the scheduler counts."""

from typing import TYPE_CHECKING

from prometheus_client import Counter, Gauge

from vllm_dpp.serving.engine.deferred_rows import DeferredRows
from vllm_dpp.serving.engine.planned_request import PlannedRequest
from vllm_dpp.serving.metrics import ProcessMetrics

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request


class SchedulerMetrics(ProcessMetrics):
    """Args:
    vllm_config: The engine's configuration.
    capacity: Rows of the workers' buffer.
    """

    def __init__(self, vllm_config: "VllmConfig", capacity: int) -> None:
        super().__init__("scheduler", vllm_config)
        latest = {"multiprocess_mode": "mostrecent"}
        self._rows = self.add(
            Gauge, "deferred_rows", "Rows of videos that wait for their decision", **latest
        )
        self._capacity = self.add(
            Gauge, "deferred_rows_capacity", "Rows that can wait (max_deferred_tokens)", **latest
        )
        self._waits = self.add(
            Counter, "waits_for_rows", "Times a video had to wait for room in that buffer"
        )
        self._cached = self.add(
            Counter, "cached_videos", "Videos that a request found whole in the prefix cache"
        )
        self._capacity.set(capacity)

    def step(self, rows: DeferredRows) -> None:
        """A step has been scheduled."""
        self._rows.set(sum(rows.held.values()))
        self._waits.inc(rows.take_waits())

    def started(self, request: "Request", planned: PlannedRequest | None, num_cached: int) -> None:
        """A request starts with so many tokens from the prefix cache."""
        if num_cached:
            self._cached.inc(num_cached_videos(request, planned, num_cached))


def num_cached_videos(request: "Request", planned: PlannedRequest | None, num_cached: int) -> int:
    """Videos of which nothing is left to compute but, of a pruned one, its tail."""
    turns = planned.prompt_plan.turns if planned else ()
    pruned = {v.media_start: turn.decided for turn in turns for v in turn.videos}
    ends = {
        f.mm_position.offset: f.mm_position.offset + f.mm_position.length
        for f in request.mm_features
        if f.modality == "video"
    }
    return sum(end <= num_cached for end in (ends | pruned).values())
