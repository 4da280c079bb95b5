"""The internals of vLLM that the cards in ``patches/`` name are still as the cards say."""

import inspect

import pytest
import torch
from vllm.compilation import decorators
from vllm.entrypoints.launchers import run_batch
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve import create_error_response
from vllm.forward_context import ForwardContext
from vllm.lora.layers import LoRAMapping
from vllm.lora.model_manager import LoRAModelManager
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.glm4_1v import (
    Glm4vForConditionalGeneration,
    Glm4vMultiModalProcessor,
)
from vllm.model_executor.models.interns1 import (
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
)
from vllm.model_executor.models.llava_onevision import (
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionMultiModalProcessor,
)
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
)
from vllm.model_executor.models.qwen3_vl import (
    Qwen3LLMModel,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.spec_decode import llm_base_proposer
from vllm.v1.worker import cpu_worker, gpu_model_runner
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.mm import encoder_runner
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

from vllm_dpp.serving import vllm_versions
from vllm_dpp.serving.engine.kv_cache import CompactAttentionManager, CompactAttentionSpec
from vllm_dpp.serving.engine.scheduler import PruningSchedulerMixin
from vllm_dpp.serving.front.entry import EntryProcessorMixin
from vllm_dpp.serving.worker.attention import CompactAttention, make_compact
from vllm_dpp.serving.worker.entry_state import EntryStateMixin
from vllm_dpp.serving.worker.model_state import PruningModelState
from vllm_dpp.serving.worker.models.llava_onevision import (
    DPPLlavaOnevisionForConditionalGeneration,
    DPPLlavaOnevisionProcessor,
)
from vllm_dpp.serving.worker.models.pruned_model import PrunedModelMixin, PrunedMRopeModelMixin
from vllm_dpp.serving.worker.models.split_decoder import AboveSplit, BelowRelevance, BelowSplit
from vllm_dpp.serving.worker.v1.runner import PruningCPUModelRunner


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


CACHE_LIMIT = "" if vllm_versions.MAY_SPLIT_MEDIA_AT_THEIR_START else " max_cache_hit_length"
OVERRIDDEN = {
    PruningSchedulerMixin: {
        "add_request": "request",
        "_free_blocks": "request",
        "_get_local_prefix_cache_hit": "request" + CACHE_LIMIT,
        "_ec_transfer_pending": "request num_computed_tokens",
        "_try_schedule_encoder_inputs": "request num_computed_tokens num_new_tokens "
        "encoder_compute_budget shift_computed_tokens",
        "_update_after_schedule": "scheduler_output",
    },
    CompactAttentionManager: {
        "get_num_blocks_to_allocate": "request_id num_tokens new_computed_blocks "
        "total_computed_tokens num_local_computed_tokens num_tokens_main_model "
        "apply_admission_cap prefill_end",
        "allocate_new_blocks": "request_id num_tokens num_tokens_main_model",
        "cache_blocks": "request num_tokens retention_interval replay_boundaries",
        "find_longest_cache_hit": "block_hashes max_length kv_cache_group_ids block_pool "
        "kv_cache_spec drop_eagle_block alignment_tokens dcp_world_size pcp_world_size",
    },
    PruningModelState: {
        "add_request": "req_index new_req_data",
        "remove_request": "req_id",
        "initialize_kv_cache": "kv_cache_config block_tables",
        "prepare_attn": "input_batch cudagraph_mode block_tables slot_mappings attn_groups "
        "kv_cache_config for_capture ubatch_idx model_specific_attn_metadata",
    },
    EntryStateMixin: {"gather_mm_embeddings": "input_batch draft_lookahead"},
    PruningCPUModelRunner: {
        "initialize_kv_cache": "kv_cache_config is_profiling kv_cache_allocation_context",
        "_update_states": "scheduler_output",
        "_prepare_inputs": "scheduler_output num_scheduled_tokens",
        "_dummy_run": None,
    },
    EntryProcessorMixin: {
        "_apply_hf_processor_main": "mm_items hf_kwargs",
        "_get_mm_fields_config": "hf_inputs hf_processor_mm_kwargs",
        "_get_prompt_updates": "mm_items hf_processor_mm_kwargs out_mm_kwargs",
    },
    PrunedModelMixin: {
        "embed_multimodal": "kwargs",
        "embed_input_ids": "input_ids multimodal_embeddings is_multimodal",
        "forward": "input_ids positions intermediate_tensors inputs_embeds kwargs",
    },
    DPPLlavaOnevisionProcessor: {
        "_apply_hf_processor_main": "mm_items hf_kwargs",
        "_get_mm_fields_config": "hf_inputs hf_processor_mm_kwargs",
    },
    DPPLlavaOnevisionForConditionalGeneration: {
        "_process_video_pixels": "inputs",
        "embed_multimodal": "kwargs",
    },
    PrunedMRopeModelMixin: {
        "forward": "input_ids positions intermediate_tensors inputs_embeds kwargs",
        "get_encoder_cudagraph_config": "",
        "get_mrope_input_positions": "input_tokens mm_features",
    },
}
"""What the cards say we override, with vLLM's own parameters; None where all are passed on."""


MIXED_WITH = {
    EntryProcessorMixin: (
        Qwen2_5_VLMultiModalProcessor,
        Qwen3VLMultiModalProcessor,
        InternS1MultiModalProcessor,
        Glm4vMultiModalProcessor,
        LlavaOnevisionMultiModalProcessor,
    ),
    EntryStateMixin: (DefaultModelState, MambaHybridModelState),
    DPPLlavaOnevisionProcessor: (LlavaOnevisionMultiModalProcessor,),
    DPPLlavaOnevisionForConditionalGeneration: (LlavaOnevisionForConditionalGeneration,),
    PrunedModelMixin: (
        Qwen2_5_VLForConditionalGeneration,
        Qwen3VLForConditionalGeneration,
        InternS1ForConditionalGeneration,
        Glm4vForConditionalGeneration,
        LlavaOnevisionForConditionalGeneration,
    ),
    PrunedMRopeModelMixin: (
        Qwen2_5_VLForConditionalGeneration,
        Qwen3VLForConditionalGeneration,
        Glm4vForConditionalGeneration,
    ),
}
"""Of mixins, the classes before which they are mixed in."""
BASES = [(ours, base) for ours in OVERRIDDEN for base in MIXED_WITH.get(ours, ours.__bases__[:1])]


@pytest.mark.parametrize(("ours", "base"), BASES, ids=lambda cls: cls.__name__)
def test_overridden_methods_are_those_of_the_cards_and_have_not_moved(
    ours: type, base: type
) -> None:
    found = {
        name
        for name, value in vars(ours).items()
        if hasattr(base, name) and (callable(value) or isinstance(value, classmethod))
    }
    assert {name for name in found if not name.startswith("__")} == set(OVERRIDDEN[ours])
    for name, parameters in OVERRIDDEN[ours].items():
        signature = inspect.signature(getattr(base, name))
        expected = None if parameters is None else parameters.split()
        assert expected in (None, [p for p in signature.parameters if p != "self"]), name


def test_schedule_still_calls_what_we_override() -> None:
    source = inspect.getsource(Scheduler.schedule)
    for name in OVERRIDDEN[PruningSchedulerMixin]:
        called_elsewhere = name in ("add_request", "_free_blocks")
        assert called_elsewhere or f"self.{name}(" in source, name
    assert "if self._ec_transfer_pending(request, num_computed_tokens):\n" in source
    assert source.index("self._ec_transfer_pending(") > source.index(
        "self._get_local_prefix_cache_hit("
    ), "a hit is known before a request is passed over"


def test_whole_media_are_kept_whole_as_the_version_says() -> None:
    source = inspect.getsource(Scheduler._try_schedule_encoder_inputs)
    assert source.count("self.scheduler_config.disable_chunked_mm_input") == 1
    may_split = "and num_computed_tokens < start_pos\n" in source
    assert may_split != ("and num_computed_tokens <= start_pos\n" in source)
    assert may_split == vllm_versions.MAY_SPLIT_MEDIA_AT_THEIR_START


def test_a_pause_stops_those_who_wait_and_nobody_reads_it_before_it_ends() -> None:
    source = inspect.getsource(Scheduler.schedule)
    waiting = source.index("self._pause_state == PauseState.UNPAUSED:")
    assert source.index("while token_budget > 0:") < waiting
    assert source.count("_pause_state") == 3 == source[: waiting + 50].count("_pause_state")
    assert source.index("self._update_after_schedule(") > waiting


def test_that_positions_have_axes_only_says_what_metadata_workers_get() -> None:
    uses = inspect.getsource(Scheduler).count("self.model_uses_mrope")
    assert uses == 3 and "self.model_uses_mrope = " in inspect.getsource(Scheduler.__init__)
    passed_on = inspect.getsource(Scheduler.schedule).count("uses_mrope=self.model_uses_mrope,")
    assert passed_on == 2


def test_the_runners_call_what_takes_places_off_and_adds_them() -> None:
    """Each step embeds its rows and then runs them; video graphs would pass by the selection."""
    for module in (gpu_model_runner, encoder_runner):
        assert "self.model.embed_input_ids(" in inspect.getsource(module)
        assert "embed_multimodal(**mm_kwargs_batch)" in inspect.getsource(module)
        assert "supports_modality(modality)" in inspect.getsource(module)


def test_deepstack_adds_after_a_layer_what_it_is_given_by_name() -> None:
    source = inspect.getsource(Qwen3LLMModel.forward)
    assert "for layer_idx, layer in islice(" in source
    assert 'deepstack_input_embeds[f"deepstack_input_embeds_{layer_idx}"]' in source
    assert source.index("residual = layer(") < source.index("deepstack_input_embeds[f")


def test_the_decoder_gets_its_embeddings_by_another_way_than_drafters() -> None:
    """What `EntryModelState` overrides is asked for drafters alone."""
    source = inspect.getsource(DefaultModelState)
    assert "super().gather_mm_embeddings(input_batch)\n" in source
    assert "self.gather_mm_embeddings" not in source
    assert "self.model_state.gather_mm_embeddings(" in inspect.getsource(model_runner)


def test_drafters_of_v1_ask_the_configuration_for_the_token_of_images() -> None:
    source = inspect.getsource(llm_base_proposer)
    assert source.count("target_model.config.image_token_index") == 1
    known = inspect.getsource(llm_base_proposer.SpecDecodeBaseProposer.load_model)
    assert "DPP" not in known and "self.get_model_name(target_model)" in known


def test_the_forward_context_has_what_a_pass_exchanges() -> None:
    fields = ForwardContext.__dataclass_fields__
    assert {"attn_metadata", "slot_mapping", "cudagraph_runtime_mode"} <= set(fields)
    assert not ForwardContext.__dataclass_params__.frozen


def test_every_stack_has_a_name_of_its_own_in_the_compile_cache() -> None:
    assert "_model_hash_key(self.forward)" in inspect.getsource(decorators)
    stacks = (BelowRelevance, BelowSplit, AboveSplit)
    assert len({decorators._model_hash_key(stack.forward) for stack in stacks}) == len(stacks)


def test_adapted_layers_are_told_their_rows_as_the_card_says() -> None:
    manager = LoRAModelManager
    assert list(inspect.signature(manager.set_adapter_mapping).parameters) == ["self", "mapping"]
    source = inspect.getsource(manager)
    assert "self._last_mapping = mapping" in source and "self.model.lora_manager = self" in source
    assert {"index_mapping", "prompt_mapping", "is_prefill"} <= set(
        LoRAMapping.__dataclass_fields__
    )


def test_run_batch_gets_its_chats_as_our_batches_do() -> None:
    source = inspect.getsource(run_batch)
    assert "await init_app_state(engine_client, state, args, supported_tasks)" in source
    assert "openai_serving_chat" in source
    parameters = inspect.signature(init_app_state).parameters
    assert list(parameters)[:4] == ["engine_client", "state", "args", "supported_tasks"]
    assert inspect.iscoroutinefunction(OpenAIServingChat.create_chat_completion)
    assert create_error_response(ValueError("bad")).error.code == 400
