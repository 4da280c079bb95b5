"""The serving benchmark in small: real servers, vLLM's own client."""

import json
from pathlib import Path
from typing import Any

import pytest
from vllm.benchmarks.datasets import get_samples
from vllm.benchmarks.serve import add_cli_args
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.tokenizers import get_tokenizer
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_dpp.batch.rows import videos_in
from vllm_dpp.bench.serve import command, options
from vllm_dpp.bench.throughput.arms import Model, parse_arm
from vllm_dpp.toy.video import render_frames, write_mp4


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos" / "of two lengths"
    folder.mkdir(parents=True)
    for seconds in (1, 2):
        write_mp4(folder / f"{seconds} s.mp4", render_frames(seconds, 8 * seconds, 112, 112), 8)
    return folder.parent


@pytest.mark.slow
@pytest.mark.e2e
def test_small_run(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one arm: the flags of the others are read below."""
    output, plot = tmp_path / "serve.json", tmp_path / "serve.png"
    words = "--model toy:tiny --arms stock --concurrency 2 --rounds 1 --waves 1 "
    words += "--output-tokens 4 --goodput ttft:100000"
    files = ["--videos", str(videos), "--output", str(output), "--plot", str(plot)]
    assert command.main([*words.split(), *files]) == 0
    printed = capsys.readouterr().out
    assert "2 at once" in printed and "goodput/s" in printed
    document = json.loads(output.read_text())
    assert str(tmp_path) not in output.read_text() and plot.stat().st_size
    found = document["results"]["2"]["stock"]
    assert found["completed"] == 2 and 0 < found["p50_ttft_ms"] <= found["p99_ttft_ms"]
    assert found["request_goodput"] == pytest.approx(found["request_throughput"])


@pytest.mark.parametrize("kind", ["random", "of a folder"])
def test_the_client_makes_the_requests(
    kind: str, videos: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """As vLLM's own client reads the flags."""
    words = "--waves 3 --seconds 1 --side 112 --output-tokens 5"
    chosen = options.parse(words.split() + (["--videos", str(videos)] if kind != "random" else []))
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    flags = options.client_flags(chosen, concurrency=2, seed=7, folder=tmp_path)
    tokenizer = get_tokenizer(str(tiny_checkpoint))
    samples = get_samples(parser.parse_args(["--model", "any", *flags]), tokenizer)
    assert len(samples) == 6 and {sample.expected_output_len for sample in samples} == {5}
    urls = [_url_of(sample.multi_modal_data) for sample in samples]
    asked = {(url, str(sample.prompt)) for url, sample in zip(urls, samples, strict=True)}
    assert len(asked) == 6, "no request twice"
    if kind == "random":
        assert all(url.startswith("data:video") for url in urls)
    else:
        assert {Path(url.removeprefix("file://")) for url in urls} == set(videos_in(videos))
        arm = parse_arm("stock", Model("any", 4), retention_ratio=0.25, prune_layer=None)
        flags = options.server_flags(arm, chosen, on_cpu=True)
        assert flags[flags.index("--allowed-local-media-path") + 1] == str(videos)


def _url_of(content: Any) -> str:
    (item,) = content if isinstance(content, list) else [content]
    return item["video_url"]["url"]


@pytest.mark.parametrize(
    ("words", "gib", "on_cpu"),
    [("", 0.25, True), ("--profile gpu", 4, False), ("--kv-cache-gib 2 --profile gpu", 2, False)],
)
def test_flags_of_every_arm(words: str, gib: float, on_cpu: bool) -> None:
    """As vLLM's own parser reads them."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    model = Model("Qwen2_5_VLForConditionalGeneration", 12)
    chosen = options.parse(words.split())
    for name in (*options.ARMS, "dpp@0.25"):
        arm = parse_arm(name, model, retention_ratio=0.25, prune_layer=None)
        read = parser.parse_args(options.server_flags(arm, chosen, on_cpu=on_cpu))
        assert read.kv_cache_memory_bytes == gib * 2**30
        assert read.enforce_eager == on_cpu
        assert read.limit_mm_per_prompt == {"image": 0, "video": 1}
        for key, value in arm.engine_args.items():
            assert getattr(read, key) == value
        assert (read.enable_prefix_caching is False) == name.startswith("evs")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--arms evs", "--arms needs stock"),
        ("--concurrency 0", "must be at least 1"),
        ("--videos nowhere", "nowhere has no videos"),
    ],
)
def test_bad_arguments(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        options.parse(words.split())
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_broken_video(videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options.parse(["--videos", str(videos)])
    broken = videos / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(SystemExit) as stopped:
        options.parse(["--videos", str(videos)])
    assert stopped.value.code == 2 and f"{broken} cannot be read" in capsys.readouterr().err


def test_an_unknown_arm(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--model", "toy:tiny", "--arms", "stock", "fast"]) == 2
    assert "unknown arm 'fast'" in capsys.readouterr().err
