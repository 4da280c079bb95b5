"""Attention metadata of the upper KV groups on the V1 runner."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    subclass_attention_backend,
)

from vllm_dpp.serving.step import UpperPass
from vllm_dpp.serving.worker.context import PruningContext


@dataclass(frozen=True, slots=True)
class BuiltPass:
    """What one upper pass reads, by layer name. The builders below fill in the metadata.

    Backends of CPUs keep nothing between two builds, so all passes are built beforehand.
    """

    attn_metadata: dict[str, Any]
    slot_mapping: dict[str, Any]

    def __call__(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.attn_metadata, self.slot_mapping


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
            if layout is None or not layout.passes:
                return super().build(common_prefix_len, common_attn_metadata, fast_build)
            if layout.is_plain:
                slots = common_attn_metadata.slot_mapping
                metadata = compact_metadata(common_attn_metadata, layout.passes[0], slots)
                return super().build(common_prefix_len, metadata, fast_build)
            passes = cast(Sequence[BuiltPass], self.pruning.passes)
            for one, inputs in zip(layout.passes, passes, strict=True):
                slots = inputs.slot_mapping[self.layer_names[0]]
                metadata = compact_metadata(common_attn_metadata, one, slots)
                built = super().build(common_prefix_len, metadata, fast_build)
                inputs.attn_metadata.update(dict.fromkeys(self.layer_names, built))
            return built

    return subclass_attention_backend("Compact", backend, CompactBuilder)


def compact_metadata(
    metadata: CommonAttentionMetadata, one: UpperPass, slots: torch.Tensor
) -> CommonAttentionMetadata:
    """``metadata`` with the requests, rows, lengths and positions of one pass."""
    device = metadata.seq_lens.device
    starts, seq_lens = torch.from_numpy(one.query_start_loc), torch.from_numpy(one.seq_lens)
    which = torch.from_numpy(one.requests)
    prefilling = metadata.is_prefilling
    return metadata.replace(
        num_reqs=len(one.requests),
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=seq_lens.to(device),
        seq_lens_cpu_upper_bound=seq_lens,
        num_actual_tokens=one.num_rows,
        max_query_len=int(one.num_scheduled.max()),
        max_seq_len=int(one.seq_lens.max()),
        block_table_tensor=metadata.block_table_tensor[which],
        slot_mapping=slots,
        positions=torch.from_numpy(one.positions()).to(device),
        is_prefilling=None if prefilling is None else prefilling[which],
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )
