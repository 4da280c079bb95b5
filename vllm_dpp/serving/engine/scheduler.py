"""The scheduler: vLLM's own, which also knows what each request loses.

Chunks are as vLLM makes them. Only where a chunk enters a range that has not been decided, the
workers must have room for its rows; see ``deferred_rows``.
"""

import functools
import hashlib
import json
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.multimodal.inputs import PlaceholderRange
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from vllm_dpp.pruning.config import PruningConfig
from vllm_dpp.serving import records, vllm_versions
from vllm_dpp.serving.engine.compact_hashes import CompactHashes
from vllm_dpp.serving.engine.deferred_rows import DeferredRows
from vllm_dpp.serving.engine.kv_cache import CompactAttentionManager
from vllm_dpp.serving.engine.metrics import SchedulerMetrics
from vllm_dpp.serving.engine.planned_request import PlannedRequest
from vllm_dpp.serving.engine.prefix_hits import longest_hit
from vllm_dpp.serving.plan import PrunePlan, loses_a_block
from vllm_dpp.serving.request_plan import plan_request
from vllm_dpp.serving.settings import ServingSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.vllm_dpp")

MIN_CHUNK = 4
"""Tokens with which a chunk can always keep clear of decode steps."""

LARGE_BLOCK = 32
"""Tokens; of larger KV blocks a server says what that means for short videos."""

EncoderSchedule = tuple[list[int], int, int, list[int], list[int]]


