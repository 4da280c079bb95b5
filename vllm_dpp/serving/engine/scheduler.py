"""The scheduler: keeps every atomic range in one step and tells the KV managers about plans."""

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from vllm_dpp.serving import records
from vllm_dpp.serving.engine.kv_cache import CompactAttentionManager
from vllm_dpp.serving.front.config_hook import step_budget
from vllm_dpp.serving.plan import PrunePlan
from vllm_dpp.serving.request_plan import plan_request
from vllm_dpp.serving.settings import ServingSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.vllm_dpp")

EncoderSchedule = tuple[list[int], int, int, list[int], list[int]]


class PruningSchedulerMixin(Scheduler):
    """Adds prune plans to a vLLM scheduler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = ServingSettings.from_vllm_config(self.vllm_config)
        self.plans: dict[str, PrunePlan] = {}
        self.range_limit = min(step_budget(self.vllm_config), self.max_num_scheduled_tokens)
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, CompactAttentionManager):
                manager.plans = self.plans

    def add_request(self, request: Request) -> None:
        """Plan a new request. A request that cannot run is finished with an error, never stuck."""
        if request.request_id not in self.requests:
            try:
                plan = self._plan(request)
            except ValueError as error:
                logger.error("request %s is refused: %s", request.request_id, error)
                self.encoder_cache_mismatch_reqs.add(request.request_id)
            else:
                if plan is not None:
                    self.plans[request.request_id] = plan
        super().add_request(request)

    def _plan(self, request: Request) -> PrunePlan | None:
        plan = plan_request(
            request.prompt_token_ids,
            request.mm_features,
            request.sampling_params,
            self.settings,
            self.block_size if self.kv_cache_manager.enable_caching else None,
        )
        if plan is None:
            return None
        if plan.longest_range > self.range_limit:
            raise ValueError(f"{plan.longest_range} tokens do not fit in {self.range_limit}")
        if request.resumable:
            raise ValueError("a streaming-input session cannot be pruned")
        return plan

    def _free_blocks(self, request: Request) -> None:
        records.write_blocks(
            self.settings.record_path,
            request,
            self.plans.get(request.request_id),
            self.kv_cache_config.kv_cache_groups,
            self.kv_cache_manager.get_block_ids(request.request_id),
        )
        super()._free_blocks(request)
        self.plans.pop(request.request_id, None)

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        """End a hit where the first pruned video starts.

        Another request may have cached the video unpruned; those upper-layer blocks are not ours.
        """
        blocks, num_tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        plan = self.plans.get(request.request_id)
        if plan is not None and num_tokens > plan.start:
            num_tokens = plan.start // self.block_size * self.block_size
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, num_tokens)
            boundary = 0
        return blocks, num_tokens, boundary, diverged

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> EncoderSchedule:
        """Shorten a chunk that would end inside an atomic range to the start of the range.

        This is the last hook that may shorten a chunk, and every request with a video passes it.
        vLLM may shorten the chunk further for the encoder's sake; then the rule applies again.
        """
        if request.request_id in self.encoder_cache_mismatch_reqs:
            return [], 0, encoder_compute_budget, [], []
        plan = self.plans.get(request.request_id)
        while True:
            if plan is not None:
                num_new_tokens = self._whole_ranges(
                    request, plan, num_computed_tokens, num_new_tokens
                )
            schedule = super()._try_schedule_encoder_inputs(
                request,
                num_computed_tokens,
                num_new_tokens,
                encoder_compute_budget,
                shift_computed_tokens,
            )
            if plan is None or schedule[1] == num_new_tokens:
                return schedule
            num_new_tokens = schedule[1]

    def _whole_ranges(
        self, request: Request, plan: PrunePlan, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Shorten a chunk so that it splits no atomic range.

        A request that is not running yet waits for a step that takes it through its range, if such
        a step will come: starting it with the few tokens before the video would use up what is
        left of this step's budget on admitting more requests than the KV cache can hold.
        """
        end = num_computed_tokens + num_new_tokens
        boundary = plan.range_start(end)
        if boundary < end and request.status != RequestStatus.RUNNING:
            through = plan.range_end(end) - num_computed_tokens
            if through <= self.range_limit - len(self.running):
                return 0
        return boundary - num_computed_tokens


class PruningScheduler(PruningSchedulerMixin, Scheduler):
    """Synchronous scheduling."""


class PruningAsyncScheduler(PruningSchedulerMixin, AsyncScheduler):
    """Asynchronous scheduling."""


def make_scheduler(vllm_config: "VllmConfig", *args: Any, **kwargs: Any) -> Scheduler:
    """Build the scheduler that fits the engine; named by ``scheduler_cls``."""
    is_async = vllm_config.scheduler_config.async_scheduling
    cls = PruningAsyncScheduler if is_async else PruningScheduler
    return cls(vllm_config, *args, **kwargs)
