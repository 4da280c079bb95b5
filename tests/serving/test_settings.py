"""Settings and request arguments: what is accepted, and what each error says."""

from dataclasses import replace
from typing import Any

import pytest

from vllm_dpp.serving.request_plan import RequestOptions
from vllm_dpp.serving.settings import ServingSettings


def test_settings_survive_the_trip_through_additional_config():
    settings = ServingSettings(retention_ratio=0.5, prune_layer=3, record_dir="records")
    assert ServingSettings.from_additional_config(settings.as_additional_config()) == settings


def test_missing_section_means_defaults():
    assert ServingSettings.from_additional_config({}) == ServingSettings()
    assert ServingSettings.from_additional_config(None) == ServingSettings()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"prune_layr": 3}, "prune_layer"),
        ({"prune_layer": -1}, "prune_layer must be an integer >= 0"),
        ({"prune_layer": True}, "prune_layer must be an integer"),
        ({"retention_ratio": 0}, r"retention_ratio .*\(0, 1\]"),
        ({"retention_ratio": "abc"}, "retention_ratio"),
        ({"min_retention_ratio": 2}, "min_retention_ratio"),
        ({"retention_ratio": 0.1, "min_retention_ratio": 0.2}, "below min_retention_ratio"),
        ({"record_dir": 3}, "record_dir"),
        ({"turn_end_token_id": "x"}, "turn_end_token_id"),
        ({"shard_selection": 1}, "shard_selection must be true or false, got 1"),
        ({"similarity": "cosine"}, "similarity must be one of"),
        ({"prune_images": "yes"}, "prune_images must be true or false, got 'yes'"),
        ({"max_deferred_tokens": 0}, "max_deferred_tokens must be an integer >= 1 or null, got 0"),
        ({"max_deferred_tokens": True}, "max_deferred_tokens must be an integer"),
        ({"segment_by": "mood"}, "segment_by"),
        ("fast", "must be a mapping"),
    ],
)
def test_bad_settings_name_the_setting(section, message):
    with pytest.raises(ValueError, match=message):
        ServingSettings.from_additional_config({"dpp": section})


def test_request_arguments():
    assert RequestOptions.from_extra_args(None) == RequestOptions()
    assert RequestOptions.from_extra_args({"other": 1}) == RequestOptions()
    absent = {
        "dpp_retention_ratio": None,
        "dpp_record": None,
        "dpp_rule": None,
    }  # as Arrow writes missing keys
    assert RequestOptions.from_extra_args(absent) == RequestOptions()
    asked = RequestOptions.from_extra_args({"dpp_retention_ratio": 1, "dpp_record": 1})
    assert asked == RequestOptions(retention_ratio=1.0, record=True)


def test_a_request_chooses_for_itself():
    server = ServingSettings(prune_layer=3, relevance_floor=0.3)
    assert RequestOptions().settings(server) is server
    asked = RequestOptions.from_extra_args({"dpp_rule": "uniform", "dpp_relevance_floor": 1})
    assert asked.settings(server) == replace(server, rule="uniform", relevance_floor=1)


@pytest.mark.parametrize(
    ("choice", "server", "message"),
    [
        ({"dpp_rule": "best"}, {}, "dpp_rule: rule must be one of 'dpp', 'change', "),
        ({"dpp_rule": 3}, {}, "dpp_rule: rule must be one of .*, got 3"),
        ({"dpp_relevance_floor": 1.5}, {}, "dpp_relevance_floor: .* got 1.5"),
        ({"dpp_relevance_sign": "up"}, {}, "dpp_relevance_sign: "),
        ({"dpp_rule": "attention"}, {"relevance": "none"}, "needs relevance 'question'"),
        (
            {"dpp_relevance": "question"},
            {"relevance": "none"},
            "dpp_relevance: .* --relevance none",
        ),
        ({"dpp_relevance": "answer"}, {}, "dpp_relevance: relevance must be one of"),
        ({"dpp_relevance": ["none"]}, {}, r"dpp_relevance: .* got \['none'\]"),
        ({"dpp_relevance": ""}, {}, "dpp_relevance: .* got ''"),
        ({"dpp_rule": "change"}, {"relevance": "none", "decide_every": 64}, "needs rule 'dpp'"),
    ],
)
def test_bad_choices_of_a_request(choice, server, message):
    asked = RequestOptions.from_extra_args(choice)
    with pytest.raises(ValueError, match=message):
        asked.settings(ServingSettings(**server))


def test_rules_to_choose():
    assert "attention" in ServingSettings().rules_to_choose
    assert "attention" not in ServingSettings(relevance="none").rules_to_choose
    assert ServingSettings(relevance="none", decide_every=64).rules_to_choose == ["dpp"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"dpp_retention_ratio": 0}, r"\(0, 1\]"),
        ({"dpp_retention_ratio": 1.5}, "got 1.5"),
        ({"dpp_retention_ratio": "half"}, "'half'"),
        ({"dpp_retention_ratio": True}, "got True"),
        ({"dpp_retention_ratio": float("nan")}, "nan"),
        ({"dpp_retention_ratio": [0.5]}, "number"),
        (
            {"dpp_retention": 0.5},
            r"'dpp_retention' \(did you mean 'dpp_retention_ratio'\?\); known: dpp_retention_ratio",
        ),
        ({"dpp_k": 9}, "'dpp_k' .*known: dpp_retention_ratio, dpp_record, dpp_rule, "),
        ({"dpp_record": 7}, "dpp_record must be true or false"),
    ],
)
def test_bad_request_arguments_name_the_argument(args, message):
    with pytest.raises(ValueError, match=message):
        RequestOptions.from_extra_args(args)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"relevance": "none"},
        {"entry_ratio": 0.5},
        {"decide_every": 64, "relevance": "none"},
    ],
)
def test_every_rule_that_may_be_chosen_can_be(settings: dict[str, Any]) -> None:
    """The memory profile asks for the workspace of each."""
    server = ServingSettings(**settings)
    rules = server.rules_to_choose
    assert "dpp" in rules
    assert [replace(server, rule=rule).rule for rule in rules] == rules
