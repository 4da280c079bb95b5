"""Names of arms, and the share of KV that each leaves."""

import pytest

from vllm_dpp.bench.throughput.arms import Arm, Model, parse_arm
from vllm_dpp.serving.cost_model import kv_share

MODEL = Model("Qwen2_5_VLForConditionalGeneration", num_layers=12)


def parse(text: str, **options) -> Arm:
    return parse_arm(text, MODEL, **{"retention_ratio": 0.25, "prune_layer": 3} | options)


@pytest.mark.parametrize(
    ("prune_layer", "retention_ratio", "share"),
    [(14, 0.25, 0.625), (4, 0.25, 0.357142857), (9, 0.1, 0.389285714), (0, 0.5, 0.5), (7, 1, 1)],
)
def test_share_of_28_layers(prune_layer: int, retention_ratio: float, share: float) -> None:
    assert kv_share(prune_layer, 28, retention_ratio) == pytest.approx(share)


def test_stock_has_nothing_of_its_own() -> None:
    arm = parse("stock")
    assert arm == Arm("stock")
    assert arm.is_lossless


def test_evs_leaves_as_much_kv_as_dpp() -> None:
    evs, dpp = parse("evs"), parse("dpp")
    assert evs.kv_share == dpp.kv_share == 0.4375
    assert evs.input_share == 0.4375
    assert evs.engine_args["video_pruning_rate"] == 0.5625
    assert dpp.input_share == 1
    assert not evs.is_lossless
    assert not dpp.is_lossless


def test_evs_with_a_rate() -> None:
    assert parse("evs@0.75").kv_share == 0.25
    assert parse("evs@0.75").extra_args is None


def test_dpp_with_its_own_numbers() -> None:
    arm = parse("dpp@0.5:k6")
    assert (arm.prune_layer, arm.retention_ratio, arm.kv_share) == (6, 0.5, 0.75)
    assert arm.engine_args["additional_config"] == {
        "dpp": {"retention_ratio": 0.5, "prune_layer": 6}
    }
    assert arm.engine_args["hf_overrides"]["architectures"] == [
        "DPPQwen2_5_VLForConditionalGeneration"
    ]


def test_two_stages_leave_as_much_kv_as_dpp_or_their_own() -> None:
    arm = parse("two-stages")
    assert arm.kv_share == parse("dpp").kv_share == 0.4375
    assert arm.input_share == pytest.approx(0.875) and arm.retention_ratio == 1 / 3
    arm = parse("two-stages@0.2:k6")
    assert arm.input_share == pytest.approx(0.3) and arm.retention_ratio == 1 / 3
    assert arm.input_share * kv_share(6, 12, arm.retention_ratio) == pytest.approx(0.2)
    assert arm.engine_args["additional_config"] == {"dpp": {"video_share": 0.2, "prune_layer": 6}}
    assert not arm.is_lossless


def test_ratio_one_is_lossless() -> None:
    assert parse("dpp@1").is_lossless
    assert parse("dpp@1").extra_args is None


def test_off_prunes_by_default_and_not_by_request() -> None:
    arm = parse("dpp-off")
    assert arm.engine_args["additional_config"]["dpp"]["retention_ratio"] == 0.25
    assert arm.extra_args == {"dpp_retention_ratio": 1.0}
    assert arm.is_lossless


def test_the_plugin_chooses_the_layer() -> None:
    assert parse("dpp", prune_layer=None).prune_layer == 6


@pytest.mark.parametrize(
    "text", ["", "STOCK", "stock@1", "stock:k3", "evs:k3", "evs@0", "evs@1", "dpp@0", "dpp@1.5",
             "dpp@", "dpp:k12", "dpp@.5:3", "vidcom2", "two-stages@0", "two-stages@2"]
)  # fmt: skip
def test_wrong_names_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be pruned"):
        parse_arm("dpp", Model("LlamaForCausalLM", 12), retention_ratio=0.5, prune_layer=3)
