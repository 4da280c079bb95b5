"""The benchmark itself: its arguments, its refusal, and one small run with real engines."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("tqdm")

from vllm_dpp.bench.throughput import command as throughput  # noqa: E402  (needs tqdm)
from vllm_dpp.bench.throughput import options
from vllm_dpp.bench.throughput.capacity import EngineFacts


def test_stock_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        throughput.main(["--arms", "dpp"])
    assert stopped.value.code == 2
    assert "needs stock" in capsys.readouterr().err


def test_unknown_toy(capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(["--model", "toy:huge"]) == 2
    assert "'huge'" in capsys.readouterr().err


def test_rounds_have_videos_of_their_own() -> None:
    workload = options.workload_of(options.parse([]))
    first, second = workload.of_round(0), workload.of_round(1)
    assert abs(first.seed - second.seed) >= workload.num_requests
    assert abs(first.seed - workload.seed) >= workload.num_requests


def test_arms_share_memory_on_a_gpu() -> None:
    parsed = options.parse(["--arms", "stock", "dpp"])
    assert options.engine_args_of(parsed, "m", on_cpu=False)["gpu_memory_utilization"] == 0.45
    assert "gpu_memory_utilization" not in options.engine_args_of(parsed, "m", on_cpu=True)


def test_wrong_outputs_forbid_a_report() -> None:
    assert throughput._wrong_outputs({"dpp-off": 1.0}, "float32") is None
    assert throughput._wrong_outputs({"dpp-off": 0.99}, "bfloat16") is None
    assert "dpp-off 99.0 %" in (throughput._wrong_outputs({"dpp-off": 0.99}, "float32") or "")


def test_steps_cannot_alternate_where_engines_are_reloaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        options.parse(["--alternate-steps", "--reload"])
    assert "--alternate-steps needs all arms loaded" in capsys.readouterr().err


SMALL = (
    "--model toy:tiny --num-requests 4 --frames 16 --width 112 --output-tokens 4 --repeats 1 "
    "--kv-cache-mib 8 --max-model-len 512 --max-num-batched-tokens 512 --prune-layer 2"
)


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_alternating_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    output = tmp_path / "result.json"
    arguments = f"{SMALL} --arms stock dpp-off --alternate-steps --output {output}".split()
    assert throughput.main(arguments) == 0
    arms = json.loads(output.read_text())["arms"]
    assert arms["dpp-off"]["against_stock"]["paired_steps"] > 0
    assert arms["dpp-off"]["tokens_equal_to_stock"] == 1
    for arm in arms.values():
        [done] = arm["rounds"]
        assert done["seconds"] == pytest.approx(sum(done["step_seconds"]))


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_small_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # for engines that are told nothing else
    output = tmp_path / "result.json"
    arguments = f"{SMALL} --arms stock evs dpp --output {output}".split()
    assert throughput.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Throughput" in printed
    assert "Selection" in printed
    text = output.read_text()
    assert str(tmp_path) not in text
    arms = json.loads(text)["arms"]
    for arm in arms.values():
        assert arm["capacity"]["kv_blocks_per_request"]["difference"] == 0
        assert len(arm["rounds"][0]["ttft"]) == 4
        assert EngineFacts(**arm["engine"]).kv_bytes <= 8 * 2**20
    stock, dpp = arms["stock"]["metrics"], arms["dpp"]["metrics"]
    assert dpp["kv_bytes_per_request"] < stock["kv_bytes_per_request"]
    assert arms["dpp"]["selection"]["passes"] >= 1
