"""Every feature that pruning refuses at start-up, and that the message names flag and remedy.

The configuration is a real one; each case changes the one attribute that its flag sets.
"""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import KVEventsConfig, LoRAConfig, SpeculativeConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.config.utils import replace as replace_config
from vllm.engine.arg_utils import EngineArgs

from vllm_dpp.serving.front.config_hook import _choose_cudagraphs
from vllm_dpp.serving.front.refusals import REFUSALS, refused
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.toy.checkpoint import make_checkpoint
from vllm_dpp.toy.spec import TINY_QWEN3, CheckpointSpec

SETTINGS = ServingSettings()
ENTRY_ONLY = replace(SETTINGS, entry_only=True)
VARIANT = {"architectures": ["DPPQwen2_5_VLForConditionalGeneration"]}


def engine_args(
    checkpoint: Path, dpp: dict[str, Any], variant: dict[str, Any] = VARIANT, **more: Any
) -> EngineArgs:
    return EngineArgs(
        str(checkpoint),
        hf_overrides=variant,
        additional_config={"dpp": dpp},
        max_model_len=1024,
        block_size=32,
        **more,
    )


@pytest.fixture(scope="module")
def config(tiny_checkpoint: Path) -> Any:
    return engine_args(tiny_checkpoint, {"retention_ratio": 0.5}).create_engine_config()


def setting(path: str, value: Any) -> Callable[[Any, pytest.MonkeyPatch], None]:
    """Set ``config.path`` to ``value`` for one test."""

    def apply(config: Any, patch: pytest.MonkeyPatch) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            config = getattr(config, parent)
        assert hasattr(config, name), f"vLLM has no {path} any more"
        patch.setattr(config, name, value)

    return apply


def environment(name: str, value: str) -> Callable[[Any, pytest.MonkeyPatch], None]:
    return lambda config, patch: patch.setenv(name, value)


