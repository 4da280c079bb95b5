"""KV blocks of the upper layers: allocated for kept tokens alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from vllm_dpp.serving.engine.compact_hashes import HashedAs
from vllm_dpp.serving.engine.planned_request import PlannedRequest


@dataclass(frozen=True, kw_only=True)
class CompactAttentionSpec(AttentionSpec):
    """Full attention over compact positions.

    It derives from ``AttentionSpec``: vLLM would merge a ``FullAttentionSpec`` into the lower
    layers' group.
    """

    @classmethod
    def like(cls, spec: KVCacheSpec | None) -> Self:
        """The compact counterpart of a layer's ordinary spec.

        Raises:
            ValueError: The layer does not do plain full attention.
        """
        if type(spec) is not FullAttentionSpec:
            raise ValueError(f"only full attention layers can be pruned, got {spec!r}")
        return cls(**{f.name: getattr(spec, f.name) for f in fields(AttentionSpec)})

    def as_full_attention(self) -> FullAttentionSpec:
        """The ordinary spec with the same pages."""
        return FullAttentionSpec(**{f.name: getattr(self, f.name) for f in fields(AttentionSpec)})

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of one layer for a request of maximum length that is not pruned."""
        longest = vllm_config.model_config.max_model_len
        return cdiv(longest, self.block_size) * self.page_size_bytes


class CompactAttentionManager(FullAttentionManager):
    """Counts blocks at compact lengths, and caches them under names of their own."""

    _planned: Callable[[str], PlannedRequest | None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._planned = _of_another_scheduler

    def attach(self, requests: Mapping[str, PlannedRequest]) -> None:
        """Learn from the scheduler where it keeps what it knows of pruned requests."""
        self._planned = requests.get

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        planned = self._planned(request_id)
        if planned is not None:
            compact_length = planned.plan.compact_length
            num_tokens = compact_length(num_tokens)
            total_computed_tokens = compact_length(total_computed_tokens)
            num_local_computed_tokens = compact_length(num_local_computed_tokens)
            num_tokens_main_model = compact_length(num_tokens_main_model)
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        planned = self._planned(request_id)
        if planned is not None:
            planned.num_allocated = num_tokens
            num_tokens = planned.compact_length(num_tokens)
            num_tokens_main_model = planned.compact_length(num_tokens_main_model)
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Register full blocks for reuse."""
        planned = self._planned(request.request_id)
        if planned is None or planned.hashes is None:
            super().cache_blocks(
                request, num_tokens, retention_interval, replay_boundaries=replay_boundaries
            )
            return
        cached = self.num_cached_block.get(request.request_id, 0)
        full = planned.num_full_blocks(num_tokens, self.block_size)
        if full <= cached:
            return
        self.block_pool.cache_full_blocks(
            request=HashedAs(request, planned.hashes),
            blocks=self.req_to_blocks[request.request_id],
            num_cached_blocks=cached,
            num_full_blocks=full,
            block_size=self.block_size,
            kv_cache_group_id=self.kv_cache_group_id,
        )
        self.num_cached_block[request.request_id] = full

    @classmethod
    def find_longest_cache_hit(
        cls, *, kv_cache_spec: KVCacheSpec, **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        if isinstance(kv_cache_spec, CompactAttentionSpec):
            kv_cache_spec = kv_cache_spec.as_full_attention()
        return super().find_longest_cache_hit(kv_cache_spec=kv_cache_spec, **kwargs)


def _of_another_scheduler(request_id: str) -> PlannedRequest | None:
    raise RuntimeError("compact KV groups need the scheduler of vllm_dpp")


def register_spec() -> None:
    """Tell vLLM's registry which manager serves our spec. Idempotent.

    The registry fills itself with the built-in specs only while it is empty, so they come first.
    """
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(CompactAttentionSpec, CompactAttentionManager)


register_spec()
