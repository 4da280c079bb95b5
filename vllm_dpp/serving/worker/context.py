"""What model runner and model share on one worker: plans of live requests, and the next step.

The runner fills it (``add_request``, ``prepare_step``, ``set_passes``), the model's forward pass
takes the layout (``take_layout``). One context belongs to one model; nothing is global.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context

from vllm_dpp.serving.plan import Grid, MediaSpan, PrunedTurn, PrunedVideo, PrunePlan
from vllm_dpp.serving.request_plan import RequestOptions, media_of, plan_prompt
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.serving.step import (
    RangeRows,
    ScheduledRequest,
    StepLayout,
    lay_out,
    lay_out_plain,
)
from vllm_dpp.serving.worker.adapters import NO_ADAPTER, Adapters
from vllm_dpp.serving.worker.kept_records import EnteringVideo, KeptRecords
from vllm_dpp.serving.worker.metrics import WorkerMetrics
from vllm_dpp.serving.worker.own_tokens import OwnTokens, own_places, own_rows, own_tokens
from vllm_dpp.serving.worker.range_buffer import RangeBuffer

if TYPE_CHECKING:
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.sampling_params import SamplingParams


@dataclass(slots=True)
class PrunedRequest:
    """A live request that loses tokens.

    Args:
        prompt_plan: What its prompt says.
        plan: ``prompt_plan`` after its last prefix-cache hit.
        grids: The token grid of each of its media, by first prompt position.
        own: Places of their own tokens, of media with text between the slices.
        record: Whether it asked for a record.
        settings: The server's with what it chose.
    """

    prompt_plan: PrunePlan
    plan: PrunePlan
    grids: dict[int, Grid]
    own: dict[int, np.ndarray]
    record: bool
    settings: ServingSettings


PassInputs = Callable[[], tuple[dict[str, Any], dict[str, Any]]]
"""Attention metadata and slot mappings of one upper pass, by layer name.

