"""The benchmark itself: its arguments, and one small run with two real servers."""

import json
from pathlib import Path

import pytest

pytest.importorskip("tqdm")

from vllm_dpp.bench.chat import command, options  # noqa: E402  (needs tqdm)


def test_stock_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--arms", "dpp"])
    assert stopped.value.code == 2
    assert "--arms needs stock" in capsys.readouterr().err


def test_unknown_toy(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--model", "toy:huge"]) == 2
    assert "'huge'" in capsys.readouterr().err


def test_other_flags_go_to_the_servers() -> None:
    parsed = options.parse(["--block-size", "32", "--repeats", "1"])
    assert options.flags_of(parsed, on_cpu=True)[-2:] == ["--block-size", "32"]


SMALL = (
    "--model toy:tiny --arms stock dpp-none --repeats 1 --side 112 --chat-frames 16 "
    "--long-frames 48 --max-num-batched-tokens 128 --max-model-len 2048 --streams 2 --block-size 32"
)


@pytest.mark.slow
@pytest.mark.e2e
def test_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vllm")
    output = tmp_path / "result.json"
    assert command.main([*SMALL.split(), "--output", str(output)]) == 0
    assert "Prompt tokens computed" in capsys.readouterr().out
    assert str(tmp_path) not in output.read_text()
    found = json.loads(output.read_text())
    stock, pruned = (found["chat"]["results"][arm] for arm in ("stock", "dpp-none"))
    for name in ("turn 2", "turn 1 again", "question 1"):
        assert pruned[name]["computed_tokens"] == stock[name]["computed_tokens"] < 128
    assert pruned["turn 1"]["kv_bytes"] < stock["turn 1"]["kv_bytes"]
    for variant in found["streams"].values():
        assert variant["results"]["dpp-none"]["computed_tokens"] > 3 * 128
    assert output.with_suffix(".md").read_text().count("|") > 100
