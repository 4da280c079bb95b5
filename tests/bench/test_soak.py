"""The soak's judges, counts and cases; and a short one against a real server."""

import itertools
import json
from pathlib import Path

import pytest

pytest.importorskip("vllm")  # the names of request arguments are the plugin's

from vllm_dpp.bench.chat.client import Reply  # noqa: E402  (needs vLLM)
from vllm_dpp.bench.soak import command, memory, options  # noqa: E402
from vllm_dpp.bench.soak.cases import Case, Maker  # noqa: E402
from vllm_dpp.bench.soak.clients import Tally, answered, refused  # noqa: E402
from vllm_dpp.bench.soak.judge import Expected, judge  # noqa: E402
from vllm_dpp.bench.soak.report import render  # noqa: E402

EXPECTED = Expected(tokens=(5, 6, 7), margins=(1.0, 1e-4, 1.0))
GOOD, BAD = Case("video 3", []), Case("cut mp4 0", [], is_good=False)


@pytest.mark.parametrize(
    ("tokens", "verdict"),
    [
        ((5, 6, 7), "equal"),
        ((), "equal"),
        ((5,), "equal"),
        ((5, 9, 1), "tie"),  # behind a tie everything may differ
        ((9, 6, 7), "different"),
        ((5, 6, 9), "different"),
        ((5, 6, 7, 8), "different"),
    ],
)
def test_judge(tokens: tuple[int, ...], verdict: str) -> None:
    assert judge(tokens, EXPECTED) == verdict


def reply(status: int = 200, tokens: tuple[int, ...] = (5, 6, 7), **fields) -> Reply:
    return Reply(status, 0.0, tokens=list(tokens), is_whole=True, **fields)


def test_good_answers_are_counted() -> None:
    tally = Tally()
    answered(reply(), GOOD, EXPECTED, tally, hung_up=False)
    answered(reply(tokens=(5, 9, 9)), GOOD, EXPECTED, tally, hung_up=False)
    answered(reply(tokens=(5,)), GOOD, EXPECTED, tally, hung_up=True)
    assert tally.counts == {
        "whole answers": 2,
        "beginnings heard": 1,
        "of these, equal": 2,
        "of these, apart at a tie": 1,
    }
    assert not tally.faults and tally.kinds == {"video": 3}


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        (reply(tokens=(5, 6, 8)), "answer differs"),
        (reply(tokens=(5, 6)), "answer cut off"),
        (reply(500, error="oh"), "good request refused"),
        (reply(error="in the stream"), "good request refused"),
    ],
)
def test_wrong_answers_are_faults(wrong: Reply, fault: str) -> None:
    tally = Tally()
    answered(wrong, GOOD, EXPECTED, tally, hung_up=False)
    assert [f["fault"] for f in tally.faults] == [fault] and tally.counts == {fault: 1}


@pytest.mark.parametrize(
    ("status", "error", "is_fault"),
    [
        (400, "", False),
        (422, "", False),
        (500, "", True),
        (200, "", True),
        (200, '{"code": 400}', False),
        (200, '{"code": 500}', True),
    ],
)
def test_bad_requests_get_a_4xx(status: int, error: str, is_fault: bool) -> None:
    tally = Tally()
    refused(reply(status, error=error), BAD, tally)
    assert bool(tally.faults) == is_fault


def test_equal_seeds_make_equal_cases_of_every_kind(tmp_path: Path) -> None:
    first, second = ([*Maker(tmp_path, 7, 128, 224).good(2)] for _ in range(2))
    assert first == second and len({case.name for case in first}) == 14
    for entry_only in (False, True):
        bad = list(Maker(tmp_path, 7, 128, 224, entry_only=entry_only).bad())
        assert not any(case.is_good for case in bad)
        assert len({case.name for case in bad}) == len(bad)


def test_memory() -> None:
    assert memory.growth([1] * 8 + [100] * 4 + [110] * 4) == pytest.approx(0.1)
    assert memory.growth([1, 2]) == 0
    with memory.Sampler(-1) as sampler:
        pass
    assert sampler.samples == [0]


def test_flags() -> None:
    parsed = options.parse(["--long-tokens", "256", "--swap-space", "0"])
    words = options.command_of(parsed, "m", on_cpu=True)
    pairs = list(itertools.pairwise(words))
    assert ("--max-deferred-tokens", "352") in pairs and words[-2:] == ["--swap-space", "0"]
    words = options.command_of(options.parse(["--entry-only"]), "m", on_cpu=True)
    assert "--entry-only" in words and "--max-deferred-tokens" not in words


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--clients", "0"], "--clients"),
        (["--stock", "--entry-only"], "take --entry-only away"),
        (["--side", "28"], "--side must be at least 56"),
        (["--side", "896", "--long-tokens", "2047"], "raise --long-tokens"),
    ],
)
def test_nothing_to_do(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        options.parse(arguments)
    assert named in capsys.readouterr().err


SHORT = (
    "--model toy:tiny --minutes 0.2 --clients 6 --cases 1 --long-tokens 1024 --kv-cache-mib 24 "
    "--max-num-batched-tokens 128 --max-model-len 2048"
)


@pytest.mark.slow
@pytest.mark.e2e
def test_a_short_soak(tmp_path: Path) -> None:
    output = tmp_path / "soak.json"
    parsed = options.parse([*SHORT.split(), "--output", str(output)])
    found = command.run(tmp_path, command.resolve(parsed.model), parsed)
    assert found["wrong"] == 0, found["faults"]
    assert found["counts"]["whole answers"] > 8
    document = {**found, "memory_is_flat": True}
    assert "| whole answers |" in render(document) and json.dumps(document)
