"""The V1 CPU model runner with compact upper groups."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_dpp.serving.engine.kv_cache import CompactAttentionSpec
from vllm_dpp.serving.step import StepLayout
from vllm_dpp.serving.worker.context import PruningContext

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
        block_size = specs[self.compact_groups[0]].block_size
        self.pruning.set_block_size(block_size if caching else None)

    def _update_states(self, scheduler_output: "SchedulerOutput") -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self.pruning.remove_request(request_id)
        for request in scheduler_output.scheduled_new_reqs:
            self.pruning.add_request(
                request.req_id,
                request.prompt_token_ids,
                request.mm_features,
                request.sampling_params,
            )
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
            self._map_slots(layout)
        return prepared

    def _map_slots(self, layout: StepLayout) -> None:
        starts = torch.from_numpy(layout.query_start_loc)
        positions = torch.from_numpy(layout.compact_positions())
        for group in self.compact_groups:
            table = self.input_batch.block_table[group]
            table.compute_slot_mapping(self.input_batch.num_reqs, starts, positions)
            table.slot_mapping.gpu[layout.num_compact_rows : layout.num_rows].fill_(-1)

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        self.pruning.take_layout()
        return super()._dummy_run(*args, **kwargs)
