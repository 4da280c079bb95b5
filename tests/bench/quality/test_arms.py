"""Methods, budgets and what they cost."""

import pytest

pytest.importorskip("vllm")

from vllm_dpp.bench.quality.arms import (  # noqa: E402
    BUDGETS,
    DEFAULT_METHODS,
    TWO_STAGES,
    Arm,
    Engine,
    Method,
    make_arms,
    parse_method,
)
from vllm_dpp.serving.cost_model import kv_share, retention_at  # noqa: E402


def test_names() -> None:
    assert parse_method("full") == Method("full")
    assert parse_method("dpp-softened@3") == Method("dpp-softened@3", 3, "dpp-softened")
    assert parse_method("change") == Method("change", entry="change")
    assert parse_method("change+dpp-none@4:1/2") == Method(
        "change+dpp-none@4:1/2", 4, "dpp-none", entry="change", fraction=0.5
    )
    assert parse_method(TWO_STAGES).fraction is None
    assert parse_method("evs") == Method("evs")  # vLLM's own, and as a first stage of two:
    assert parse_method("evs+dpp-none@4").entry == "evs"
    for wrong in (
        "attention",
        "nothing@3",
        "full@2",
        "dpp@x",
        "full+dpp@3",
        "dpp@3:last",
        "",
    ):
        with pytest.raises(ValueError, match="unknown method"):
            parse_method(wrong)
    with pytest.raises(ValueError, match="needs a RULE"):
        parse_method("dpp@3:1/2")
    for wrong in ("change+dpp@3:3/2", "change+dpp@3:0/2"):
        with pytest.raises(ValueError, match="expected a fraction in"):
            parse_method(wrong)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", ["change", TWO_STAGES, "change+dpp-none@4:1/2", "dpp@0"])
def test_ratios_keep_to_the_share(name: str, budget: float) -> None:
    method = parse_method(name)
    entering, kept = method.ratios(budget, 8)
    assert entering * kv_share(method.layer or 0, 8, kept) == pytest.approx(budget)


def test_retention_is_the_inverse_of_the_share() -> None:
    for layer in range(8):
        for share in (0.9, 0.95):
            ratio = retention_at(share, layer, 8)
            assert kv_share(layer, 8, ratio) == pytest.approx(share)
    assert retention_at(0.4, 0, 8) == 0.4
    with pytest.raises(ValueError, match="take 0.375, not less than 0.375"):
        retention_at(0.375, 3, 8)


def test_arms_are_what_each_budget_allows() -> None:
    methods = [parse_method(text) for text in ("full", "evs", "random@1", "random@3", "random@4")]
    arms = [(arm.method.name, arm.budget) for arm in make_arms(methods, list(BUDGETS), 8)]
    assert arms == [
        ("full", 1.0),
        *(("evs", budget) for budget in BUDGETS),
        *(("random@1", budget) for budget in BUDGETS if budget > 1 / 8),
        ("random@3", 0.6),
        ("random@3", 0.4),
        ("random@4", 0.6),
    ]
    with pytest.raises(ValueError, match="'random@4': the model has 4 layers"):
        make_arms(methods, [0.5], 4)


def test_engines_are_shared() -> None:
    assert Arm(parse_method("full"), 1.0).engine == Arm(parse_method("frames"), 0.4).engine
    assert Arm(parse_method("dpp@3"), 0.4).engine == Arm(parse_method("random@3"), 0.6).engine
    assert Arm(parse_method("dpp@3"), 0.4).engine != Arm(parse_method("dpp-none@3"), 0.4).engine
    assert Arm(parse_method("evs"), 0.4).engine == Engine(None, 0.4)
    first, both = (Arm(parse_method(name), 0.3).engine for name in ("change", TWO_STAGES))
    assert first == both == Engine(4, 1.0, (("entry_rule", "change"), ("segment_by", "one")))


def test_requests_choose_what_they_can_and_servers_the_rest() -> None:
    arm = Arm(parse_method("dpp-negated@3"), 0.4)
    assert arm.choices == {"dpp_relevance_sign": "negative", "dpp_relevance_floor": 0.0}
    assert arm.engine == Engine(3, 1.0, (("segment_by", "one"),))
    assert Arm(parse_method("random@3"), 0.4).choices == {"dpp_rule": "random"}
    assert Arm(parse_method("full"), 1.0).choices == {}


def test_two_stages_read_the_question_where_the_share_is_small() -> None:
    floor = {"dpp_relevance_floor": 0.6}
    assert Arm(parse_method(TWO_STAGES), 0.2).choices == floor
    assert Arm(parse_method(TWO_STAGES), 0.4).choices == floor | {"dpp_relevance": "none"}
    assert Arm(parse_method(f"{TWO_STAGES}:1/2"), 0.4).choices == floor


def test_the_default_methods_are_all_known_and_differ() -> None:
    assert len({parse_method(text).name for text in DEFAULT_METHODS}) == len(DEFAULT_METHODS)
