"""The attention op of the upper layers: an ordinary one whose KV spec is compact."""

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention

from vllm_dpp.serving.engine.kv_cache import CompactAttentionSpec


class CompactAttention(Attention):
    """An attention layer whose KV holds kept tokens only; made by ``make_compact``."""

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> CompactAttentionSpec:
        return CompactAttentionSpec.like(super().get_kv_cache_spec(vllm_config))


def make_compact(attention: Attention) -> None:
    """Turn a built attention layer into a compact one, in place.

    vLLM's decoder layers build their attention themselves and take no class for it, so the class of
    the instance is exchanged; only ``get_kv_cache_spec`` differs.

    Raises:
        ValueError: The layer's attention is of a class of its own.
    """
    if type(attention) is not Attention:
        raise ValueError(f"cannot prune above an attention layer of type {type(attention)}")
    attention.__class__ = CompactAttention
