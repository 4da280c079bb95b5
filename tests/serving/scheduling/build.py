"""Real schedulers, ours and vLLM's own, from a scenario's shape."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
)
from vllm.v1.request import Request

from tests.serving.scheduling.scenario import PLACEHOLDER, TURN_END, Ask, Scenario, Shape
from vllm_dpp.serving.engine.kv_cache import CompactAttentionSpec
from vllm_dpp.serving.engine.scheduler import make_scheduler
from vllm_dpp.serving.request_plan import plan_request
from vllm_dpp.serving.settings import ServingSettings

VARIANT = "DPPQwen2_5_VLForConditionalGeneration"
MAX_MODEL_LEN = 4096


def base_config(checkpoint: Path) -> VllmConfig:
    """The configuration that every shape is a variation of; it takes seconds, so make one."""
    return EngineArgs(
        str(checkpoint),
        hf_overrides={"architectures": [VARIANT]},
        additional_config={
            "dpp": {"turn_end_token_id": TURN_END, "video_token_id": PLACEHOLDER["video"]}
        },
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=MAX_MODEL_LEN,
    ).create_engine_config()


def config_of(base: VllmConfig, scenario: Scenario) -> VllmConfig:
    """The configuration of one engine."""
    shape = scenario.shape
    config = copy.copy(base)
    config.scheduler_config = _with(
        base.scheduler_config,
        max_num_batched_tokens=shape.budget,
        max_num_seqs=shape.max_num_seqs,
        max_num_encoder_input_tokens=shape.encoder_budget or shape.budget,
        encoder_cache_size=shape.encoder_cache or shape.budget,
        long_prefill_token_threshold=shape.chunk_limit,
        disable_chunked_mm_input=shape.whole_media,
        policy=shape.policy,
        async_scheduling=shape.asynchronous,
        scheduler_reserve_full_isl=shape.reserve,
        watermark=shape.watermark,
    )
    config.cache_config = _with(
        base.cache_config,
        block_size=shape.block_size,
        enable_prefix_caching=shape.caching,
        num_gpu_blocks=1,  # read from the KV cache's own configuration
    )
    settings = {
        "retention_ratio": shape.retention_ratio,
        "min_retention_ratio": 1e-6,
        "relevance": shape.relevance,
        "decide_every": shape.piece,
        "max_deferred_tokens": shape.deferred,
    }
    config.additional_config = {"dpp": {**base.additional_config["dpp"], **settings}}
    return config


def _with(section: Any, **values: Any) -> Any:
    changed = copy.copy(section)
    for name, value in values.items():
        assert hasattr(section, name), f"vLLM has no {name} any more"
        setattr(changed, name, value)
    return changed


class Registry:
    """Stands in for the multimodal registry, whose budget needs a processor."""

    def __init__(self, longest_item: int) -> None:
        kinds = {"video": longest_item, "image": longest_item}
        self.info = SimpleNamespace(
            ctx=SimpleNamespace(model_config=SimpleNamespace(max_model_len=MAX_MODEL_LEN)),
            supported_mm_limits=dict.fromkeys(kinds),
            allowed_mm_limits=dict.fromkeys(kinds, 99),
            get_mm_max_tokens_per_item=lambda seq_len, mm_counts: kinds,
        )

    def create_processor(self, model_config: Any) -> Any:
        return SimpleNamespace(info=self.info)


class NoGrammar:
    """Stands in for the manager of structured output."""

    def accept_tokens(self, request: Request, token_ids: list[int]) -> bool:
        return True


def build(base: VllmConfig, scenario: Scenario, ours: bool) -> Scheduler:
    """Our scheduler, or vLLM's on the same bytes of KV cache."""
    config, shape = config_of(base, scenario), scenario.shape
    if ours:
        make: Any = make_scheduler
    else:
        make = AsyncScheduler if shape.asynchronous else Scheduler
    scheduler = make(
        vllm_config=config,
        kv_cache_config=_kv_cache(shape, ours),
        structured_output_manager=NoGrammar(),
        block_size=shape.block_size,
        hash_block_size=shape.block_size,
        mm_registry=Registry(scenario.longest_item),
    )
    scheduler.use_v2_model_runner = shape.v2
    if ours:
        scheduler.replays_graphs = shape.graphs
    return scheduler


def _kv_cache(shape: Shape, ours: bool) -> KVCacheConfig:
    lower = FullAttentionSpec(
        block_size=shape.block_size, num_kv_heads=1, head_size=16, dtype=torch.float32
    )
    compact = CompactAttentionSpec.like(lower)
    specs: list[KVCacheSpec] = [lower]  # of all layers: as many bytes as a block of each group
    if ours:
        specs = [lower] * shape.lower_groups + [compact] * shape.compact_groups
    per_group = cdiv(shape.kv_tokens, shape.block_size)
    groups = [KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(
        num_blocks=1 + per_group * len(specs),  # one is the null block
        kv_cache_tensors=[],
        kv_cache_groups=groups,
        prefix_cache_retention_interval=0,
        hash_block_size=shape.block_size,
    )


@cache
def _block_hasher(block_size: int) -> Any:
    hash_fn = get_hash_fn_by_name("sha256")
    init_none_hash(hash_fn)
    return get_request_block_hasher(block_size, hash_fn)


def features(ask: Ask) -> list[MultiModalFeatureSpec]:
    """An ask's media as vLLM sends them; the scheduler never opens ``data``."""
    return [
        MultiModalFeatureSpec(
            data=None,
            modality=item.kind,
            identifier=item.name,
            mm_position=PlaceholderRange(offset=start, length=item.length),
            mm_hash=item.name,
        )
        for start, item in ask.media
    ]


def sampling_params(ask: Ask) -> SamplingParams:
    extra = None if ask.ratio is None else {"dpp_retention_ratio": ask.ratio}
    return SamplingParams(max_tokens=ask.max_tokens, ignore_eos=True, extra_args=extra)


def request_of(ask: Ask, shape: Shape, arrival_time: float) -> Request:
    """A real request; no two of them arrive at the same time."""
    return Request(
        request_id=ask.name,
        prompt_token_ids=ask.tokens[: ask.prompt_length].tolist(),
        sampling_params=sampling_params(ask),
        pooling_params=None,
        arrival_time=arrival_time,
        mm_features=features(ask),
        priority=ask.priority,
        block_hasher=_block_hasher(shape.block_size) if shape.caching else None,
    )


def plan_of(base: VllmConfig, scenario: Scenario) -> Callable[[Ask], Any]:
    """How a worker plans: from the request and the settings, without asking the scheduler."""
    settings = ServingSettings.from_vllm_config(config_of(base, scenario))
    block_size = scenario.shape.block_size if scenario.shape.caching else None

    def plan(ask: Ask) -> Any:
        prompt = ask.tokens[: ask.prompt_length].tolist()
        return plan_request(prompt, features(ask), sampling_params(ask), settings, block_size)[0]

    return plan
