"""The serving benchmark in small: real servers, vLLM's own client."""

import json
from pathlib import Path

import pytest

from vllm_dpp.bench.serve import command, options


@pytest.mark.slow
@pytest.mark.e2e
def test_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, plot = tmp_path / "serve.json", tmp_path / "serve.png"
    words = "--model toy:tiny --arms stock two-stages@0.4 --concurrency 1 2 --rounds 1 --waves 1 "
    words += "--seconds 1 --side 112 --output-tokens 4 --goodput ttft:100000"
    assert command.main([*words.split(), "--output", str(output), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "2 at once" in printed and "goodput/s" in printed
    document = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text() and plot.stat().st_size
    for number in ("1", "2"):
        for found in document["results"][number].values():
            assert found["completed"] == int(number)
            assert 0 < found["p50_ttft_ms"] <= found["p99_ttft_ms"]
            assert found["request_goodput"] == pytest.approx(found["request_throughput"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--arms evs", "--arms needs stock"),
        ("--concurrency 0", "must be at least 1"),
    ],
)
def test_bad_arguments(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        options.parse(words.split())
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_an_unknown_arm(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--model", "toy:tiny", "--arms", "stock", "fast"]) == 2
    assert "unknown arm 'fast'" in capsys.readouterr().err
