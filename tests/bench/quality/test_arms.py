"""Methods, budgets and what they cost."""

import pytest

pytest.importorskip("vllm")

from vllm_dpp.bench.quality.arms import (  # noqa: E402
    BUDGETS,
    DEFAULT_METHODS,
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
    assert parse_method("attention@12:last").last_token
    for wrong in ("dpp", "nothing@3", "full@2", "dpp@x", "dpp@3:first", ""):
        with pytest.raises(ValueError, match="unknown method"):
            parse_method(wrong)


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
        *(("random@1", budget) for budget in BUDGETS),
        ("random@3", 0.6),
        ("random@3", 0.4),
        ("random@4", 0.6),
    ]
    with pytest.raises(ValueError, match="'random@4': the model has 4 layers"):
        make_arms(methods, [0.5], 4)


def test_engines_are_shared() -> None:
    assert Arm(parse_method("full"), 1.0).engine == Arm(parse_method("frames"), 0.4).engine
    assert Arm(parse_method("dpp@3"), 0.4).engine == Arm(parse_method("random@3"), 0.6).engine
    assert Arm(parse_method("evs"), 0.4).engine == Engine(None, 0.4)


def test_the_default_methods_are_all_known_and_differ() -> None:
    assert len({parse_method(text).name for text in DEFAULT_METHODS}) == len(DEFAULT_METHODS)