It is called when the pass is about to run, since a backend may keep what it built last in buffers
of its own.
"""


class PruningContext:
    """Plans of the requests on this worker, and the layout of the step about to run."""

    def __init__(
        self,
        settings: ServingSettings,
        grids_of: Callable[[Sequence["MultiModalFeatureSpec"]], dict[int, Grid]],
        metrics: WorkerMetrics,
        adapters: Adapters,
    ) -> None:
        """Args:
        settings: The engine's settings.
        grids_of: Reads the token grids of a request's media.
        metrics: Of this worker.
        adapters: Of this worker.
        """
        self.settings = settings
        self.adapters = adapters
        self.metrics = metrics
        self.requests: dict[str, PrunedRequest] = {}
        self._entering: dict[str, list[EnteringVideo]] = {}
        self._rows_entering: list[tuple[str, EnteringVideo, slice]] = []
        self._own_rows: torch.Tensor | None = None
        self._grids_of = grids_of
        self.records = KeptRecords(settings)
        self._buffer: RangeBuffer | None = None
        self._block_size: int | None = None
        self._max_rows = 0
        self._layout: StepLayout | None = None
        self._running: StepLayout | None = None
        self.passes: Sequence[PassInputs] = ()

    def attach(self, buffer: RangeBuffer) -> None:
        """Called by the model, which owns the buffer."""
        self._buffer = buffer

    def configure(self, *, block_size: int | None, max_rows: int) -> None:
        """Called by the runner once the KV cache is known.

        Args:
            block_size: KV block size where prefix caching is on, else ``None``: as the scheduler
                plans.
            max_rows: Rows that one pass of the upper layers can take.
        """
        self._block_size, self._max_rows = block_size, max_rows

    @property
    def buffer(self) -> RangeBuffer:
        if self._buffer is None:
            raise RuntimeError("the model has not attached its range buffer")
        return self._buffer

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int] | None,
        mm_features: Sequence["MultiModalFeatureSpec"],
        sampling_params: "SamplingParams | None",
        num_cached: int,
        adapter_id: int = NO_ADAPTER,
    ) -> None:
        """Plan a request that starts on this worker, or starts again after a preemption.

        Args:
            request_id: vLLM's internal request id.
            prompt_token_ids: The expanded prompt.
            mm_features: Its media.
            sampling_params: Hold what the request chose.
            num_cached: Tokens that the prefix cache supplies.
            adapter_id: vLLM's number of its LoRA adapter.
        """
        self.remove_request(request_id)
        self.adapters.add(request_id, adapter_id)
        if not mm_features or prompt_token_ids is None or sampling_params is None:
            return
        options = RequestOptions.from_extra_args(sampling_params.extra_args)
        settings = options.settings(self.settings)
        media = media_of(prompt_token_ids, mm_features, settings)
        plan = plan_prompt(prompt_token_ids, media, options, self.settings, self._block_size)
        grids = self._grids_of(mm_features)
        self.metrics.started(request_id, media, grids, plan)
        if options.record:
            self._entering[request_id] = _in_part(media, grids)
        if plan is None:
            return
        own = own_places(mm_features)
        request = PrunedRequest(plan, plan, grids, own, options.record, settings)
        self.requests[request_id] = request
        self._start(request_id, request, num_cached)

    def restart_request(self, request_id: str, num_cached: int) -> None:
        """A request that this worker knows starts again after a preemption."""
        request = self.requests.get(request_id)
        if request is not None:
            self._start(request_id, request, num_cached)

    def preempt_request(self, request_id: str) -> None:
        """A request has lost its KV blocks: what it had stored is of no use."""
        if request_id in self.requests:
            self.buffer.release_request(request_id)

    def remove_request(self, request_id: str) -> None:
        self._entering.pop(request_id, None)
        self.adapters.remove(request_id)
        if self.requests.pop(request_id, None) is not None:
            self.buffer.release_request(request_id)

    def prepare_step(self, batch: Iterable[tuple[str, int, int]]) -> StepLayout | None:
        """Lay out the next step from (request id, tokens computed, tokens scheduled) triples."""
        self._layout, self.passes, self._own_rows = None, (), None
        batch = list(batch)
        self.adapters.begin_step(request_id for request_id, *_ in batch)
        self._rows_entering = list(self._rows_of_entering(batch)) if self._entering else []
        if self.requests:
            self._layout = self._lay_out(batch)
        return self._layout

    def _lay_out(self, batch: Sequence[tuple[str, int, int]]) -> StepLayout | None:
        plans = [self._plan(request_id) for request_id, *_ in batch]
        if not any(plans):
            return None
        ids, computed, scheduled = zip(*batch, strict=True)
        if all(plan is None or plan.end <= at for plan, at in zip(plans, computed, strict=True)):
            pruned = [0 if plan is None else plan.num_pruned for plan in plans]
            return lay_out_plain(computed, scheduled, pruned, self._max_rows)
        requests = map(ScheduledRequest, ids, plans, computed, scheduled)
        return lay_out(list(requests), self._max_rows)

    def _rows_of_entering(
        self, batch: Iterable[tuple[str, int, int]]
    ) -> Iterator[tuple[str, EnteringVideo, slice]]:
        """Rows of the step that are tokens of such videos."""
        row = 0
        for request_id, computed, scheduled in batch:
            for video in self._entering.get(request_id, ()):
                first = max(video.start, computed) - computed
                last = min(video.end, computed + scheduled) - computed
                if first < last:
                    yield request_id, video, slice(row + first, row + last)
            row += scheduled

    def entered(self, places: torch.Tensor) -> None:
        """Hear where the rows of the step stand: [num_rows, 4] as of `EntryStage.take_places`."""
        self._own_rows = places[:, -1] > 0
        for request_id, video, rows in self._rows_entering:
            self.records.entered(request_id, video, places[rows, -1] - 1)

    def store_own(self, part: RangeRows) -> None:
        """Keep which rows of a range that waits are a video's own, if this step alone knows."""
        if self._own_rows is not None:
            own = self._own_rows[part.row : part.row + part.num_rows]
            self.buffer.store_own(part.key, part.first, own)

    def own_tokens(self, part: RangeRows, video: PrunedVideo, device: torch.device) -> OwnTokens:
        """Offsets of a video's tokens that are up for selection in a range of a live request."""
        places = self.requests[part.request_id].own.get(video.start)
        if places is None and video.num_text:
            return own_rows(self._is_own(part), part, video)
        return own_tokens(places, part, video, device)

    def _is_own(self, part: RangeRows) -> torch.Tensor:
        """[turn length] bool, which rows of a range are a video's own."""
        if not part.is_whole:
            return self.buffer.is_own[self.buffer.rows_of(part.key)]
        assert self._own_rows is not None
        return self._own_rows[part.row : part.row + part.num_rows]

    def _plan(self, request_id: str) -> PrunePlan | None:
        request = self.requests.get(request_id)
        return None if request is None else request.plan

    def decided(self, request_id: str, turn: PrunedTurn, kept: Sequence[torch.Tensor]) -> None:
        """Hear what a turn keeps: for each video [num_kept] int64, counted from its first token."""
        request = self.requests[request_id]
        if request.record:
            self.records.decided(request_id, request.grids, turn, kept)

    def _start(self, request_id: str, request: PrunedRequest, num_cached: int) -> None:
        request.plan = request.prompt_plan.after_hit(num_cached)
        if request.record:
            self.records.cached(request_id, request.grids, request.prompt_plan, num_cached)

    def set_passes(self, passes: Sequence[PassInputs]) -> None:
        """What each upper pass of the next step reads."""
        self.passes = passes

    @property
    def layout(self) -> StepLayout | None:
        """The layout of the step about to run, ``None`` where every row is kept."""
        return self._layout

    def take_layout(self) -> StepLayout | None:
        """The layout, once: a dummy run that follows finds none."""
        self._running, self._layout = self._layout, None
        return self._running

    @contextmanager
    def upper_pass(self, number: int) -> Iterator[None]:
        """The upper layers' view of one pass, in vLLM's forward context.

        See ``patches/forward-context.md``.
        """
        context = get_forward_context()
        assert self._running is not None
        attn_metadata, slot_mapping = self.passes[number]()
        before = context.attn_metadata, context.slot_mapping, context.cudagraph_runtime_mode
        assert isinstance(context.attn_metadata, dict) and isinstance(context.slot_mapping, dict)
        context.attn_metadata = context.attn_metadata | attn_metadata
        context.slot_mapping = context.slot_mapping | slot_mapping
        context.cudagraph_runtime_mode = CUDAGraphMode.NONE  # graphs have the step's size
        try:
            with self.adapters.over_pass(self._running.passes[number]):
                yield
        finally:
            context.attn_metadata, context.slot_mapping, context.cudagraph_runtime_mode = before


def _in_part(media: Sequence[MediaSpan], grids: dict[int, Grid]) -> list[EnteringVideo]:
    """The videos of a request that have fewer tokens in the prompt than in their grid."""
    return [
        EnteringVideo(item.start, item.end, item.num_tokens, grids[item.start])
        for item in media
        if item.num_tokens < prod(grids[item.start])
    ]