class PruningSchedulerMixin(Scheduler):
    """Adds prune plans to a vLLM scheduler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = ServingSettings.from_vllm_config(self.vllm_config)
        self.planned: dict[str, PlannedRequest] = {}
        self.deferred_rows = DeferredRows(self.settings.deferred_rows(self.vllm_config))
        self.metrics = SchedulerMetrics(self.vllm_config, self.deferred_rows.capacity)
        self.replays_graphs = (
            self.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        )
        self.records = records.RecordWriter.of(self.settings, "blocks")
        self.keeps_media_whole = (
            self.scheduler_config.disable_chunked_mm_input
            and not vllm_versions.MAY_SPLIT_MEDIA_AT_THEIR_START
        )
        self._comes_first: Request | None = None
        self._admits_others = True
        # So workers learn the grids of videos in a cached prefix too, whatever a model's positions.
        self.model_uses_mrope = True
        self.num_layers = self.vllm_config.model_config.hf_text_config.num_hidden_layers
        pool = self.kv_cache_manager.block_pool
        if self.kv_cache_manager.enable_caching and pool.hash_block_size != self.block_size:
            raise ValueError(
                f"blocks of {self.block_size} tokens are hashed in parts of "
                f"{pool.hash_block_size}: pruned prompts can only be cached by whole blocks; leave "
                "the hash block size alone"
            )
        if self.kv_cache_manager.enable_caching and self.block_size > LARGE_BLOCK:
            self._tell_of_large_blocks()
        limit = self.scheduler_config.long_prefill_token_threshold
        if self.replays_graphs and 0 < limit < MIN_CHUNK:
            raise ValueError(
                f"--long-prefill-token-threshold {limit} would make decode steps of a video's "
                f"chunks: give at least {MIN_CHUNK}, or --enforce-eager"
            )
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, CompactAttentionManager):
                manager.attach(self.planned)

    def _tell_of_large_blocks(self) -> None:
        """On a CPU vLLM's blocks have 128 tokens, and short videos lose no whole one."""
        if (ratio := self.settings.retention_ratio) < 1:
            logger.info(
                "KV blocks have %d tokens, and with prefix caching whole ones go at layer K: a "
                "video of which fewer than %d tokens enter may lose nothing there, and more is "
                "left than asked for; --block-size %d would do for shorter ones",
                self.block_size,
                loses_a_block(self.block_size, ratio),
                LARGE_BLOCK,
            )

    def add_request(self, request: Request) -> None:
        """Plan a new request. A request that cannot run is finished with an error, never stuck."""
        if request.request_id not in self.requests:
            try:
                self._check_media(request)
                self._plan(request)
            except ValueError as error:
                logger.error("request %s is refused: %s", request.request_id, error)
                self.encoder_cache_mismatch_reqs.add(request.request_id)
        super().add_request(request)

    def _check_media(self, request: Request) -> None:
        """Refuse an item for which vLLM would wait for ever, since no chunk can hold it."""
        if not self.keeps_media_whole or not request.mm_features:
            return
        limit = self.max_num_scheduled_tokens
        if threshold := self.scheduler_config.long_prefill_token_threshold:
            limit = min(limit, threshold)
        if self.replays_graphs:
            limit -= 1  # for the row that may not be left over; see _clear_of_decodes
        longest = max(feature.mm_position.length for feature in request.mm_features)
        if longest > limit:
            raise ValueError(
                f"an image or video takes {longest} tokens, but a chunk holds {limit} and may not "
                "split it: leave out --disable-chunked-mm-input, or raise "
                "--long-prefill-token-threshold and --max-num-batched-tokens"
            )

    def _plan(self, request: Request) -> None:
        caching = self.kv_cache_manager.enable_caching
        plan, options = plan_request(
            request.prompt_token_ids,
            request.mm_features,
            request.sampling_params,
            self.settings,
            self.block_size if caching else None,
        )
        if plan is None:
            return
        longest = max(turn.length for turn in plan.turns)
        if longest > self.deferred_rows.capacity:
            raise ValueError(
                f"a video and its question take {longest} tokens, but only "
                f"{self.deferred_rows.capacity} can be deferred (dpp.max_deferred_tokens)"
            )
        if request.resumable:
            raise ValueError("a streaming-input session cannot be pruned")
        hashes = None
        if caching:
            chosen = _name_of(options.settings(self.settings))
            hashes = CompactHashes(request, plan, self.block_size, chosen)
        self.planned[request.request_id] = PlannedRequest(plan, options, hashes, plan)

    def _free_blocks(self, request: Request) -> None:
        if self.records is not None and records.asks_for_a_record(request):
            planned = self.planned.get(request.request_id)
            record = records.blocks_record(
                request,
                planned.prompt_plan if planned else None,
                self.kv_cache_config.kv_cache_groups,
                self.kv_cache_manager.get_block_ids(request.request_id),
                self.settings.prunes,
            )
            self.records.write(request.request_id, lambda: record)
        super()._free_blocks(request)
        self.planned.pop(request.request_id, None)
        self.deferred_rows.forget(request.request_id)

    def _get_local_prefix_cache_hit(
        self, request: Request, *limits: Any
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        """Look a pruned request up by its own rules; its compact blocks have names of their own."""
        planned = self.planned.get(request.request_id)
        if planned is None:
            return super()._get_local_prefix_cache_hit(request, *limits)
        manager = self.kv_cache_manager
        if not manager.prefix_cache_lookup_enabled(request):
            planned.start_at(0)
            return manager.empty_kv_cache_blocks, 0, 0, False
        blocks, num_tokens = longest_hit(
            manager, planned, request.block_hashes, request.num_tokens - 1, self.block_size
        )
        planned.start_at(num_tokens)
        return manager.create_kv_cache_blocks(blocks), num_tokens, 0, False

    def _ec_transfer_pending(self, request: Request, num_computed_tokens: int) -> bool:
        """Whether a waiting request is passed over in this step.

        So is one with a video for which the workers have no room: the others go on, it stays
        first in the queue. (Getting no tokens would stop everybody behind it.)
        """
        if super()._ec_transfer_pending(request, num_computed_tokens):
            return True
        planned = self.planned.get(request.request_id)
        if planned is None:
            return False
        turns = planned.plan.turns_in(num_computed_tokens, request.num_tokens)
        return bool(turns) and not self.deferred_rows.fits(request.request_id, turns[0].length)

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> EncoderSchedule:
        """End a chunk before a range for which there is no room, before media are looked at.

        This is the last hook that may shorten a chunk, and every request with a video passes it.
        """
        if request.request_id in self.encoder_cache_mismatch_reqs:
            return [], 0, encoder_compute_budget, [], []
        planned = self.planned.get(request.request_id)
        if planned is not None and num_computed_tokens >= planned.plan.end:
            last = request.mm_features[-1].mm_position
            if num_computed_tokens >= last.offset + last.length:  # as with every token of an answer
                return [], num_new_tokens, encoder_compute_budget, [], []
        elif planned is not None:
            num_new_tokens = self._before_media(request, num_computed_tokens, num_new_tokens)
            num_new_tokens = self._with_room(
                request.request_id, planned.plan, num_computed_tokens, num_new_tokens
            )
            num_new_tokens = self._before_a_long_decision(
                request, planned.plan, num_computed_tokens, num_new_tokens
            )
            num_new_tokens = self._clear_of_decodes(
                request, planned.plan, num_computed_tokens, num_new_tokens
            )
        return super()._try_schedule_encoder_inputs(
            request,
            num_computed_tokens,
            num_new_tokens,
            encoder_compute_budget,
            shift_computed_tokens,
        )

    def _unsplit(self, request: Request, start: int, end: int) -> PlaceholderRange | None:
        """The image or video ahead of ``start`` in which no chunk from there may end at ``end``."""
        if self.keeps_media_whole:
            for feature in request.mm_features:
                item = feature.mm_position
                if start <= item.offset < end < item.offset + item.length:
                    return item
        return None

    def _before_media(self, request: Request, start: int, num_tokens: int) -> int:
        """Tokens of a chunk that splits no item that has to stay whole, as vLLM cuts it."""
        item = self._unsplit(request, start, start + num_tokens)
        return num_tokens if item is None else item.offset - start

    def _with_room(self, request_id: str, plan: PrunePlan, start: int, num_tokens: int) -> int:
        """Tokens of a chunk for whose undecided ranges there is room.

        The pieces of a video that no chunk splits are decided in the step that reads them.
        """
        num_rows = 0
        for turn in plan.turns_in(start, start + num_tokens):
            if self.keeps_media_whole and turn.is_piece and turn.videos[0].media_start >= start:
                continue
            num_rows += turn.length
            if not self.deferred_rows.lend(request_id, num_rows):
                return max(turn.start - start, 0)
        return num_tokens

    def _before_a_long_decision(
        self, request: Request, plan: PrunePlan, start: int, num_tokens: int
    ) -> int:
        """Tokens of a chunk that leaves a decision to the next step, if both make a long one.

        Everything that a video keeps goes up in the step that decides it. Where that and the rest
        of the video are more work than a step without pruning, the video ends its step.
        """
        split, num_layers = self.settings.split_layer, self.num_layers
        for turn in plan.turns_in(start, start + num_tokens):
            item = self._unsplit(request, start, turn.decided)
            last = min(item.offset + item.length if item else turn.decided, turn.end - 2)
            if self._unsplit(request, start, last):
                continue
            if turn.start < start < last - 1 and turn.end <= start + num_tokens:
                num_up = turn.length - turn.num_pruned
                work = num_tokens * split + num_up * (num_layers - split)
                if work > self.max_num_scheduled_tokens * num_layers:
                    return last - start
        return num_tokens

    def _clear_of_decodes(
        self, request: Request, plan: PrunePlan, start: int, num_tokens: int
    ) -> int:
        """Tokens of a chunk that vLLM will not take for a decode while a range is open.

        A batch of single tokens may replay a full CUDA graph, in which nothing can be deferred or
        decided. So no row of a range is computed alone, and none is left over before the places
        where vLLM or we may have to end the next chunk: the end of the range, and the starts of
        media. A chunk for which only one token is left waits for the next step, in which it comes
        first.
        """
        if not self.replays_graphs:
            return num_tokens
        starts = {feature.mm_position.offset for feature in request.mm_features}
        end = start + num_tokens
        while end > start and (turn := plan.turn_at(end)) and end + 1 in starts | {turn.end}:
            end = start + self._before_media(request, start, end - 1 - start)
        if end - start != 1 or not plan.turns_in(start, end):
            return end - start
        self._comes_first = request
        if request.status != RequestStatus.RUNNING:
            self._admit_no_others()
        return 0

    def _admit_no_others(self) -> None:
        """Let nobody in this step overtake the request that is admitted just now."""
        if self.pause_state == PauseState.UNPAUSED:
            self._admits_others = False
            self._pause_state = PauseState.PAUSED_NEW

    def _send_all_media(self, scheduler_output: SchedulerOutput) -> None:
        """Send new requests with the pixels that a prefix-cache hit covers, on the V1 runner.

        vLLM leaves those out. Its V2 runner is sent a request anew after a preemption; the V1
        runner is not, and would have no pixels if the blocks were gone by then. See
        ``patches/scheduler.md``.
        """
        for data in scheduler_output.scheduled_new_reqs:
            data.mm_features = self.requests[data.req_id].mm_features

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        if not self._admits_others:
            self._admits_others = True
            self._pause_state = PauseState.UNPAUSED
        if not self.use_v2_model_runner:
            self._send_all_media(scheduler_output)
        if self._comes_first in self.running:
            self.running.remove(self._comes_first)
            self.running.insert(0, self._comes_first)
        self._comes_first = None
        for request_id in list(self.deferred_rows.held):
            request, num_rows = self.requests[request_id], 0
            if request.status == RequestStatus.RUNNING:
                turn = self.planned[request_id].plan.turn_at(request.num_computed_tokens)
                num_rows = turn.length if turn else 0
            self.deferred_rows.settle(request_id, num_rows)
        self.deferred_rows.end_step()
        self.metrics.step(self.deferred_rows)
        for data in scheduler_output.scheduled_new_reqs:
            request, planned = self.requests[data.req_id], self.planned.get(data.req_id)
            self.metrics.started(request, planned, data.num_computed_tokens)


class PruningScheduler(PruningSchedulerMixin, Scheduler):
    """Synchronous scheduling."""


class PruningAsyncScheduler(PruningSchedulerMixin, AsyncScheduler):
    """Asynchronous scheduling."""


def make_scheduler(vllm_config: "VllmConfig", *args: Any, **kwargs: Any) -> Scheduler:
    """Build the scheduler that fits the engine; named by ``scheduler_cls``."""
    is_async = vllm_config.scheduler_config.async_scheduling
    cls = PruningAsyncScheduler if is_async else PruningScheduler
    return cls(vllm_config, *args, **kwargs)


@functools.lru_cache
def _name_of(settings: ServingSettings) -> bytes:
    """Names what kept tokens depend on beside the prompt and the request's own choice."""
    choice = {f.name for f in fields(PruningConfig)} | {"prune_layer", "similarity", "decide_every"}
    values = {name: value for name, value in asdict(settings).items() if name in choice}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).digest()
