"""examples/lmms_eval.py: its commands, its comparison, its servers under lmms-eval's requests."""

import json
import os
import shlex
import shutil
import socket
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from vllm.utils.argparse_utils import FlexibleArgumentParser

from examples import lmms_eval as script
from tests.e2e.lmms_tasks import utils as task
from tests.vllm_names import make_arg_parser
from vllm_dpp import cli
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.toy.video import render_frames, write_mp4

TASKS = Path(__file__).with_name("lmms_tasks")
QUESTIONS = [json.loads(line) for line in (TASKS / "questions.jsonl").open()]
NUM_FRAMES, TOKENS_A_SLICE = 32, 16  # of clips of 112 x 112 pixels
PRUNE_LAYER, RATIO = 2, 0.25  # of 6 layers: half is left
# As the name of a program or its path: lmms-eval has requirements that want a venv of its own.
LMMS_EVAL = shutil.which(os.getenv("LMMS_EVAL", "lmms-eval"))


def arguments(*more: str) -> Namespace:
    return script.parse_arguments(["some/model", "--output", "out", *more])


@pytest.mark.parametrize(
    "num_layers, prune_layer, ratio, num_frames, fewer",
    [(28, 7, 0.25, 64, 28), (28, 9, 0.1, 64, 24), (6, 2, 0.25, 32, 16), (4, 0, 0.01, 8, 2)]
    + [(28, 7, 1, 64, 64)],
)
def test_the_control_has_an_equal_share_of_frames(
    num_layers: int, prune_layer: int, ratio: float, num_frames: int, fewer: int
) -> None:
    given = [f"--prune-layer={prune_layer}", f"--retention-ratio={ratio}"]
    arms = script.build_arms(arguments(*given, f"--num-frames={num_frames}"), num_layers)
    assert [(arm.name, arm.num_frames) for arm in arms] == [
        ("unpruned", num_frames),
        ("downsampled", fewer),
        ("pruned", num_frames),
    ]


def test_the_prune_layer_is_that_of_serve() -> None:
    _, control, pruned = script.build_arms(arguments(), 36)
    assert pruned.server[pruned.server.index("--prune-layer") + 1] == "18"
    assert control.num_frames == 40


@pytest.mark.parametrize(
    "given", [["--prune-layer=28"], ["--retention-ratio=0"], ["--num-frames=1"]]
)
def test_bad_values_are_refused(given: list[str]) -> None:
    with pytest.raises(ValueError, match=given[0].partition("=")[0]):
        script.build_arms(arguments(*given), 28)


def test_servers_are_what_vllm_understands(
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HOME", "/data/hf")
    own = ["--tensor-parallel-size", "2", "--gpu-memory-utilization=0.8"]
    args = script.parse_arguments([str(tiny_checkpoint), "--output", "out", "--port", "9", *own])
    unpruned, control, pruned = script.build_arms(args, script.count_layers(args.model))
    assert unpruned.server == control.server and unpruned.server[:2] == ("vllm", "serve")
    assert pruned.server[:2] == ("vllm-dpp", "serve")
    assert cli.main([*pruned.server[1:], "--dry-run"]) == 0
    plain = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("+ "))
    parser = make_arg_parser(FlexibleArgumentParser())
    stock, ours = (vars(parser.parse_args(words[2:])) for words in (unpruned.server, plain))
    different = {name for name in stock if stock[name] != ours[name]}
    assert different == {"hf_overrides", "additional_config"}
    settings = ServingSettings.from_additional_config(ours["additional_config"])
    assert settings == ServingSettings(prune_layer=3, retention_ratio=0.25)
    assert stock["model_tag"] == str(tiny_checkpoint)
    assert stock["served_model_name"] == ["served"]
    assert (stock["host"], stock["port"]) == ("127.0.0.1", 9)
    assert stock["max_model_len"] == 32 * 256 + 4096
    assert stock["max_num_batched_tokens"] is None, "a video may be longer than a step"
    assert stock["media_io_kwargs"] == {"video": {"video_backend": "opencv"}}
    size = {"shortest_edge": 3136, "longest_edge": 256 * 784}
    assert stock["mm_processor_kwargs"] == {"videos_kwargs": {"size": size}}
    assert stock["allowed_local_media_path"] == "/data/hf"
    assert stock["trust_request_mm_kwargs"] is True
    assert (stock["tensor_parallel_size"], stock["gpu_memory_utilization"]) == (2, 0.8)


