"""Start-up: validate the settings, refuse what cannot work, and name our engine parts to vLLM."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from vllm_dpp.serving.front import metrics
from vllm_dpp.serving.front.families import Family, family_of, seeing_config
from vllm_dpp.serving.front.meaning import meaning
from vllm_dpp.serving.front.refusals import refused
from vllm_dpp.serving.layer_groups import default_prune_layer, wasted_fraction
from vllm_dpp.serving.request_plan import ENTRY_RATIO_ARG
from vllm_dpp.serving.settings import SECTION, ResolvedConfig, ServingSettings

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger("vllm.vllm_dpp")

SCHEDULER = "vllm_dpp.serving.engine.scheduler.make_scheduler"
CPU_WORKER = "vllm_dpp.serving.worker.v1.worker.PruningCPUWorker"


class PruningConfigHook(VerifyAndUpdateConfig):
    """Runs once for each engine, in the process that makes its configuration."""

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Resolve the settings into ``vllm_config``.

        Raises:
            ValueError: A setting is wrong or a feature cannot be combined with pruning.
        """
        family = family_of(vllm_config.model_config.architecture)
        if stock := MODELS_CONFIG_MAP.get(family.base):
            stock.verify_and_update_config(vllm_config)
        settings = resolve(vllm_config, family)
        _raise_for("; ".join(refused(vllm_config, settings)))
        logger.info("%s", meaning(settings, vllm_config))
        vllm_config.additional_config = ResolvedConfig(
            vllm_config.additional_config or {}, settings
        )
        setattr(vllm_config.model_config.hf_config, ENTRY_RATIO_ARG, settings.entry_ratio)
        metrics.show()
        if settings.entry_only:
            _tell_drafters_of_v1(vllm_config)
        else:
            _warn_about_waste(vllm_config.model_config, settings)
            vllm_config.scheduler_config.scheduler_cls = SCHEDULER
            _choose_worker(vllm_config)
            _choose_cudagraphs(vllm_config)


def resolve(vllm_config: "VllmConfig", family: Family) -> ServingSettings:
    """The settings with every default that depends on the model filled in."""
    model_config = vllm_config.model_config
    settings = ServingSettings.from_additional_config(vllm_config.additional_config)
    num_layers = model_config.hf_text_config.num_hidden_layers
    if settings.entry_only or family.entry_only_because:
        why = family.entry_only_because or "entry_only"
        return settings.as_entry_only(num_layers, why)
    layer = settings.prune_layer
    if layer is None:
        layer = default_prune_layer(num_layers)
    if layer >= num_layers:
        raise ValueError(
            f"{SECTION}.prune_layer must be below the model's {num_layers} layers, got {layer}"
        )
    levels = deepstack_levels(model_config)
    if layer < levels:
        raise ValueError(
            f"{SECTION}.prune_layer must be at least {levels}, got {layer}: DeepStack adds to the "
            f"first {levels} layers of this model, which have to see every video token"
        )
    if layer == 0:
        settings = replace(settings, last_slice_weight=_weight_at_the_start(settings))
    token = settings.turn_end_token_id
    if token is None:
        token = _token_id(
            model_config, family.turn_end_token, "turn_end_token_id", "ends a chat turn"
        )
    _make_record_dir(settings)
    pad = settings.video_token_id
    if pad is None and family.video_token is not None:
        pad = _token_id(
            model_config, family.video_token, "video_token_id", "stands for a video's tokens"
        )
    elif pad is None:
        pad = seeing_config(model_config).video_token_id
    if settings.video_end_length not in (None, family.video_end_length):
        raise ValueError(
            f"{SECTION}.video_end_length of this model is {family.video_end_length}, got "
            f"{settings.video_end_length}: leave it out"
        )
    resolved = replace(
        settings,
        prune_layer=layer,
        turn_end_token_id=token,
        video_token_id=pad,
        video_end_length=family.video_end_length,
    )
    resolved = resolved.with_ratios(num_layers)
    family.check(resolved)
    return resolved