def sliding_window(config: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(type(config.model_config), "get_sliding_window", lambda self: 1024)


def on_a_gpu(config: Any, patch: pytest.MonkeyPatch) -> None:
    from vllm_dpp.serving.front import refusals

    patch.setattr(refusals, "_is_cpu", lambda: False)


def replicas_of_experts(config: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(config.parallel_config, "data_parallel_size", 2)
    assert list(refused(config, SETTINGS)) == [], (
        "without experts replicas have nothing to exchange"
    )
    patch.setattr(type(config.model_config), "is_moe", True)


def drafts_of_what_was_encoded(config: Any, patch: pytest.MonkeyPatch) -> None:
    drafts = SimpleNamespace(
        use_ngram=lambda: False, method="mtp", enable_adaptive_verification=False
    )
    patch.setattr(config, "speculative_config", drafts)
    patch.setattr(type(config), "use_v2_model_runner", True)
    assert list(refused(config, ENTRY_ONLY)) == [], "the V2 runner has a seam"
    patch.setattr(type(config), "use_v2_model_runner", False)


ON = SimpleNamespace()
EVENTS = KVEventsConfig(enable_kv_cache_events=True)
CASES = {
    "--mm-processor-kwargs dpp_entry_ratio": setting(
        "model_config.multimodal_config.mm_processor_kwargs", {"dpp_entry_ratio": 0.5}
    ),
    "--mm-processor-kwargs use_audio_in_video": setting(
        "model_config.multimodal_config.mm_processor_kwargs", {"use_audio_in_video": True}
    ),
    "--pipeline-parallel-size": setting("parallel_config.pipeline_parallel_size", 2),
    "--data-parallel-size with experts": replicas_of_experts,
    "--enable-return-routed-experts": setting(
        "aux_output_config.enable_return_routed_experts", True
    ),
    "--decode-context-parallel-size": setting("parallel_config.decode_context_parallel_size", 2),
    "--prefill-context-parallel-size": setting("parallel_config.prefill_context_parallel_size", 2),
    "--enable-dbo / --ubatch-size": setting("parallel_config.enable_dbo", True),
    "--speculative-config": setting(
        "speculative_config",
        SimpleNamespace(
            use_ngram=lambda: False, method="eagle3", enable_adaptive_verification=False
        ),
    ),
    "--speculative-config on the V1 model runner": drafts_of_what_was_encoded,
    "--speculative-config enable_adaptive_verification": setting(
        "speculative_config",
        SimpleNamespace(use_ngram=lambda: True, enable_adaptive_verification=True),
    ),
    "--enable-tower-connector-lora": setting(
        "lora_config", LoRAConfig(enable_tower_connector_lora=True)
    ),
    "--kv-transfer-config": setting("kv_transfer_config", ON),
    "--kv-offloading-size": setting("cache_config.kv_offloading_size", 1.0),
    "--kv-events-config": setting("kv_events_config", EVENTS),
    "--video-pruning-rate": setting("model_config.multimodal_config.video_pruning_rate", 0.5),
    "--enable-prompt-embeds": setting("model_config.enable_prompt_embeds", True),
    "--kv-sharing-fast-prefill": setting("cache_config.kv_sharing_fast_prefill", True),
    "--disable-hybrid-kv-cache-manager": setting(
        "scheduler_config.disable_hybrid_kv_cache_manager", True
    ),
    "--runner pooling": setting("model_config.runner_type", "pooling"),
    "--scheduler-cls": setting("scheduler_config.scheduler_cls", "my.Scheduler"),
    "sliding-window attention": sliding_window,
    "VLLM_USE_BREAKABLE_CUDAGRAPH": environment("VLLM_USE_BREAKABLE_CUDAGRAPH", "1"),
    "VLLM_USE_V2_MODEL_RUNNER=0": on_a_gpu,
}


@pytest.fixture(autouse=True)
def no_graph_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_USE_BREAKABLE_CUDAGRAPH", "VLLM_BATCH_INVARIANT"):
        monkeypatch.delenv(name, raising=False)


def test_every_refusal_has_a_case() -> None:
    assert set(CASES) == {refusal.flag for refusal in REFUSALS}


def test_a_plain_configuration_is_not_refused(config: Any) -> None:
    assert list(refused(config, SETTINGS)) == []


@pytest.mark.parametrize("flag", CASES)
def test_refusal(config: Any, monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    CASES[flag](config, monkeypatch)
    (refusal,) = (refusal for refusal in REFUSALS if refusal.flag == flag)
    at_layer_k, before_it = (refused(config, s) for s in (SETTINGS, ENTRY_ONLY))
    (line,) = before_it if refusal.of_entry_alone else at_layer_k
    assert line.startswith(f"{flag} cannot be combined with video pruning: ")
    assert ";" in line, "the remedy follows the reason"
    assert line.endswith("(entry_only)") == refusal.of_layer_k
    if not refusal.of_entry_alone:
        assert list(before_it) == ([] if refusal.of_layer_k else [line])


def test_batch_invariance_turns_breakable_graphs_on(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    assert any("VLLM_USE_BREAKABLE_CUDAGRAPH=0" in line for line in refused(config, SETTINGS))
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")
    assert list(refused(config, SETTINGS)) == []


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("video_pruning_rate", 0.5),
        ("kv_offloading_size", 1.0),  # becomes a connector after our hook has run
        ("kv_events_config", EVENTS),
    ],
)
def test_start_up_stops_at_a_refused_flag(tiny_checkpoint: Path, flag: str, value: Any) -> None:
    args = engine_args(tiny_checkpoint, {}, **{flag: value})
    name = "--" + flag.replace("_", "-")
    with pytest.raises(ValueError, match=f"{name} cannot be combined"):
        args.create_engine_config()


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        (None, "PIECEWISE"),
        ("FULL_AND_PIECEWISE", "PIECEWISE"),
        ("FULL_DECODE_ONLY", "NONE"),
        ("FULL", "NONE"),
        ("PIECEWISE", "PIECEWISE"),
    ],
)
def test_a_step_of_drafts_replays_no_full_graph(
    config: Any, monkeypatch: pytest.MonkeyPatch, asked: str | None, given: str
) -> None:
    drafts = SpeculativeConfig(method="ngram", num_speculative_tokens=2, prompt_lookup_max=3)
    monkeypatch.setattr(config, "speculative_config", drafts)
    monkeypatch.setattr(config.compilation_config, "cudagraph_mode", asked and CUDAGraphMode[asked])
    assert list(refused(config, SETTINGS)) == []
    _choose_cudagraphs(config)
    assert config.compilation_config.cudagraph_mode == CUDAGraphMode[given]


