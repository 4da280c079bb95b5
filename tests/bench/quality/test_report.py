"""From answers to numbers and tables."""

from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm_dpp.bench.quality.report import render  # noqa: E402
from vllm_dpp.bench.quality.results import is_called, pool, summarise  # noqa: E402

KINDS, GROUPS = ["colour", "count"] * 30, [i // 2 for i in range(60)]


def record(right: str) -> dict[str, Any]:
    return {"kept": 5, "share": 0.4, "right": right, "commit": "abc"}


ANSWERS = {
    ("full", 1.0): record("1" * 60),
    ("dpp@3", 0.4): record("11" * 20 + "10" * 10),
    ("random@3", 0.4): record("10" * 20 + "00" * 10),
    ("random@3", 0.6): record("10" * 30),
}


def test_summary() -> None:
    summary = summarise(pool("standard", KINDS, GROUPS, [ANSWERS]), ["full", "dpp@3"])
    assert (summary["num_models"], summary["num_questions"]) == (1, 60)
    arms = {(arm["method"], arm["budget"]): arm for arm in summary["arms"]}
    ours = arms["dpp@3", 0.4]
    assert ours["accuracy"] == pytest.approx(50 / 60, abs=1e-4)
    assert ours["kinds"]["colour"]["right"] == 30 and ours["kinds"]["count"]["right"] == 20
    assert ours["low"] < 50 / 60 < ours["high"]
    assert ours["points_to"]["full"]["points"] == pytest.approx(-1000 / 60, abs=1e-3)
    assert ours["points_to"]["full"]["p_signs"] == pytest.approx(2 / 2**10, abs=1e-4)
    assert ours["commits"] == ["abc"]
    assert list(ours["points_to"]) == ["full"] and not arms["full", 1.0]["points_to"]
    assert arms["random@3", 0.4]["points_to"]["dpp@3"]["points"] == -50.0
    assert arms["random@3", 0.4]["points_to"]["dpp@3"]["is_called"]
    assert "dpp@3" not in arms["random@3", 0.6]["points_to"]  # ours has no such budget


def test_kinds_that_the_model_does_not_know_are_left_out() -> None:
    answers = ANSWERS | {("full", 1.0): record("10" * 4 + "11" * 26)}
    summary = summarise(pool("standard", KINDS, GROUPS, [answers]), ["full", "dpp@3"])
    assert summary["left_out"] == {"count": pytest.approx(26 / 30, abs=1e-4)}
    assert summary["num_questions"] == 30
    arms = {(arm["method"], arm["budget"]): arm for arm in summary["arms"]}
    assert arms["dpp@3", 0.4]["accuracy"] == 1.0
    assert list(arms["dpp@3", 0.4]["kinds"]) == ["colour"]


def test_models_are_pooled_and_a_video_stays_one_cluster() -> None:
    pooled = pool("standard", KINDS, GROUPS, [ANSWERS, dict(list(ANSWERS.items())[:3])])
    assert list(pooled.arms) == list(ANSWERS)[:3]
    assert len(pooled.kinds) == len(pooled.groups) == 120
    assert len(set(pooled.groups)) == 30
    # The same answers once more make no interval narrower.
    alone, twice = (
        summarise(pool("standard", KINDS, GROUPS, [ANSWERS] * count), ["full", "dpp@3"])
        for count in (1, 2)
    )
    for one, same in zip(alone["arms"], twice["arms"], strict=True):
        assert [x["low"] for x in same["points_to"].values()] == [
            x["low"] for x in one["points_to"].values()
        ]


def test_two_models_are_also_shown_one_by_one() -> None:
    other = {key: own | {"right": own["right"][::-1]} for key, own in ANSWERS.items()}
    other["full", 1.0] = record("10" + "1" * 58)
    summary = summarise(pool("standard", KINDS, GROUPS, [ANSWERS, other]), ["full", "dpp@3"])
    arms = {(arm["method"], arm["budget"]): arm for arm in summary["arms"]}
    assert arms["full", 1.0]["by_model"] == [1.0, pytest.approx(59 / 60, abs=1e-4)]
    assert arms["full", 1.0]["accuracy"] == pytest.approx(119 / 120, abs=1e-4)
    assert arms["random@3", 0.4]["points_to"]["dpp@3"]["by_model"] == [-50.0, -50.0]
    assert arms["random@3", 0.4]["points_to"]["dpp@3"]["is_called"]
    lines = [line.split() for line in render({"splits": [summary]}).splitlines()]
    assert ["full", "100.0", "98.3", "100.0", "98.3"] in lines  # at both budgets


def test_a_kind_that_one_of_two_models_does_not_know_is_left_out() -> None:
    other = ANSWERS | {("full", 1.0): record("10" * 4 + "11" * 26)}
    summary = summarise(pool("standard", KINDS, GROUPS, [ANSWERS, other]), ["full", "dpp@3"])
    assert summary["left_out"] == {"count": pytest.approx(26 / 30, abs=1e-4)}
    assert summary["num_questions"] == 30 and len(summary["arms"][0]["by_model"]) == 2


def test_what_is_called_a_difference() -> None:
    assert is_called(5, 0.01, [5])
    assert not is_called(5, 0.1, [4, 6])
    assert not is_called(3, 0.01, [3])
    assert is_called(-3, 0.01, [-1, -5])
    assert not is_called(3, 0.01, [7, -1])
    assert not is_called(5, 0.01, [10, 0])


def test_one_of_many_comparisons_must_be_clearer() -> None:
    """Alike videos and budgets, one arm a little worse: alone it is called, among twenty not."""
    worse = record("1" * 44 + "10" * 8)
    answers = {("full", 1.0): record("1" * 60), ("dpp@3", 0.4): worse}
    others = {(f"random@{i}", 0.4): record("1" * 60) for i in range(20)}
    groups = list(range(60))
    alone, among = (
        summarise(pool("standard", KINDS, groups, [own, own]), ["full"])["arms"][1]
        for own in (answers, answers | others)
    )
    one, other = (arm["points_to"]["full"] for arm in (alone, among))
    assert one["p"] == one["p_holm"] == other["p"] and one["is_called"]
    assert other["p_holm"] == pytest.approx(21 * other["p"], rel=1e-4)
    assert not other["is_called"]


def test_tables() -> None:
    summary = summarise(pool("standard", KINDS, GROUPS, [ANSWERS]), ["full", "dpp@3"])
    summary["chance"] = {"colour": 0.125, "count": 0.2}
    floors = {"3": {"colour": 0.2, "count": 0.25}, "full": {"colour": 1.0, "count": 0.9}}
    summary["floors"] = [floors]
    text = render({"splits": [summary]})
    assert "Standard videos: 60 questions" in text
    assert "Answers of abc." in text
    lines = [line.split() for line in text.splitlines()]
    assert ["dpp@3", "-", "83.3", "±9.4", "(5)"] in lines
    assert ["random@3", "-", "-50.0", "(-50.0..-50.0)*"] in lines
    assert ["dpp@3", "100", "67", "83.3"] in lines
    assert ["chance", "12", "20"] in lines
    assert ["K", "=", "3", "20", "25", "22"] in lines
