"""Arithmetic and layout of the report."""

import pytest

from vllm_dpp.bench.throughput import report
from vllm_dpp.bench.throughput.arms import Arm
from vllm_dpp.bench.throughput.capacity import EngineFacts, Prediction
from vllm_dpp.bench.throughput.drive import Round
from vllm_dpp.bench.throughput.tables import render

FACTS = EngineFacts(101, 32, (12,), 1000, True, "float32", "cpu", True, 1.0)


def one_round(seconds: float, **fields) -> Round:
    return Round(
        **{
            "seconds": seconds,
            "cpu_seconds": 2 * seconds,
            "steps": 10,
            "prompt_tokens": [100, 100],
            "video_tokens": [80, 80],
            "outputs": [[1, 2, 3, 4], [5, 6, 7, 8]],
            "ttft": [0.5, 1.5],
            "peak_running": 3,
            "peak_prefilled": 2,
            "group_blocks": [4.0],
        }
        | fields
    )


def test_ratios_pair_rounds() -> None:
    # The machine was ten times slower in the second round, for both.
    arm = [one_round(2), one_round(20), one_round(3)]
    stock = [one_round(1), one_round(10), one_round(2)]
    assert report.ratios(arm, stock, lambda r: r.seconds) == (2, 1.5, 2)


def test_metrics() -> None:
    found = report.metrics([one_round(2), one_round(4), one_round(5)], FACTS, 200)
    assert found["requests_per_s"] == 2 / 4
    assert found["tokens_per_s"] == 208 / 4
    assert found["output_tokens_per_s"] == 8 / 4
    assert found["ttft_p50_s"] == 1
    assert found["mean_step_ms"] == 400
    assert found["kv_blocks_per_request"] == 4
    assert found["kv_bytes_per_request"] == 4 * 12 * 1000


def test_a_shorter_prompt_is_not_charged_for() -> None:
    pruned = [one_round(2, prompt_tokens=[40, 40])]
    assert report.metrics(pruned, FACTS, 200)["tokens_per_s"] == 104


def test_throughput_is_the_inverse_of_time() -> None:
    against = report.against_stock([one_round(2)], [one_round(5)])
    assert against["throughput"] == (2.5, 2.5, 2.5)
    assert against["seconds"] == (0.4, 0.4, 0.4)


def test_steps_are_paired_and_disturbed_ones_do_not_count() -> None:
    # A first step of 1 s becomes 2, a second of 4 s becomes 6; each is disturbed in one round.
    arm = [one_round(9, step_seconds=steps) for steps in ([2, 6], [20, 6], [4, 99])]
    stock = [one_round(9, step_seconds=steps) for steps in ([1, 4], [1, 4], [2, 4])]
    assert report.paired_ratio(arm, stock) == pytest.approx((1 * 2 + 4 * 1.5) / 5)
    other = [one_round(9, step_seconds=[1, 2, 3])] * 3
    assert report.paired_ratio(other, stock) is None


def test_equal_share() -> None:
    assert report.equal_share([[1, 2], [3, 4]], [[1, 2], [3, 5]]) == 0.75


def test_selection_shares_sum_over_rounds() -> None:
    timed = {"passes": 2, "selection_seconds": 1, "decoder_seconds": 10, "step_seconds": 20}
    rounds = [one_round(30, selection=timed), one_round(30, selection=timed)]
    found = report.selection_shares(rounds)
    assert found is not None
    assert found["passes"] == 4
    assert (found["share_of_decoder"], found["share_of_step"]) == (0.1, 0.05)
    assert report.selection_shares([one_round(1)]) is None
    assert report.selection_shares([one_round(1, selection={"passes": 0})]) is None


def test_capacity_rows() -> None:
    measured = report.metrics([one_round(2)], FACTS, 200)
    rows = report.capacity_rows(measured, Prediction(5, 60_000, 2))
    assert rows["kv_blocks_per_request"] == {
        "predicted": 5,
        "counted": 4,
        "difference": pytest.approx(-0.2),
    }
    assert rows["peak_prefilled"]["difference"] == 0


def test_all_tables() -> None:
    rounds = [one_round(2)]
    measured = report.metrics(rounds, FACTS, 200)
    result = {
        **report.arm_as_json(Arm("stock"), FACTS, rounds),
        "metrics": measured,
        "against_stock": report.against_stock(rounds, rounds),
        "capacity": report.capacity_rows(measured, Prediction(4, 48_000, 2)),
        "selection": None,
    }
    assert "outputs" not in result["rounds"][0]
    tables = list(render({"stock": result}))
    assert len(tables) == 3
    assert all("stock" in text for _, text in tables)
