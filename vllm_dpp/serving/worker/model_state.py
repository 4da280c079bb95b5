"""The V2 model runner's side: upper KV groups get the compact layout of the same batch.

Everything goes through ``Model.get_model_state_cls``: no worker class, no runner subclass, no
attention backend of ours.
"""

from dataclasses import replace
from functools import partial
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
from vllm_dpp.serving.step import StepLayout, UpperPass
from vllm_dpp.serving.worker.adapters import adapter_id_of


class PruningModelState(DefaultModelState):
    """Builds attention metadata twice: lower groups as usual, upper groups on compact rows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pruning = self.model.pruning
        self.speculates = self.vllm_config.speculative_config is not None
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
            new_req_data.num_computed_tokens,
            adapter_id_of(new_req_data.lora_request),
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
        self.pruning.configure(
            block_size=specs[self.compact_groups[0]].block_size if caching else None,
            max_rows=self.vllm_config.scheduler_config.max_num_batched_tokens,
        )
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

        def build(
            batch: InputBatch,
            mode: CUDAGraphMode,
            compact: bool | None,
            tables: tuple[torch.Tensor, ...] = block_tables,
            slots: torch.Tensor = slot_mappings,
        ) -> dict[str, Any]:
            groups = [
                group if compact is None or compact == (i in self.compact_groups) else []
                for i, group in enumerate(attn_groups)
            ]
            return super(PruningModelState, self).prepare_attn(
                batch, mode, tables, slots, groups, kv_cache_config, **kwargs
            )

        def build_pass(one: UpperPass) -> tuple[dict[str, Any], dict[str, Any]]:
            batch = self._batch_of(input_batch, one)
            slots = self._slots(batch)
            which = async_tensor_h2d(one.requests, device=self.device)
            tables = tuple(table[which] for table in block_tables)
            metadata = build(batch, CUDAGraphMode.NONE, True, tables, slots)
            groups = kv_cache_config.kv_cache_groups
            names = {name: i for i in self.compact_groups for name in groups[i].layer_names}
            return metadata, {name: slots[i, : one.num_rows] for name, i in names.items()}

        layout = self._layout(input_batch)
        full_graph = cudagraph_mode == CUDAGraphMode.FULL
        if layout is None and not full_graph:
            return build(input_batch, cudagraph_mode, None)
        metadata = build(input_batch, cudagraph_mode, compact=False)
        if layout is None:
            batch = self._in_own_buffers(input_batch)
        elif layout.is_plain:
            batch = self._compact(input_batch, layout, full_graph)
            slots = self._slots(batch, self._compact_positions(input_batch, layout))
            for group in self.compact_groups:  # in place: the forward context holds views
                slot_mappings[group].copy_(slots[group, : slot_mappings.shape[1]])
        else:
            if full_graph:
                raise RuntimeError("a step that reads a video cannot replay a full CUDA graph")
            self.pruning.set_passes([partial(build_pass, one) for one in layout.passes])
            return metadata
        return metadata | build(batch, cudagraph_mode, compact=True)

    def _layout(self, batch: InputBatch) -> StepLayout | None:
        return self.pruning.prepare_step(
            zip(
                batch.req_ids,
                batch.num_computed_tokens_np.tolist(),
                batch.num_scheduled_tokens.tolist(),
                strict=False,  # padding adds no request ids
            )
        )

    def _slots(self, batch: InputBatch, positions: torch.Tensor | None = None) -> torch.Tensor:
        """[groups, T] slots of the batch's rows, the rest is padding; overwritten by the next."""
        return self.block_tables.compute_slot_mappings(
            batch.idx_mapping,
            batch.query_start_loc[: batch.num_reqs + 1],
            batch.positions if positions is None else positions,
            self.slot_mappings.shape[1],
            out=self.slot_mappings,
        )

    def _in_own_buffers(self, batch: InputBatch) -> InputBatch:
        """The batch as it is, in the buffers that a full graph was captured with."""
        n = batch.num_reqs_after_padding
        self.query_start_loc[: n + 1].copy_(batch.query_start_loc[: n + 1])
        self.seq_lens[:n].copy_(batch.seq_lens[:n])
        return replace(
            batch, query_start_loc=self.query_start_loc[: n + 1], seq_lens=self.seq_lens[:n]
        )

    def _compact(self, batch: InputBatch, layout: StepLayout, full_graph: bool) -> InputBatch:
        """The batch as the upper layers see it where every row goes up: shorter sequences."""
        n, padded = batch.num_reqs, batch.num_reqs_after_padding
        pruned = np.zeros(padded, np.int32)
        pruned[:n] = layout.num_pruned
        self.query_start_loc[: padded + 1].copy_(batch.query_start_loc[: padded + 1])
        seq_lens = batch.seq_lens[:padded] - async_tensor_h2d(pruned, device=self.device)
        self.seq_lens[:padded].copy_(seq_lens)
        upper_bound = batch.seq_lens_cpu_upper_bound.clone()
        upper_bound[:padded] -= torch.from_numpy(pruned)
        positions = batch.positions
        if not full_graph:
            positions = self._compact_positions(batch, layout)
        return replace(
            batch,
            query_start_loc=self.query_start_loc[: padded + 1],
            seq_lens=self.seq_lens[:padded],
            seq_lens_cpu_upper_bound=upper_bound,
            positions=positions,
        )

    def _compact_positions(self, batch: InputBatch, layout: StepLayout) -> torch.Tensor:
        """[num_rows] int64 where every row goes up.

        Off the device's own positions: with speculation and asynchronous scheduling the host does
        not know how many drafts of the last step were taken.
        """
        pruned = np.repeat(layout.num_pruned, batch.num_scheduled_tokens[: batch.num_reqs])
        rows = batch.positions[: layout.num_rows]
        return rows - async_tensor_h2d(pruned, device=self.device)

    def _drift(self, batch: InputBatch, one: UpperPass) -> torch.Tensor:
        """[n] int32, what the device knows of the length of each request of a pass, less what the
        host does; see ``_compact_positions``.
        """
        known = batch.num_computed_tokens_np + batch.num_scheduled_tokens[: batch.num_reqs]
        which = async_tensor_h2d(one.requests, device=self.device)
        host = async_tensor_h2d(known[one.requests].astype(np.int32), device=self.device)
        return batch.seq_lens[which] - host

    def _batch_of(self, batch: InputBatch, one: UpperPass) -> InputBatch:
        """The requests and rows of one pass."""
        n, seq_lens = len(one.requests), one.seq_lens
        which = async_tensor_h2d(one.requests, device=self.device)
        on_device = async_tensor_h2d(seq_lens, device=self.device)
        positions = async_tensor_h2d(one.positions(), device=self.device)
        if self.speculates:
            drift = self._drift(batch, one)
            on_device += drift
            of_rows = np.repeat(np.arange(n), one.num_scheduled)
            positions += drift[async_tensor_h2d(of_rows, device=self.device)]
        return replace(
            batch,
            req_ids=[batch.req_ids[i] for i in one.requests],
            num_reqs=n,
            num_reqs_after_padding=n,
            idx_mapping=batch.idx_mapping[which],
            idx_mapping_np=batch.idx_mapping_np[one.requests],
            num_tokens=one.num_rows,
            num_tokens_after_padding=one.num_rows,
            num_scheduled_tokens=one.num_scheduled,
            query_start_loc=async_tensor_h2d(one.query_start_loc, device=self.device),
            query_start_loc_np=one.query_start_loc,
            seq_lens=on_device,
            seq_lens_cpu_upper_bound=torch.from_numpy(seq_lens),
            is_prefilling_np=batch.is_prefilling_np[one.requests],
            positions=positions,
            max_query_len=None,
        )
