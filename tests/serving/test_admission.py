"""The front end's check: what it wraps, whom it concerns, and that a refusal leaves no trace."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import PlaceholderRange
from vllm.platforms import current_platform
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams

from vllm_dpp.serving.front import admission
from vllm_dpp.serving.front.admission import KEY, AdmissionRules, PendingPrompt, check_request
from vllm_dpp.serving.settings import ServingSettings

TURN_END = 9
RULES = AdmissionRules(
    settings=ServingSettings(prune_layer=1, turn_end_token_id=TURN_END, min_retention_ratio=0.1),
    step_budget=40,
    block_size=None,
)


class Cache:
    """Stands in for the sender cache, which needs a model."""

    def __init__(self) -> None:
        self.forgotten: list[str] = []

    def invalidate(self, mm_hash: str) -> None:
        self.forgotten.append(mm_hash)


def prompt(length: int, rules: AdmissionRules = RULES, sent: bool = True) -> dict[str, Any]:
    return {
        "prompt_token_ids": [1, *[5] * length, 2, TURN_END],
        "mm_placeholders": {"video": [PlaceholderRange(offset=1, length=length)]},
        "mm_hashes": {"video": ["hash"]},
        "mm_kwargs": {"video": [object() if sent else None]},
        KEY: PendingPrompt(rules, Cache()),
    }


def test_a_good_request_passes() -> None:
    check_request(prompt(20), SamplingParams())
    check_request(prompt(20), SamplingParams(extra_args={"dpp_retention_ratio": 0.5}))


@pytest.mark.parametrize(
    ("length", "params", "message"),
    [
        (39, {}, "41 tokens, .* one step of 40.*--max-num-batched-tokens"),
        (20, {"prompt_logprobs": 1}, "prompt_logprobs"),
        (20, {"extra_args": {"dpp_retention_ratio": 0.05}}, "min_retention_ratio 0.1"),
        (20, {"extra_args": {"dpp_record": 1}}, "dpp.record_dir"),
        (20, {"extra_args": {"dpp_nonsense": 1}}, "dpp_nonsense"),
    ],
)
def test_refusals_name_the_remedy_and_leave_no_trace(
    length: int, params: dict[str, Any], message: str
) -> None:
    asked = prompt(length)
    with pytest.raises(VLLMValidationError, match=message):
        check_request(asked, SamplingParams(**params))
    assert asked[KEY].cache.forgotten == ["hash"]


def test_media_that_the_engine_has_are_not_forgotten() -> None:
    asked = prompt(39, sent=False)
    with pytest.raises(VLLMValidationError):
        check_request(asked, SamplingParams())
    assert asked[KEY].cache.forgotten == []


def test_unpruned_requests_need_no_step_of_their_own() -> None:
    whole = {"dpp_retention_ratio": 1}
    check_request(prompt(39), SamplingParams(extra_args=whole))
    check_request(prompt(20), SamplingParams(extra_args=whole, prompt_logprobs=1))


def test_other_engines_and_other_arguments_are_left_alone() -> None:
    stock = {k: v for k, v in prompt(39).items() if k != KEY}
    check_request(stock, SamplingParams(prompt_logprobs=1, extra_args={"theirs": 1}))
    check_request({"prompt_token_ids": [1]}, PoolingParams())


def test_rules_travel_through_the_hf_config() -> None:
    model_config = SimpleNamespace(hf_config=SimpleNamespace())
    assert AdmissionRules.of(model_config) is None
    RULES.publish(model_config)
    assert AdmissionRules.of(model_config) == RULES


def test_installing_twice_wraps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        current_platform, "validate_request", lambda *args: seen.append(args), raising=False
    )
    admission.install()
    wrapped = current_platform.validate_request
    admission.install()
    assert current_platform.validate_request is wrapped
    with pytest.raises(VLLMValidationError):
        wrapped(prompt(39), SamplingParams())
    assert len(seen) == 1, "the platform's own check comes first"
