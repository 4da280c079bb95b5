"""Refuse a request that cannot be pruned with HTTP 400, before it reaches the engine.

vLLM asks the platform (``Platform.validate_request``) about each request; that call is the only one
in the front end that sees both the expanded prompt and the sampling parameters. We wrap it on the
platform object (see ``patches/validate-request.md``). Several engines may live in one process, so
the rules travel with the prompt: our multimodal processor attaches them to what it returns.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams

from vllm_dpp.serving.request_plan import (
    RECORD_ARG,
    RETENTION_RATIO_ARG,
    RequestOptions,
    media_spans,
    plan_prompt,
)
from vllm_dpp.serving.settings import ServingSettings

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.inputs import MultiModalInput
    from vllm.multimodal.cache import BaseMultiModalProcessorCache
    from vllm.multimodal.processing import ProcessorInputs
    from vllm.pooling_params import PoolingParams

KEY = "dpp_admission"
"""Where the rules are kept: an attribute of the HF config and a key of the processed prompt."""


@dataclass(frozen=True, slots=True)
class AdmissionRules:
    """What the front end must know of one engine.

    Args:
        settings: The engine's resolved settings.
        step_budget: Longest atomic range that fits in one step.
        block_size: KV block size where prefix caching is on, else ``None``.
    """

    settings: ServingSettings
    step_budget: int
    block_size: int | None

    def publish(self, model_config: "ModelConfig") -> None:
        """Store the rules where every front-end process of this engine finds them."""
        setattr(model_config.hf_config, KEY, asdict(self))

    @classmethod
    def of(cls, model_config: "ModelConfig") -> "AdmissionRules | None":
        stored = getattr(model_config.hf_config, KEY, None)
        if stored is None:
            return None
        return cls(**{**stored, "settings": ServingSettings.from_mapping(stored["settings"])})

    def check(self, prompt: "MultiModalInput", params: SamplingParams) -> None:
        """Raise ``ValueError`` where ``prompt`` cannot be served with ``params``."""
        options = RequestOptions.from_extra_args(params.extra_args)
        low, ratio = self.settings.min_retention_ratio, options.retention_ratio
        if ratio is not None and ratio < low:
            raise ValueError(
                f"{RETENTION_RATIO_ARG} {ratio} is below this server's min_retention_ratio {low}"
            )
        if options.record and self.settings.record_dir is None:
            raise ValueError(
                f"{RECORD_ARG} needs a server that was started with dpp.record_dir set"
            )
        media = media_spans(
            (modality, p) for modality, ps in prompt["mm_placeholders"].items() for p in ps
        )
        plan = plan_prompt(
            prompt["prompt_token_ids"], media, options, self.settings, self.block_size
        )
        if plan is None:
            return
        if plan.longest_range > self.step_budget:
            raise ValueError(
                f"a video and its question take {plan.longest_range} tokens, but a pruned video "
                f"must fit in one step of {self.step_budget}: send a shorter video, start the "
                f"server with a larger --max-num-batched-tokens, or ask for "
                f"{RETENTION_RATIO_ARG}=1"
            )
        if params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
            raise ValueError(
                "prompt_logprobs do not exist for video tokens that were pruned: leave it out or "
                f"ask for {RETENTION_RATIO_ARG}=1"
            )


@dataclass(frozen=True, slots=True)
class PendingPrompt:
    """Travels with a processed prompt until it is admitted or refused.

    Args:
        rules: The rules of the engine that the prompt is for.
        cache: The processor cache that remembers which media the engine has been sent.
    """

    rules: AdmissionRules
    cache: "BaseMultiModalProcessorCache | None"

    def withdraw(self, prompt: "MultiModalInput") -> None:
        """Forget media that the engine will not receive, so that the next request sends them."""
        if self.cache is None:
            return
        for modality, hashes in prompt["mm_hashes"].items():
            for mm_hash, item in zip(hashes, prompt["mm_kwargs"][modality], strict=True):
                if item is not None:
                    self.cache.invalidate(mm_hash)


def check_request(prompt: Any, params: "SamplingParams | PoolingParams") -> None:
    """The check of one request: its arguments always, its prompt where our processor made it.

    Raises:
        VLLMValidationError: becomes HTTP 400 for this request alone.
    """
    if not isinstance(params, SamplingParams):
        return
    pending: PendingPrompt | None = prompt.get(KEY)
    try:
        RequestOptions.from_extra_args(params.extra_args)
        if pending is not None:
            pending.rules.check(prompt, params)
    except ValueError as error:
        if pending is not None:
            pending.withdraw(prompt)
        raise VLLMValidationError(str(error)) from error


def install() -> None:
    """Wrap ``current_platform.validate_request`` once in this process."""
    inner: Callable[..., None] = current_platform.validate_request
    if getattr(inner, "checks_pruning", False):
        return

    def validate_request(
        processed_inputs: dict[str, Any], params: "SamplingParams | PoolingParams"
    ) -> None:
        inner(processed_inputs, params)
        check_request(processed_inputs, params)

    validate_request.checks_pruning = True  # type: ignore[attr-defined]
    current_platform.validate_request = validate_request


class AdmissionProcessorMixin:
    """Mixed into a model's multimodal processor: attaches the rules to every processed prompt."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        install()

    def apply(self, inputs: "ProcessorInputs", *args: Any, **kwargs: Any) -> "MultiModalInput":
        prompt = super().apply(inputs, *args, **kwargs)  # type: ignore[misc]
        rules = AdmissionRules.of(self.info.ctx.model_config)  # type: ignore[attr-defined]
        if rules is not None:
            prompt[KEY] = PendingPrompt(rules, inputs.cache)
        return prompt
