"""The media of a refused request: both ends of vLLM's media cache must stay in step.

vLLM's front end knows which media the engine has by a *shadow* of the engine's cache, and moves the
shadow while it processes a prompt, before anybody can refuse the request. If the engine never heard
of a refused request, the shadow would promise media that the engine has not got, and another
request would fail. So the media of a refused request

- still travel to the engine, in a request that ends before it is scheduled (``lru``), or
- are let go where they wait in shared memory for a worker to read them (``shm``).

The other kinds of cache (``None``, and the one of several front ends) have no other end.
See ``patches/refused-media.md``.
"""

from typing import TYPE_CHECKING, Any

from vllm.multimodal.cache import LruKeyReplicatedSenderCache, ShmObjectStoreSenderCache
from vllm.sampling_params import SamplingParams

from vllm_dpp.serving.request_plan import RETENTION_RATIO_ARG

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest


def delivery(engine: Any, refused: "EngineCoreRequest") -> "EngineCoreRequest | None":
    """Make of a refused request one that brings its media to the engine and does nothing else.

    Args:
        engine: The ``AsyncLLM`` or ``LLMEngine`` that was asked.
        refused: The request; it is changed.

    Returns:
        The request, or ``None`` where the engine need not see any media.
    """
    shadow = engine.renderer.mm_processor_cache
    if not refused.mm_features or not isinstance(shadow, LruKeyReplicatedSenderCache):
        return None
    refused.sampling_params = SamplingParams(
        max_tokens=1, watermarking=False, extra_args={RETENTION_RATIO_ARG: 1}
    )
    refused.resumable = False
    refused.abort_immediately = True
    engine.input_processor.assign_request_id(refused)
    return refused


def let_go(engine: Any, refused: "EngineCoreRequest") -> None:
    """Give up the claims by which media stay in shared memory until a worker has read them.

    To be called on the thread that processes media, like everything that writes to the cache.
    """
    shared = engine.renderer.mm_processor_cache
    if not isinstance(shared, ShmObjectStoreSenderCache):
        return
    claims = shared._shm_cache.writer_flag
    for feature in refused.mm_features or ():
        item = feature.data
        if item is None or "monotonic_id" not in item or getattr(item, "let_go", False):
            continue
        item.let_go = True  # the caller may send the same prompt again
        if claims.get(item["monotonic_id"].data):
            claims[item["monotonic_id"].data] -= 1
