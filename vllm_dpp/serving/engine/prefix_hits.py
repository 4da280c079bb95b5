"""How much of a pruned request the prefix cache holds."""

from collections.abc import Iterable

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

from vllm_dpp.serving.engine.kv_cache import CompactAttentionManager
from vllm_dpp.serving.engine.planned_request import PlannedRequest
from vllm_dpp.serving.plan import PrunePlan

Hit = tuple[tuple[list[KVCacheBlock], ...], int]
"""Blocks of each KV group, and the tokens that they hold."""


def longest_hit(
    manager: KVCacheManager,
    planned: PlannedRequest,
    block_hashes: Iterable[BlockHash],
    max_tokens: int,
    block_size: int,
) -> Hit:
    """The longest prefix that lower and upper groups hold, and at which a hit may end.

    Inside a turn's pruned videos no hit ends: its rows below layer K would be missing, and without
    all of them nothing can be selected.

    Args:
        manager: vLLM's.
        planned: The request.
        block_hashes: vLLM's hashes of its full blocks.
        max_tokens: Tokens that a hit may hold at most.
        block_size: Tokens in a block.
    """
    plan, pool = planned.prompt_plan, manager.block_pool
    managers = manager.coordinator.single_type_managers
    upper = [i for i, m in enumerate(managers) if isinstance(m, CompactAttentionManager)]
    lower = [i for i in range(len(managers)) if i not in upper]
    limit = plan.hit_length(max_tokens, block_size)
    found = _look_up(pool, block_hashes, lower, limit // block_size)
    if lower:
        limit = plan.hit_length(min(limit, len(found) * block_size), block_size)
    num_compact = plan.after_hit(limit).compact_length(limit) // block_size
    assert planned.hashes is not None  # the cache is on
    found_above = _look_up(pool, planned.hashes, upper, num_compact)
    limit = _shorten(plan, limit, len(found_above), block_size)
    num_compact = plan.after_hit(limit).compact_length(limit) // block_size
    blocks: list[list[KVCacheBlock]] = [[] for _ in managers]
    for groups, rows, count in (
        (lower, found, limit // block_size),
        (upper, found_above, num_compact),
    ):
        for i, group in enumerate(groups):
            blocks[group] = [row[i] for row in rows[:count]]
    return tuple(blocks), limit


def _look_up(
    pool: BlockPool, hashes: Iterable[BlockHash], groups: list[int], count: int
) -> list[list[KVCacheBlock]]:
    """The first of ``count`` blocks that all the groups hold, each with a block for each group."""
    found: list[list[KVCacheBlock]] = []
    for _, block_hash in zip(range(count), hashes, strict=False):
        blocks = pool.get_cached_block(block_hash, groups)
        if blocks is None:
            break
        found.append(blocks)
    return found


def _shorten(plan: PrunePlan, limit: int, num_blocks: int, block_size: int) -> int:
    """The longest hit up to ``limit`` for which ``num_blocks`` compact blocks are enough."""
    while True:
        limit = plan.hit_length(limit, block_size)
        missing = plan.after_hit(limit).compact_length(limit) // block_size - num_blocks
        if missing <= 0:
            return limit
        limit -= missing * block_size
