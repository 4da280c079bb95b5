"""What a scheduler and a worker still hold when every request is gone."""

from collections.abc import Iterator, Mapping
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from tests.serving.scheduling.worker import Worker

QUEUES = (
    "requests",
    "waiting",
    "kv_holding_waiting",
    "deferred_waiting",
    "running",
    "finished_req_ids",
    "reset_preempted_req_ids",
    "encoder_cache_mismatch_reqs",
    "_inflight_prefills",
    "deferred_frees",
)


def leftovers(scheduler: Scheduler, worker: Worker) -> list[str]:
    """Everything that is not as it was before the first request."""
    return [
        *(name for name in QUEUES if len(getattr(scheduler, name))),
        *_blocks(scheduler),
        *_encoder(scheduler, worker),
        *(f"{path} names a request" for path in _mentions(scheduler, set(worker.asks))),
        *(f"the worker's {name}" for name in worker.rows),
    ]


def _blocks(scheduler: Scheduler) -> Iterator[str]:
    manager = scheduler.kv_cache_manager
    pool = manager.block_pool
    held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    if held:
        yield f"{held} KV blocks"
    for i, group in enumerate(manager.coordinator.single_type_managers):
        if group.req_to_blocks or group.num_cached_block:
            yield f"KV group {i}'s tables"
    if not manager.reset_prefix_cache():
        yield "references to KV blocks"


def _encoder(scheduler: Scheduler, worker: Worker) -> Iterator[str]:
    manager = scheduler.encoder_cache_manager
    if manager.request_cached_ids or any(manager.cached.values()):
        yield f"encoder references {manager.request_cached_ids}"
    if manager.num_freeable_slots != manager.cache_size:
        yield f"{manager.cache_size - manager.num_freeable_slots} encoder slots"
    if set(manager.cached) != set(worker.encoded):
        yield f"encoder cache {sorted(manager.cached)}, the worker's {sorted(worker.encoded)}"


def _mentions(scheduler: Scheduler, names: set[str]) -> Iterator[str]:
    """Where state that our mixin and our managers add still names a request."""
    owners: dict[str, Any] = {"scheduler": scheduler}
    for i, manager in enumerate(scheduler.kv_cache_manager.coordinator.single_type_managers):
        owners[f"KV group {i}"] = manager
    for owner, value in owners.items():
        for name, inner in vars(value).items():
            if _names_any(inner, names, set()):
                yield f"{owner}.{name}"


def _names_any(value: Any, names: set[str], seen: set[int]) -> bool:
    if isinstance(value, str):
        return value in names
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, Mapping):
        return any(_names_any(x, names, seen) for pair in value.items() for x in pair)
    if isinstance(value, (list, tuple, set, frozenset)):
        return any(_names_any(x, names, seen) for x in value)
    if type(value).__module__.startswith("vllm_dpp"):
        fields = [getattr(value, name, None) for name in getattr(type(value), "__slots__", ())]
        return _names_any([*getattr(value, "__dict__", {}).values(), *fields], names, seen)
    return False
