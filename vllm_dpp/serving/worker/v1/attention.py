"""Attention metadata of the upper KV groups on the V1 runner."""

import functools
from typing import Any

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    subclass_attention_backend,
)

from vllm_dpp.serving.step import StepLayout
from vllm_dpp.serving.worker.context import PruningContext


@functools.cache
def compact_backend(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """``backend`` with a metadata builder that sees compact rows."""
    builder: type[AttentionMetadataBuilder[Any]] = backend.get_builder_cls()

    class CompactBuilder(builder):
        """Replaces the batch's layout by the compact one before the backend reads it."""

        def __init__(
            self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any
        ) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            layers = vllm_config.compilation_config.static_forward_context
            self.pruning: PruningContext = layers[layer_names[0]].pruning

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: CommonAttentionMetadata,
            fast_build: bool = False,
        ) -> Any:
            layout = self.pruning.layout
            if layout is not None:
                common_attn_metadata = compact_metadata(common_attn_metadata, layout)
            return super().build(common_prefix_len, common_attn_metadata, fast_build)

    return subclass_attention_backend("Compact", backend, CompactBuilder)


def compact_metadata(
    metadata: CommonAttentionMetadata, layout: StepLayout
) -> CommonAttentionMetadata:
    """``metadata`` with the rows, lengths and positions that the upper layers see."""
    device = metadata.seq_lens.device
    starts = torch.from_numpy(layout.query_start_loc)
    pruned = torch.from_numpy(layout.num_pruned)
    seq_lens_cpu = metadata.seq_lens_cpu_upper_bound - pruned
    rows = layout.num_compact_rows
    return metadata.replace(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=metadata.seq_lens - pruned.to(device),
        seq_lens_cpu_upper_bound=seq_lens_cpu,
        num_actual_tokens=rows,
        max_query_len=int(layout.num_scheduled.max()),
        max_seq_len=int(seq_lens_cpu.max()),
        slot_mapping=metadata.slot_mapping[:rows],
        positions=torch.from_numpy(layout.compact_positions()).to(device),
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