def test_events_that_are_off_are_not_refused(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    setting("kv_events_config", KVEventsConfig())(config, monkeypatch)
    assert list(refused(config, SETTINGS)) == []


@pytest.mark.parametrize(
    ("dpp", "message"),
    [
        ({"prune_layer": 6}, "below the model's 6 layers, got 6"),
        ({"retention": 0.5}, "retention_ratio"),
        ({"retention_ratio": 2}, "retention_ratio"),
        ({"entry_only": True, "rule": "uniform"}, r"rule is about .* layer K, .* \(entry_only\)"),
        ({"entry_only": True, "prune_layer": 2}, "prune_layer is about what is left out"),
        ({"entry_only": 1}, "entry_only must be true or false, got 1"),
    ],
)
def test_start_up_stops_at_a_bad_setting(
    tiny_checkpoint: Path, dpp: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine_args(tiny_checkpoint, dpp).create_engine_config()


@pytest.mark.parametrize(
    ("dpp", "message"),
    [
        ({"prune_layer": 2}, "prune_layer must be at least 3, got 2: DeepStack"),
        ({"decide_every": 64, "relevance": "none"}, "decide_every 64: videos of Qwen3VL"),
        ({"video_end_length": 1}, "video_end_length of this model is 0, got 1: leave it out"),
    ],
    ids=["below DeepStack", "pieces", "newline"],
)
def test_what_a_family_cannot_do_is_refused(
    tmp_path: Path, dpp: dict[str, Any], message: str
) -> None:
    checkpoint = make_checkpoint(tmp_path / "qwen3", TINY_QWEN3)
    variant = {"architectures": ["DPPQwen3VLForConditionalGeneration"]}
    with pytest.raises(ValueError, match=message):
        engine_args(checkpoint, dpp, variant).create_engine_config()


def test_start_up_stops_at_a_record_dir_that_is_a_file(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    args = engine_args(tiny_checkpoint, {"record_dir": str(tmp_path / "file")})
    with pytest.raises(ValueError, match="dpp.record_dir .* cannot be made a folder"):
        args.create_engine_config()


def test_a_foreign_worker_is_refused(tiny_checkpoint: Path) -> None:
    args = engine_args(tiny_checkpoint, {}, worker_cls="my.Worker")
    with pytest.raises(ValueError, match="--worker-cls my.Worker cannot be combined"):
        args.create_engine_config()


def test_start_up_resolves_what_depends_on_the_model(config: Any) -> None:
    dpp = config.additional_config["dpp"]
    assert dpp["prune_layer"] == 3 and dpp["last_slice_weight"] == 1.5
    assert dpp["turn_end_token_id"] is not None
    assert config.scheduler_config.scheduler_cls.startswith("vllm_dpp.")


def test_before_the_first_layer_the_last_slice_is_like_the_others(tiny_checkpoint: Path) -> None:
    resolved = engine_args(tiny_checkpoint, {"prune_layer": 0}).create_engine_config()
    assert resolved.additional_config["dpp"]["last_slice_weight"] == 1
    args = engine_args(tiny_checkpoint, {"prune_layer": 0, "last_slice_weight": 2})
    with pytest.raises(ValueError, match="last_slice_weight is of no use at prune_layer 0"):
        args.create_engine_config()


def test_before_the_decoder_alone_the_engine_is_vllms_own(tiny_checkpoint: Path) -> None:
    """Two stages of a pipeline included."""
    dpp = {"entry_only": True, "video_share": 0.3}
    config = engine_args(tiny_checkpoint, dpp, pipeline_parallel_size=2).create_engine_config()
    resolved = config.additional_config["dpp"]
    assert (resolved["entry_ratio"], resolved["retention_ratio"]) == (0.3, 1)
    assert resolved["prune_layer"] == 6, "of six layers"
    stock = EngineArgs(model=str(tiny_checkpoint)).create_engine_config()
    assert config.scheduler_config.scheduler_cls == stock.scheduler_config.scheduler_cls
    assert config.parallel_config.worker_cls == stock.parallel_config.worker_cls
    assert config.compute_hash() != compile_key(tiny_checkpoint)


def test_linear_attention_leaves_the_decoder_to_vllm(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "qwen3_5", CheckpointSpec(architecture="qwen3_5"))
    variant = {"architectures": ["DPPQwen3_5ForConditionalGeneration"]}
    config = engine_args(checkpoint, {"video_share": 0.4}, variant).create_engine_config()
    assert config.additional_config["dpp"]["entry_only"] is True
    assert config.additional_config["dpp"]["entry_ratio"] == 0.4
    assert config.cache_config.mamba_ssm_cache_dtype == "float32", "as vLLM's own start-up says"
    for dpp, message in (
        ({"entry_only": False}, "entry_only must be true or left out: the linear attention"),
        (
            {"retention_ratio": 0.5},
            r"retention_ratio is about .*\(the linear attention of this model",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            engine_args(checkpoint, dpp, variant).create_engine_config()


def compile_key(checkpoint: Path, **dpp: Any) -> str:
    return engine_args(checkpoint, dpp).create_engine_config().compute_hash()


def test_only_where_the_decoder_is_split_enters_the_compile_key(tiny_checkpoint: Path) -> None:
    key = compile_key(tiny_checkpoint)
    same = {"retention_ratio": 0.3, "min_retention_ratio": 0.2, "relevance_floor": 0.5}
    assert compile_key(tiny_checkpoint, **same, max_deferred_tokens=100, prune_layer=3) == key
    others = [{"prune_layer": 2}, {"relevance": "none"}]
    assert len({key, *(compile_key(tiny_checkpoint, **dpp) for dpp in others)}) == 3


def test_other_sections_enter_the_compile_key(tiny_checkpoint: Path) -> None:
    args = engine_args(tiny_checkpoint, {})
    args.additional_config["theirs"] = 1
    config = args.create_engine_config()
    assert config.additional_config["theirs"] == 1
    assert config.compute_hash() != compile_key(tiny_checkpoint)


def test_the_settings_survive_what_vllm_does_with_its_configuration(config: Any) -> None:
    settings = ServingSettings.of_engine(config)
    assert settings == ServingSettings.from_vllm_config(config)
    for copied in (
        pickle.loads(pickle.dumps(config)),
        replace_config(config, instance_id="another"),
    ):
        assert ServingSettings.of_engine(copied) == settings
        assert copied.compute_hash() == config.compute_hash()
