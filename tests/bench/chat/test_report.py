"""From clocks and counts to numbers, and their tables."""

import importlib.util

import pytest

from vllm_dpp.bench.chat import plot, report, tables
from vllm_dpp.bench.chat.client import Reply
from vllm_dpp.bench.chat.streams import Arrival, measured
from vllm_dpp.bench.chat.talk import Asked, rotated, script


def asked(computed: int, ttft: float, tokens: tuple[int, ...] = (1, 2)) -> Asked:
    return Asked(prompt_tokens=100, computed_tokens=computed, ttft=ttft, tokens=tokens)


def arrival(*gaps: float, ttft: float = 1.0) -> Arrival:
    return Arrival(ttft, 2000, 2000, gaps, (0.01, 0.01, 0.02))


def test_gaps_are_those_between_the_sending_and_the_end() -> None:
    reply = Reply(200, sent=1.0, times=[3.0, 3.5], prompt_tokens=10, cached_tokens=4)
    found = measured(reply, [[0.5, 0.9, 1.2, 3.4, 3.6, 4.0], [0.8, 3.9]])
    assert found.quiet_gaps == pytest.approx((0.4,))
    assert found.gaps == pytest.approx((0.3, 2.2, 0.2, 3.1))  # one that began after the end is out
    assert (found.ttft, found.computed_tokens) == (2.0, 6)


def test_ttft_is_paired_with_stock_of_the_same_round() -> None:
    rounds = [
        {"stock": {"turn 1": asked(100, s)}, "dpp": {"turn 1": asked(computed, d)}}
        for s, d, computed in ((1, 2, 90), (10, 10, 100), (1, 0.5, 90))
    ]
    kv = {"stock": {"turn 1": 8}, "dpp": {"turn 1": 6}}
    found = report.chat_results(rounds, kv)["dpp"]["turn 1"]
    assert found["ttft_to_stock"] == (1, 0.5, 2)
    assert (found["computed_tokens"], found["kv_bytes"]) == (100, 6)


def test_answers_that_are_not_stocks() -> None:
    talk = {
        "stock": {"a": asked(1, 1), "b": asked(1, 1)},
        "dpp": {"a": asked(1, 1), "b": asked(1, 1, (1, 3))},
        "evs": {"a": asked(1, 1, (7,)), "b": asked(1, 1)},
    }
    assert report.differing(talk, ["dpp"]) == ["dpp: b"]


@pytest.mark.parametrize(("longest", "met"), [(1.5, True), (1.6, False)])
def test_the_goal(longest: float, met: bool) -> None:
    rounds = [{"stock": arrival(0.1, 1.0), "dpp": arrival(0.1, longest)}] * 3
    found = report.stream_results(rounds)
    assert found["dpp"]["longest_s_to_stock"] == pytest.approx((longest,) * 3)
    assert report.meets_goal(found) == {"dpp": met}


def document() -> dict:
    talk = {
        name: {"turn 1": asked(100, 0.2), "turn 2": asked(20, 0.1)} for name in ("stock", "dpp")
    }
    kv = {name: {"turn 1": 2**20, "turn 2": 2**21} for name in talk}
    rounds = [{"stock": arrival(0.1, 0.3), "dpp": arrival(0.1, 0.2)}]
    return {
        "provenance": {"machine": {"cpu": "a CPU", "cores": 2, "gpus": []}},
        "options": {"streams": 4, "repeats": 1},
        "chat": {"results": report.chat_results([talk], kv)},
        "streams": {"new": {"results": report.stream_results(rounds)}},
    }


def test_tables() -> None:
    found = list(tables.tables(document()))
    text = "\n".join(tables.text(*parts) for parts in found)
    marked = "\n".join(tables.markdown(*parts) for parts in found)
    assert "20 of 100" in text and "200 (200..200)" in text and "0.67 (0.67..0.67)" in text
    assert "| turn 2 | 20 of 100 | 20 of 100 |" in marked


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_a_picture(tmp_path) -> None:
    plot.draw(document(), tmp_path / "new" / "chat.png")
    assert (tmp_path / "new" / "chat.png").read_bytes().startswith(b"\x89PNG")


def test_everybody_begins_once() -> None:
    assert [rotated("abc", by)[0] for by in range(4)] == ["a", "b", "c", "a"]


def test_the_script_has_one_video_a_request() -> None:
    requests = script("data:video/mp4;base64,")
    assert requests["turn 1 again"] == requests["turn 1"]
    for messages in requests.values():
        parts = [part for m in messages if m["role"] == "user" for part in m["content"]]
        assert sum(part["type"] == "video_url" for part in parts) == 1
    assert len(requests["turn 4"]) == 7
