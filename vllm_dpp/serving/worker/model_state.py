"""The V2 model runner's side: upper KV groups get the compact layout of the same batch.

Everything goes through ``Model.get_model_state_cls``: no worker class, no runner subclass, no
attention backend of ours.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.utils import AttentionGroup

from vllm_dpp.serving.engine.kv_cache import CompactAttentionSpec
from vllm_dpp.serving.step import StepLayout


class PruningModelState(DefaultModelState):
    """Builds attention metadata twice: lower groups as usual, upper groups on compact rows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pruning = self.model.pruning
        # Full decode graphs read these at replay, so their addresses never change.
        self.query_start_loc = self._buffer(self.max_num_reqs + 1)
        self.seq_lens = self._buffer(self.max_num_reqs)

    def _buffer(self, size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32, device=self.device)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        self.pruning.add_request(
            new_req_data.req_id,
            new_req_data.prompt_token_ids,
            new_req_data.mm_features,
            new_req_data.sampling_params,
        )

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self.pruning.remove_request(req_id)

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        self.compact_groups = [
            i for i, spec in enumerate(specs) if isinstance(spec, CompactAttentionSpec)
        ]
        caching = self.vllm_config.cache_config.enable_prefix_caching
        block_size = specs[self.compact_groups[0]].block_size
        self.pruning.set_block_size(block_size if caching else None)
        self.block_tables = block_tables
        self.slot_mappings = torch.zeros_like(block_tables.slot_mappings)

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: list[list[AttentionGroup]],
        kv_cache_config: KVCacheConfig,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Attention metadata of every layer; see the class."""

        def build(batch: InputBatch, compact: bool | None) -> dict[str, Any]:
            groups = [
                group if compact is None or compact == (i in self.compact_groups) else []
                for i, group in enumerate(attn_groups)
            ]
            return super(PruningModelState, self).prepare_attn(
                batch,
                cudagraph_mode,
                block_tables,
                slot_mappings,
                groups,
                kv_cache_config,
                **kwargs,
            )

        layout = self._layout(input_batch)
        if layout is None and cudagraph_mode != CUDAGraphMode.FULL:
            return build(input_batch, None)
        metadata = build(input_batch, compact=False)
        if layout is None:
            compact_batch = self._in_own_buffers(input_batch)
        else:
            compact_batch = self._compact(input_batch, layout, cudagraph_mode)
            self._map_slots(compact_batch, layout, slot_mappings)
        return metadata | build(compact_batch, compact=True)

    def _layout(self, batch: InputBatch) -> StepLayout | None:
        return self.pruning.prepare_step(
            zip(
                batch.req_ids,
                batch.num_computed_tokens_np.tolist(),
                batch.num_scheduled_tokens.tolist(),
                strict=False,  # padding adds no request ids
            )
        )

    def _in_own_buffers(self, batch: InputBatch) -> InputBatch:
        """The batch as it is, in the buffers that a full graph was captured with."""
        n = batch.num_reqs_after_padding
        self.query_start_loc[: n + 1].copy_(batch.query_start_loc[: n + 1])
        self.seq_lens[:n].copy_(batch.seq_lens[:n])
        return replace(
            batch, query_start_loc=self.query_start_loc[: n + 1], seq_lens=self.seq_lens[:n]
        )

    def _compact(
        self, batch: InputBatch, layout: StepLayout, cudagraph_mode: CUDAGraphMode
    ) -> InputBatch:
        """The batch as the upper layers see it: fewer rows, shorter sequences."""
        n, padded = batch.num_reqs, batch.num_reqs_after_padding
        starts = np.full(padded + 1, layout.num_compact_rows, np.int32)
        starts[: n + 1] = layout.query_start_loc
        pruned = np.zeros(padded, np.int32)
        pruned[:n] = layout.num_pruned
        async_tensor_h2d(starts, out=self.query_start_loc[: padded + 1])
        seq_lens = batch.seq_lens[:padded] - async_tensor_h2d(pruned, device=self.device)
        self.seq_lens[:padded].copy_(seq_lens)
        upper_bound = batch.seq_lens_cpu_upper_bound.clone()
        upper_bound[:padded] -= torch.from_numpy(pruned)
        positions = async_tensor_h2d(layout.compact_positions(), device=self.device)
        full_graph = cudagraph_mode == CUDAGraphMode.FULL
        return replace(
            batch,
            num_tokens=layout.num_compact_rows,
            num_scheduled_tokens=layout.num_scheduled,
            query_start_loc=self.query_start_loc[: padded + 1],
            query_start_loc_np=starts,
            seq_lens=self.seq_lens[:padded],
            seq_lens_cpu_upper_bound=upper_bound,
            positions=batch.positions if full_graph else positions,
            max_query_len=batch.max_query_len if full_graph else None,
        )

    def _map_slots(
        self, batch: InputBatch, layout: StepLayout, slot_mappings: torch.Tensor
    ) -> None:
        """Overwrite the compact groups' slots in place: the forward context holds views of them."""
        positions = async_tensor_h2d(layout.compact_positions(), device=self.device)
        width = slot_mappings.shape[1]
        slots = self.block_tables.compute_slot_mappings(
            batch.idx_mapping,
            batch.query_start_loc[: batch.num_reqs + 1],
            positions,
            width,
            out=self.slot_mappings,
        )
        for group in self.compact_groups:
            slot_mappings[group].copy_(slots[group])
