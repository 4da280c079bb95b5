"""Predicted KV blocks, by hand."""

import pytest

from vllm_dpp.bench.throughput.arms import Arm, Model, parse_arm
from vllm_dpp.bench.throughput.capacity import (
    EngineFacts,
    predict,
    pruned_tokens,
    relative_difference,
)

MODEL = Model("Qwen2_5_VLForConditionalGeneration", num_layers=12)
PAGE = 1000


def arm(text: str) -> Arm:
    return parse_arm(text, MODEL, retention_ratio=0.25, prune_layer=3)


def facts(num_blocks: int, group_layers: tuple[int, ...], *, caching: bool = True) -> EngineFacts:
    return EngineFacts(num_blocks, 32, group_layers, PAGE, caching, "float32", "cpu", True, 1.0)


def predict_one(name: str, engine: EngineFacts, max_requests: int = 100):
    return predict(
        arm(name),
        engine,
        num_layers=12,
        prompt_tokens=420,
        video_tokens=384,
        video_end=400,
        max_requests=max_requests,
    )


def test_stock() -> None:
    # 420 tokens are 13.1 blocks of 32; 101 blocks hold one null block and 7 times 14.
    found = predict_one("stock", facts(101, (12,)))
    assert (found.blocks, found.kv_bytes, found.peak_prefilled) == (14, 14 * 12 * PAGE, 7)


def test_dpp() -> None:
    # Groups of 3 layers: one below, three above. The last 16 of 384 stay, and 92 of the others
    # would: 276 go, 8 whole blocks of them do. 164 tokens are left, 6 blocks.
    found = predict_one("dpp", facts(404, (3, 3, 3, 3)))
    assert (found.blocks, found.kv_bytes) == (14 + 3 * 6, 32 * 3 * PAGE)
    assert found.peak_prefilled == 403 // 32 == 12


def test_dpp_without_prefix_caching() -> None:
    # 96 of 384 stay: 132 tokens, 5 blocks.
    found = predict_one("dpp", facts(404, (3, 3, 3, 3), caching=False))
    assert (found.blocks, found.kv_bytes) == (14 + 3 * 5, 29 * 3 * PAGE)
    assert found.peak_prefilled == 403 // 29 == 13


def test_two_stages() -> None:
    # 115 of 384 enter: 151 tokens, 5 blocks. The video ends at 131: its last 3 tokens stay, and 37
    # of the 112 before: 75 go, 2 whole blocks of them do. 87 tokens are left, 3 blocks.
    found = predict_one("two-stages@0.2:k6", facts(202, (6, 6)))
    assert (found.blocks, found.kv_bytes) == (5 + 3, 8 * 6 * PAGE)


def test_dpp_that_keeps_everything_needs_what_stock_needs() -> None:
    engine = facts(404, (3, 3, 3, 3))
    for name in ("dpp@1", "dpp-off"):
        assert predict_one(name, engine).blocks == 4 * 14
        assert predict_one(name, engine).kv_bytes == 14 * 12 * PAGE


def test_evs() -> None:
    # 0.4375 of 384 is 168: 204 tokens, 7 blocks.
    assert predict_one("evs", facts(101, (12,))).blocks == 7


def test_limits_of_the_scheduler_count() -> None:
    assert predict_one("stock", facts(101, (12,)), max_requests=4).peak_prefilled == 4


def test_blocks_share_one_pool() -> None:
    engine = facts(10, (3, 2))
    assert (engine.block_bytes, engine.kv_bytes) == (3 * PAGE, 30 * PAGE)


@pytest.mark.parametrize(
    ("end", "block_size", "pruned"),
    [
        (103, None, 75),
        (112, 16, 64),  # 75 of 100
        (103, 16, 64),  # the last 7 stay, and 69 of 93 would go
        (127, 32, 32),  # 51 of 69
        (125, 25, 75),
        (105, 128, 0),
    ],
)
def test_only_whole_blocks_are_pruned_with_prefix_caching(end, block_size, pruned) -> None:
    assert pruned_tokens(100, end, 0.25, block_size) == pruned


def test_relative_difference() -> None:
    assert relative_difference(21, 20) == pytest.approx(0.05)
    assert relative_difference(0, 0) == 0
    assert relative_difference(1, 0) == float("inf")
