"""The serving benchmark in small: real servers, vLLM's own client."""

import json
from pathlib import Path

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_dpp.bench.serve import command, options
from vllm_dpp.bench.throughput.arms import Model, parse_arm


@pytest.mark.slow
@pytest.mark.e2e
def test_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one arm: the flags of the others are read below."""
    output, plot = tmp_path / "serve.json", tmp_path / "serve.png"
    words = "--model toy:tiny --arms stock --concurrency 2 --rounds 1 --waves 1 "
    words += "--seconds 1 --side 112 --output-tokens 4 --goodput ttft:100000"
    assert command.main([*words.split(), "--output", str(output), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "2 at once" in printed and "goodput/s" in printed
    document = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text() and plot.stat().st_size
    found = document["results"]["2"]["stock"]
    assert found["completed"] == 2 and 0 < found["p50_ttft_ms"] <= found["p99_ttft_ms"]
    assert found["request_goodput"] == pytest.approx(found["request_throughput"])


def test_flags_of_every_arm() -> None:
    """As vLLM's own parser reads them."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    model = Model("Qwen2_5_VLForConditionalGeneration", 12)
    chosen = options.parse([])
    for name in (*options.ARMS, "dpp@0.25"):
        arm = parse_arm(name, model, retention_ratio=0.25, prune_layer=None)
        read = parser.parse_args(options.server_flags(arm, chosen, on_cpu=True))
        assert read.kv_cache_memory_bytes == 2**28
        assert read.limit_mm_per_prompt == {"image": 0, "video": 1}
        for key, value in arm.engine_args.items():
            assert getattr(read, key) == value
        assert (read.enable_prefix_caching is False) == name.startswith("evs")


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
