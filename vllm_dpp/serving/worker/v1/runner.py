"""The V1 CPU model runner with compact upper groups."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_dpp.serving.engine.kv_cache import CompactAttentionSpec
from vllm_dpp.serving.step import StepLayout, UpperPass
from vllm_dpp.serving.worker.adapters import adapter_id_of
from vllm_dpp.serving.worker.context import PruningContext
from vllm_dpp.serving.worker.v1.attention import BuiltPass

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class PruningCPUModelRunner(CPUModelRunner):
    """Plans requests as they come and maps the slots of the upper groups."""

    @property
    def pruning(self) -> PruningContext:
        return self.get_model().pruning

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        self.compact_groups = [
            i for i, spec in enumerate(specs) if isinstance(spec, CompactAttentionSpec)
        ]
        caching = self.cache_config.enable_prefix_caching
        self.pruning.configure(
            block_size=specs[self.compact_groups[0]].block_size if caching else None,
            max_rows=self.scheduler_config.max_num_batched_tokens,
        )

    def _update_states(self, scheduler_output: "SchedulerOutput") -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self.pruning.remove_request(request_id)
        for request_id in scheduler_output.preempted_req_ids or ():
            self.pruning.preempt_request(request_id)
        for request in scheduler_output.scheduled_new_reqs:
            self.pruning.add_request(
                request.req_id,
                request.prompt_token_ids,
                request.mm_features,
                request.sampling_params,
                request.num_computed_tokens,
                adapter_id_of(request.lora_request),
            )
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, num_computed in zip(
            cached.req_ids, cached.num_computed_tokens, strict=True
        ):
            if request_id in cached.resumed_req_ids:
                self.pruning.restart_request(request_id, num_computed)
        return super()._update_states(scheduler_output)

    def _prepare_inputs(
        self, scheduler_output: "SchedulerOutput", num_scheduled_tokens: np.ndarray
    ) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        batch = self.input_batch
        layout = self.pruning.prepare_step(
            zip(
                batch.req_ids,
                batch.num_computed_tokens_cpu[: batch.num_reqs].tolist(),
                num_scheduled_tokens.tolist(),
                strict=True,
            )
        )
        if layout is not None:
            self._prepare_passes(layout)
        return prepared

    def _prepare_passes(self, layout: StepLayout) -> None:
        """Slots of the upper layers: in place where every row goes up, else for each pass."""
        if layout.is_plain:
            for group in self.compact_groups:
                self._slots(group, layout.passes[0])
            return
        passes = []
        for one in layout.passes:
            slot_mapping = {}
            for group in self.compact_groups:
                slots = self._slots(group, one)[: one.num_rows].clone()
                names = self.kv_cache_config.kv_cache_groups[group].layer_names
                slot_mapping.update(dict.fromkeys(names, slots))
            passes.append(BuiltPass({}, slot_mapping))
        # The metadata builders fill in the rest; see `attention`.
        self.pruning.set_passes(passes)

    def _slots(self, group: int, one: UpperPass) -> torch.Tensor:
        """The group's slot mapping, computed for one pass."""
        num_reqs = self.input_batch.num_reqs
        counts = np.zeros(num_reqs, np.int32)
        counts[one.requests] = one.num_scheduled
        starts = np.zeros(num_reqs + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        table = self.input_batch.block_table[group]
        table.compute_slot_mapping(
            num_reqs, torch.from_numpy(starts), torch.from_numpy(one.positions())
        )
        return table.slot_mapping.gpu

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        self.pruning.take_layout()
        return super()._dummy_run(*args, **kwargs)