def _weight_at_the_start(settings: ServingSettings) -> float:
    """Before the first layer no slice has read another."""
    if settings.last_slice_weight not in (ServingSettings.last_slice_weight, 1):
        raise ValueError(
            f"{SECTION}.last_slice_weight is of no use at prune_layer 0, where no slice has read "
            f"another yet, got {settings.last_slice_weight!r}: leave it out"
        )
    return 1.0


def deepstack_levels(model_config: "ModelConfig") -> int:
    """How many of the decoder's first layers get features of the vision encoder's depth."""
    vision = getattr(seeing_config(model_config), "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


def _token_id(model_config: "ModelConfig", token: str, setting: str, purpose: str) -> int:
    from vllm.tokenizers.registry import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model_config)
    token_id = None if tokenizer is None else tokenizer.get_vocab().get(token)
    if token_id is None:
        raise ValueError(
            f"the tokenizer has no {token!r}, which {purpose} in this model family: "
            f"set {SECTION}.{setting}"
        )
    return int(token_id)


def _make_record_dir(settings: ServingSettings) -> None:
    if settings.record_path is None:
        return
    try:
        settings.record_path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{SECTION}.record_dir {settings.record_dir!r} cannot be made a folder ({error}): "
            "name one that the server may write to"
        ) from error


def _warn_about_waste(model_config: "ModelConfig", settings: ServingSettings) -> None:
    num_layers, layer = model_config.hf_text_config.num_hidden_layers, settings.split_layer
    waste = wasted_fraction(num_layers, layer)
    if waste:
        logger.warning(
            "%s.prune_layer=%d of %d layers leaves %.0f%% of the KV memory empty: lower and "
            "upper layers cannot fill groups of equal size; %d wastes none",
            SECTION,
            layer,
            num_layers,
            100 * waste,
            default_prune_layer(num_layers),
        )


def _tell_drafters_of_v1(vllm_config: "VllmConfig") -> None:
    """The V1 runner knows by a model's class name which token stands for its images, for drafters.

    Of one that it does not know it asks the configuration, under this name.
    """
    config = vllm_config.model_config.hf_config
    if vllm_config.speculative_config is not None and hasattr(config, "image_token_id"):
        config.image_token_index = config.image_token_id


def _choose_worker(vllm_config: "VllmConfig") -> None:
    """The V2 runner asks the model for its state; only the V1 runner needs a worker of ours."""
    if vllm_config.use_v2_model_runner:
        return
    chosen = vllm_config.parallel_config.worker_cls
    if chosen not in ("auto", "vllm.v1.worker.cpu_worker.CPUWorker", CPU_WORKER):
        _raise_for(
            f"--worker-cls {chosen} cannot be combined with video pruning on the V1 model runner, "
            "which needs a worker of its own; leave it out"
        )
    vllm_config.parallel_config.worker_cls = CPU_WORKER


def _choose_cudagraphs(vllm_config: "VllmConfig") -> None:
    """A graph of a whole mixed step would hold the unpruned size for all layers.

    With speculation a step of drafts looks like one of short chunks, which may read a video.
    """
    compilation = vllm_config.compilation_config
    asked = compilation.cudagraph_mode  # None is vLLM's default, which is chosen later
    if vllm_config.speculative_config and (asked is None or asked.has_full_cudagraphs()):
        piecewise = asked is None or asked.has_piecewise_cudagraphs()
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE if piecewise else CUDAGraphMode.NONE
        logger.info(
            "cudagraph_mode is set to %s: drafts are no single tokens",
            compilation.cudagraph_mode.name,
        )
    if compilation.cudagraph_mode == CUDAGraphMode.FULL:
        logger.info("cudagraph_mode is set to FULL_DECODE_ONLY: a prefill may lose rows midway")
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY


def _raise_for(problems: str | Sequence[str]) -> None:
    if problems:
        raise ValueError(problems)
