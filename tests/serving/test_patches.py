"""The internals of vLLM that the cards in ``patches/`` name are still as the cards say."""

import inspect

import pytest
import torch
import vllm
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.worker import cpu_worker

from vllm_dpp.serving.engine.kv_cache import CompactAttentionSpec
from vllm_dpp.serving.worker.attention import CompactAttention, make_compact


def test_the_version_that_the_cards_describe() -> None:
    assert vllm.__version__.startswith("0.32."), "read the cards again, then raise this"


def test_cpu_worker_names_its_runner() -> None:
    assert "CPUModelRunner(self.vllm_config" in inspect.getsource(cpu_worker.CPUWorker.init_device)
    assert hasattr(cpu_worker, "CPUModelRunner")


def test_built_in_specs_are_registered_beside_ours() -> None:
    page = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
    for spec in (
        FullAttentionSpec(**page),
        SlidingWindowSpec(**page, sliding_window=8),
        CompactAttentionSpec(**page),
    ):
        assert KVCacheSpecRegistry.get_manager_class(spec) is not None
        assert KVCacheSpecRegistry.get_uniform_type_base_spec(spec) is type(spec)


def test_only_plain_attention_is_made_compact() -> None:
    with pytest.raises(ValueError, match="cannot prune above"):
        make_compact(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="only full attention"):
        CompactAttentionSpec.like(None)
    changed = {name for name in vars(CompactAttention) if not name.startswith("_")}
    assert CompactAttention.__bases__ == (Attention,) and changed == {"get_kv_cache_spec"}
    assert not issubclass(CompactAttentionSpec, FullAttentionSpec), "vLLM would merge the groups"
