"""What cannot run beside video pruning, checked at start-up.

Most entries name a feature that needs one row for every token in every layer, or an engine part
that this plugin replaces where tokens are left out in the middle of the decoder: they do not apply
where that happens before it alone (`entry_only`). A refusal names the flag and the remedy; nothing
is switched off in silence.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_dpp.serving.request_plan import ENTRY_RATIO_ARG
from vllm_dpp.serving.settings import ServingSettings

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True, slots=True)
class Refusal:
    """One feature that is refused.

    Args:
        flag: What the user set.
        applies: Whether a configuration has it on.
        why: The reason, ending in what to do about it.
        of_layer_k: Whether it is about tokens that are left out there.
        of_entry_alone: Whether it is about what goes where they are left out before the decoder
            alone.
    """

    flag: str
    applies: Callable[["VllmConfig"], bool]
    why: str
    of_layer_k: bool = True
    of_entry_alone: bool = False

    def concerns(self, settings: ServingSettings) -> bool:
        """Whether it may apply under these settings."""
        return not (self.of_layer_k if settings.entry_only else self.of_entry_alone)


AUDIO_IN_VIDEO = "use_audio_in_video"
REFUSALS = (
    Refusal(
        "--pipeline-parallel-size",
        lambda c: c.parallel_config.pipeline_parallel_size > 1,
        "a KV block takes memory on every stage, and layer K would leave it unused on some: the KV "
        "would be twice that of the same share before the decoder; use --tensor-parallel-size",
    ),
    Refusal(
        f"--mm-processor-kwargs {ENTRY_RATIO_ARG}",
        lambda c: ENTRY_RATIO_ARG in (_multimodal(c).mm_processor_kwargs or {}),
        "it is an argument of requests and would be ignored; use --entry-ratio",
        of_layer_k=False,
    ),
    Refusal(
        f"--mm-processor-kwargs {AUDIO_IN_VIDEO}",
        lambda c: bool((_multimodal(c).mm_processor_kwargs or {}).get(AUDIO_IN_VIDEO)),
        "sound would stand between the slices of a video; send it as audio beside the video",
        of_layer_k=False,
    ),
    Refusal(
        "--decode-context-parallel-size",
        lambda c: c.parallel_config.decode_context_parallel_size > 1,
        "it shards KV by full token positions; leave it at 1",
    ),
    Refusal(
        "--prefill-context-parallel-size",
        lambda c: c.parallel_config.prefill_context_parallel_size > 1,
        "it shards prompts by full token positions; leave it at 1",
        of_layer_k=False,
    ),
    Refusal(
        "--data-parallel-size with experts",
        lambda c: c.parallel_config.data_parallel_size > 1 and c.model_config.is_moe,
        "replicas exchange rows of every layer by their unpruned number; run separate servers",
    ),
    Refusal(
        "--enable-return-routed-experts",
        lambda c: c.aux_output_config.enable_return_routed_experts,
        "experts are recorded by full token rows; serve without it",
    ),
    Refusal(
        "--enable-dbo / --ubatch-size",
        lambda c: c.parallel_config.use_ubatching,
        "a micro-batch border may split a video; leave micro-batching off",
        of_layer_k=False,
    ),
    Refusal(
        "--speculative-config",
        lambda c: c.speculative_config is not None and not c.speculative_config.use_ngram(),
        "drafters other than ngram read every row of the decoder; use "
        '\'{"method": "ngram", …}\', or serve without it',
    ),
    Refusal(
        "--speculative-config on the V1 model runner",
        lambda c: _reads_encoder_outputs(c) and not c.use_v2_model_runner,
        "a drafter that reads what enters the decoder would find places in it, which the V2 model "
        "runner can take off; set VLLM_USE_V2_MODEL_RUNNER=1, or use eagle3 or ngram",
        of_layer_k=False,
        of_entry_alone=True,
    ),
    Refusal(
        "--speculative-config enable_adaptive_verification",
        lambda c: bool(c.speculative_config and c.speculative_config.enable_adaptive_verification),
        "the host would not know how many drafts each request has; leave it out",
    ),
    Refusal(
        "--enable-tower-connector-lora",
        lambda c: c.lora_config is not None and c.lora_config.enable_tower_connector_lora,
        "adapters of the vision encoder are mapped to what enters the decoder; leave it out: those "
        "of the decoder are served",
        of_layer_k=False,
    ),
    Refusal(
        "--kv-transfer-config",
        lambda c: c.kv_transfer_config is not None,
        "connectors address KV by full token positions; serve without it",
    ),
    Refusal(
        "--kv-offloading-size",
        lambda c: c.cache_config.kv_offloading_size is not None,
        "offloaded KV is addressed by full token positions; leave it out",
    ),
    Refusal(
        "--kv-events-config",
        lambda c: c.kv_events_config is not None and c.kv_events_config.enable_kv_cache_events,
        "events would name the tokens of full positions for blocks of kept tokens; leave it out",
    ),
    Refusal(
        "--video-pruning-rate",
        lambda c: bool(_multimodal(c) and _multimodal(c).is_multimodal_pruning_enabled()),
        "it would prune the same video a second time; choose one of the two",
        of_layer_k=False,
    ),
    Refusal(
        "--enable-prompt-embeds",
        lambda c: c.model_config.enable_prompt_embeds,
        "without token ids the end of the question is unknown; leave it off",
        of_layer_k=False,
    ),
    Refusal(
        "--kv-sharing-fast-prefill",
        lambda c: c.cache_config.kv_sharing_fast_prefill,
        "it drops rows of its own; leave it off",
    ),
    Refusal(
        "--disable-hybrid-kv-cache-manager",
        lambda c: bool(c.scheduler_config.disable_hybrid_kv_cache_manager),
        "lower and upper layers need KV groups of their own; leave it out",
    ),
    Refusal(
        "--runner pooling",
        lambda c: c.model_config.runner_type != "generate",
        "pooled outputs need a row for every token; use --runner generate",
        of_layer_k=False,
    ),
    Refusal(
        "--scheduler-cls",
        lambda c: c.scheduler_config.scheduler_cls is not None and not _is_ours(c),
        "pruning brings its own scheduler; leave it out",
    ),
    Refusal(
        "sliding-window attention",
        lambda c: c.model_config.get_sliding_window() is not None,
        "a window over kept tokens is not a window over tokens; "
        "use --hf-overrides '{\"use_sliding_window\": false}' if the checkpoint allows it",
    ),
    Refusal(
        "VLLM_USE_BREAKABLE_CUDAGRAPH",
        lambda c: _breakable_cudagraph(),
        "its graphs are keyed by the unpruned batch size; set VLLM_USE_BREAKABLE_CUDAGRAPH=0",
    ),
    Refusal(
        "VLLM_USE_V2_MODEL_RUNNER=0",
        lambda c: not c.use_v2_model_runner and not _is_cpu(),
        "on an accelerator pruning needs the V2 model runner; set VLLM_USE_V2_MODEL_RUNNER=1 and "
        "remove the options that vLLM names as unsupported there",
    ),
)


def refused(vllm_config: "VllmConfig", settings: ServingSettings) -> Iterator[str]:
    """One line for each feature of ``vllm_config`` that pruning refuses."""
    for refusal in REFUSALS:
        if refusal.concerns(settings) and refusal.applies(vllm_config):
            remedy = ", or prune before the decoder alone (entry_only)" * refusal.of_layer_k
            yield f"{refusal.flag} cannot be combined with video pruning: {refusal.why}{remedy}"


def _reads_encoder_outputs(config: "VllmConfig") -> bool:
    """Whether a drafter may: all but EAGLE-3's, which reads the target's layers and tokens."""
    drafter = config.speculative_config
    return drafter is not None and not drafter.use_ngram() and drafter.method != "eagle3"


def _multimodal(config: "VllmConfig"):
    return config.model_config.multimodal_config


def _is_ours(config: "VllmConfig") -> bool:
    return str(config.scheduler_config.scheduler_cls).startswith("vllm_dpp.")


def _is_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def _breakable_cudagraph() -> bool:
    from vllm import envs

    if "VLLM_USE_BREAKABLE_CUDAGRAPH" in os.environ:
        return envs.VLLM_USE_BREAKABLE_CUDAGRAPH
    return envs.VLLM_BATCH_INVARIANT
