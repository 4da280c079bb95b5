"""Qwen3-VL behind a real server with two front ends: mp4 files over HTTP, both stages."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.server import Server, serve
from tests.e2e.test_server import FPS, MAX_TOKENS, ask, openai_messages, part, words
from tests.engines.judge import Judge
from tests.engines.traffic import Answer
from vllm_dpp.pruning.budget import num_kept
from vllm_dpp.serve_command import DEFAULT_SHARE
from vllm_dpp.serving.cost_model import two_stage_ratios
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.toy.checkpoint import make_checkpoint
from vllm_dpp.toy.spec import TINY_QWEN3
from vllm_dpp.toy.video import as_data_url, render_frames, write_mp4

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

SETTINGS = ServingSettings(prune_layer=3)
BLOCK_SIZE = 128  # vLLM's own choice on a CPU
TOKENS = 8 * 7 * 7  # of a clip
QUESTION, LATER = "What moves?", "And then?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "qwen3", TINY_QWEN3)


@pytest.fixture(scope="module")
def judge(checkpoint: Path) -> Judge:
    return Judge(checkpoint)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 frames of 7 x 7 tokens a slice, and as many times told."""
    path = tmp_path_factory.mktemp("media") / "clip.mp4"
    return write_mp4(path, render_frames(0, 16, 224, 224), FPS)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = ["--max-model-len", "2048", "--max-num-seqs", "8", "--dtype", "float32"]
    arguments += ["--max-num-batched-tokens", "384", "--enforce-eager", "--api-server-count", "2"]
    with serve(checkpoint, tmp_path_factory.mktemp("server") / "log.txt", arguments) as started:
        yield started


def test_two_engines_share_the_requests(
    checkpoint: Path, judge: Judge, clip: Path, tmp_path: Path
) -> None:
    arguments = ["--max-model-len", "2048", "--dtype", "float32", "--enforce-eager"]
    arguments += ["--data-parallel-size", "2"]
    xargs, entering, kept = STAGES["both"]
    with serve(checkpoint, tmp_path / "log.txt", arguments) as server:
        check_chat(server, judge, clip, xargs, entering, kept)
        before = server.counts()
        messages = openai_messages([(as_data_url(clip), QUESTION, None)])
        with ThreadPoolExecutor(8) as pool:
            answers = list(
                pool.map(lambda _: ask(server, messages, max_tokens=64, vllm_xargs=xargs), range(8))
            )
        assert len({*answers}) == 1
        server.counted(before, 8 * TOKENS)
        for engine in ("0", "1"):
            assert server.metric("vllm_dpp_video_tokens_total", f'engine="{engine}"') > 0


STAGES: dict[str, tuple[dict[str, float], float, float]] = {
    "default": ({}, *two_stage_ratios(DEFAULT_SHARE, 3, TINY_QWEN3.num_layers)),
    "both": ({"dpp_video_share": 0.2}, *two_stage_ratios(0.2, 3, TINY_QWEN3.num_layers)),
    "the middle alone": ({"dpp_entry_ratio": 1, "dpp_retention_ratio": 0.25}, 1.0, 0.25),
    "neither": ({"dpp_video_share": 1}, 1.0, 1.0),
}
"""What a request asks for, and what enters and is kept of it."""


@pytest.mark.parametrize("stages", STAGES)
def test_a_chat_is_the_references_cold_and_warm(
    server: Server, judge: Judge, clip: Path, stages: str
) -> None:
    xargs, entering, kept = STAGES[stages]
    check_chat(server, judge, clip, xargs, entering, kept)


def check_chat(
    server: Server, judge: Judge, clip: Path, xargs: dict[str, float], entering: float, kept: float
) -> None:
    """Two turns about a clip, each cold and warm, of which so much enters and of that is kept."""
    stages = str(xargs)
    answer, url = "A disc.", as_data_url(clip)
    first = [{"role": "user", "content": [part(clip), words(QUESTION)]}]
    then = [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": [words(LATER)]},
    ]
    turns = {
        "one turn": (first, [(url, QUESTION, None)]),
        "two turns": ([*first, *then], [(url, QUESTION, answer), ("", LATER, None)]),
    }
    for name, (messages, asked) in turns.items():
        judge.add(name, messages)
        judge.enter(stages, name, entering, SETTINGS.entry_config)
        assert (judge.prompts[stages].videos[0].entered is None) == (entering == 1)
        settings = SETTINGS
        if "dpp_retention_ratio" not in xargs and xargs.get("dpp_video_share", 1) > 0.2:
            settings = replace(SETTINGS, relevance="none")
        keep = judge.keep(stages, kept, settings.split_layer, settings, BLOCK_SIZE)
        for _ in range(2):
            tokens = ask(server, openai_messages(asked), vllm_xargs=xargs)
            assert len(tokens) == MAX_TOKENS
            found = Answer(tokens=tokens, prompt_token_ids=judge.prompts[stages].sent_token_ids)
            judge.difference(found, stages, SETTINGS.split_layer, keep)


def test_several_videos_a_request_from_many_clients(
    server: Server, judge: Judge, clip: Path, tmp_path: Path
) -> None:
    """Videos that share a step, a cache and a buffer; each answer is that of the request alone."""
    clips = [clip]
    for seed, (frames, side) in enumerate([(12, 224), (8, 160), (20, 192)], start=1):
        path = tmp_path / f"{seed}.mp4"
        clips.append(write_mp4(path, render_frames(seed, frames, side, side), FPS))
    asked = [(i % 4, (i + 1 + i // 4) % 4, (DEFAULT_SHARE, 0.2, 1)[i % 3]) for i in range(12)]
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")

    def answer(one: tuple[int, int, float]) -> str:
        first, second, share = one
        content: list[Any] = [
            {"type": "video_url", "video_url": {"url": as_data_url(clips[i])}}
            for i in (first, second)
        ]
        reply = client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": [*content, words(QUESTION)]}],
            max_tokens=MAX_TOKENS,
            temperature=0,
            extra_body={"vllm_xargs": {"dpp_video_share": share}, "ignore_eos": True},
        )
        return reply.choices[0].message.content or ""

    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(answer, asked))
    assert together == [answer(one) for one in asked]
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_metrics_of_two_front_ends_are_one(server: Server, tmp_path: Path) -> None:
    clip = write_mp4(tmp_path / "new.mp4", render_frames(71, 16, 224, 224), FPS)
    messages = openai_messages([(as_data_url(clip), QUESTION, None)])
    before, refused = server.counts(), server.metric("vllm_dpp_refused_requests_total")
    for _ in range(4):
        ask(server, messages, vllm_xargs={"dpp_video_share": 0.2})
        body = {"model": server.model, "messages": messages, "vllm_xargs": {"dpp_ratio": 1}}
        assert server.post("/v1/chat/completions", body)[0] == 400
    found = server.counted(before, 4 * TOKENS)
    entering, _ = two_stage_ratios(0.2, 3, TINY_QWEN3.num_layers)
    assert found['stage="seen"'] == 4 * TOKENS
    assert found['stage="entered"'] == 4 * num_kept(TOKENS, entering)
    assert found["vllm_dpp_cached_videos_total"] == 3 and found['part="entry"'] == 1
    assert server.metric("vllm_dpp_refused_requests_total") == refused + 4