def test_evaluations(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In the words of lmms-eval 0.7.3, whose parser is not here: the run below takes them, too."""
    monkeypatch.setenv("HF_HOME", "/data/hf")
    args = arguments("--tasks", "videomme", "mvbench", "--limit", "5", "--include-path", "mine")
    arms = script.build_arms(args, 28)
    script.show(arms, args)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("env ")]
    assert printed == [
        f"env HF_HOME=/data/hf lmms-eval --model openai --model_args model=served,"
        f"base_url=http://127.0.0.1:8000/v1,api_key=none,pass_video_url=True,"
        f"max_frames_num={frames},num_concurrent=16 --tasks videomme,mvbench --log_samples "
        f"--output_path out/{arm} --include_path mine --limit 5"
        for arm, frames in (("unpruned", 64), ("downsampled", 40), ("pruned", 64))
    ]


def metric(kind: str, is_right: bool) -> dict[str, Any]:
    """What four tasks of lmms-eval 0.7.3 log of an answer."""
    guess = "B" if is_right else "C"
    metrics: dict[str, dict[str, Any]] = {
        "videomme": {
            "videomme_perception_score": {
                **{"question_id": "001-1", "duration": "short", "pred_answer": guess},
                **{"answer": "B", "score": float(is_right), "videoID": "x"},
            }
        },
        "mvbench_moving_count": {
            "mvbench_accuracy": {"pred_answer": f"({guess}", "gt_answer": "B", "score": is_right}
        },
        "longvideobench_val_v": {
            "lvb_acc": {"id": "x_0", "duration_group": 15, "answer": "B", "parsed_pred": guess},
            "submission": {"x_0": guess},
        },
        "mlvu_dev": {
            "mlvu_percetion_score": {"task_type": "ego", "pred_answer": guess, "answer": "B"}
        },
    }
    return metrics[kind]


def write_log(folder: Path, kind: str, right: str, date: str = "20261123_214707", **more: Any):
    """A log of lmms-eval; `right` has a 1 for each right answer, else 0."""
    path = folder / "served" / f"{date}_samples_{kind}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            **{"doc_id": number, "target": "B", "filtered_resps": "B\u2028.", "doc_hash": "74"},
            **{"token_counts": [{"input_tokens": 288, "output_tokens": 2}]},
            **metric(kind, character == "1"),
            **{"input": f"question {number}", **more},
        }
        for number, character in enumerate(right)
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = script.main(["some/model", "--output", str(folder), "--compare"])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ("videomme", "mvbench_moving_count", "longvideobench_val_v", "mlvu_dev")
    for kind in tasks:
        write_log(tmp_path / "unpruned", kind, "1110")
        write_log(tmp_path / "pruned", kind, "1101")
        write_log(tmp_path / "downsampled", kind, "1111", "20261122_000000")  # an older run
        fewer = [{"input_tokens": 144, "output_tokens": 2}]
        write_log(tmp_path / "downsampled", kind, "1000", token_counts=fewer)
    status, text = compared(tmp_path, capsys)
    cells = {" ".join(line.split()) for line in text.splitlines()}
    assert status == 0
    for kind in tasks:
        assert f"{kind} unpruned 4 75.0 % 288" in cells
        assert f"{kind} pruned 4 75.0 % 1 1 1 288" in cells
        assert f"{kind} downsampled 4 25.0 % 2 0 0.5 144" in cells
    assert "all pruned 16 75.0 % 4 4 1 288" in cells
    assert "all downsampled 16 25.0 % 8 0 0.00781 144" in cells


def test_logs_that_cannot_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arm in script.ARMS:
        write_log(tmp_path / arm, "mlvu_dev", "10")
    assert compared(tmp_path, capsys)[0] == 0
    failure = "[LMMS_EVAL_REQUEST_FAILED after 5 retries] Error code: 400"
    pruned = tmp_path / "pruned"
    for breakage, message in (
        (lambda: write_log(pruned, "mlvu_dev", "10", filtered_resps=failure), "Error code: 400"),
        (lambda: write_log(pruned, "mlvu_dev", "1"), "the same questions"),
        (lambda: write_log(pruned, "mlvu_dev", "10", input="another"), "the same questions"),
        (lambda: write_log(pruned, "mlvu_dev", "10", mlvu_percetion_score=3), "right or wrong"),
        (lambda: shutil.rmtree(pruned), "lmms-eval failed"),
    ):
        breakage()
        status, text = compared(tmp_path, capsys)
        assert status == 1 and message in text


@pytest.fixture(scope="module")
def command(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The script's arguments for the fake task, whose videos and surroundings are there."""
    hf_home = tmp_path_factory.mktemp("hf")
    (hf_home / "toy_video").mkdir()
    for seed in range(2):  # eight frames a second: the default loader would take every fourth
        frames = render_frames(seed, NUM_FRAMES, 112, 112)
        write_mp4(hf_home / "toy_video" / f"clip{seed}.mp4", frames, 8)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [str(tiny_checkpoint), "--output", str(hf_home / "out"), "--port", f"{port}"]
    words += ["--prune-layer", f"{PRUNE_LAYER}", "--retention-ratio", f"{RATIO}"]
    words += ["--num-frames", f"{NUM_FRAMES}", "--tasks", "toy_video", "--num-concurrent", "2"]
    words += ["--include-path", str(TASKS), "--lmms-eval", LMMS_EVAL or "lmms-eval"]
    words += ["--dtype", "float32", "--enforce-eager", "--block-size", "32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(hf_home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_NO_USAGE_STATS", "1")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", os.getenv("VLLM_CPU_KVCACHE_SPACE", "1"))
        yield words


def payload(doc: dict[str, str], num_frames: int, **xargs: float) -> dict[str, Any]:
    """The request that models/chat/openai.py of lmms-eval 0.7.3 makes; `xargs` are ours."""
    (video,) = task.doc_to_visual(doc)
    content = [
        {"type": "video_url", "video_url": {"url": f"file://{video}"}},
        {"type": "text", "text": task.doc_to_text(doc)},
    ]
    extra: dict[str, Any] = {"media_io_kwargs": {"video": {"num_frames": num_frames}}}
    return {
        **{"messages": [{"role": "user", "content": content}], "model": "served"},
        **{"max_tokens": 8, "temperature": 0},
        "extra_body": extra | ({"vllm_xargs": xargs} if xargs else {}),
    }


@pytest.fixture(scope="module")
def answers(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Replies of the script's pruned server to every question, and the records of what it kept."""
    records = tmp_path_factory.mktemp("records")
    args = script.parse_arguments([*command, "--record-dir", str(records)])
    pruned = script.build_arms(args, script.count_layers(args.model))[-1]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{args.port}/v1", api_key="none")
    kinds = {
        "pruned": {"num_frames": NUM_FRAMES},
        "unpruned": {"num_frames": NUM_FRAMES, "dpp_retention_ratio": 1},
        "downsampled": {"num_frames": NUM_FRAMES // 2, "dpp_retention_ratio": 1},
        "recorded": {"num_frames": NUM_FRAMES, "dpp_record": 1},
    }
    with script.serving(pruned.server, args.port, records / "log.txt"):
        replies: dict[str, list[Any]] = {
            kind: [client.chat.completions.create(**payload(doc, **given)) for doc in QUESTIONS]
            for kind, given in kinds.items()
        }
    replies["records"] = [json.loads(path.read_text()) for path in records.glob("*.blocks.json")]
    return replies


def texts(replies: list[Any]) -> list[str]:
    return [reply.choices[0].message.content for reply in replies]


@pytest.mark.slow
@pytest.mark.e2e
def test_requests_of_lmms_eval_are_pruned(answers: dict[str, list[Any]]) -> None:
    all_tokens = NUM_FRAMES // 2 * TOKENS_A_SLICE
    for long, short in zip(answers["unpruned"], answers["downsampled"], strict=True):
        assert long.usage.prompt_tokens - short.usage.prompt_tokens == all_tokens // 2
    assert len(answers["records"]) == len(QUESTIONS)
    for record in answers["records"]:
        assert record["num_video_tokens"] == all_tokens
        assert record["num_pruned_tokens"] >= (1 - RATIO) * all_tokens - 32  # whole blocks
    assert texts(answers["pruned"]) == texts(answers["recorded"]) != texts(answers["unpruned"])


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.skipif(LMMS_EVAL is None, reason="lmms-eval is not installed (LMMS_EVAL: its path)")
def test_lmms_eval_itself(
    command: list[str], answers: dict[str, list[Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert script.main([*command, "--run"]) == 0
    table = capfd.readouterr().out.splitlines()[-3:]
    assert [line.split()[:3] for line in table] == [["all", arm, "4"] for arm in script.ARMS]
    for arm in script.ARMS:
        logged = script.read_samples(Path(command[2]) / arm)
        said = [logged["toy_video", number]["filtered_resps"] for number in range(len(QUESTIONS))]
        assert [text.strip() for text in said] == [text.strip() for text in texts(answers[arm])]
        tokens = [script.prompt_tokens(sample) for sample in logged.values()]
        assert sorted(tokens) == sorted(reply.usage.prompt_tokens for reply in answers[arm])
