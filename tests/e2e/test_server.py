"""Chat about real mp4 files with a real server over HTTP; the reference judges every answer."""

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openai
import pytest

from tests.e2e.server import Server, serve
from tests.engines.judge import Judge
from tests.engines.traffic import Answer
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.toy.video import as_data_url, render_frames, write_mp4

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

SETTINGS = ServingSettings(prune_layer=2, retention_ratio=0.25)
BLOCK_SIZE = 32
STEP_BUDGET = 512
FPS = 2.0  # the server samples two frames a second: all of them
QUESTION = "What moves?"
MAX_TOKENS = 6


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of videos: three good ones, one too long for a step, one that is no video."""
    folder = tmp_path_factory.mktemp("media")
    for seed in range(3):
        write_mp4(folder / f"clip{seed}.mp4", render_frames(seed, 16, 112, 112), FPS)
    write_mp4(folder / "long.mp4", render_frames(9, 80, 112, 112), FPS)
    (folder / "broken.mp4").write_bytes((folder / "clip0.mp4").read_bytes()[:300])
    return folder


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, media: Path, tmp_path_factory: Any) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    arguments = [
        *("--prune-layer", str(SETTINGS.prune_layer)),
        *("--retention-ratio", str(SETTINGS.retention_ratio)),
        *("--max-num-batched-tokens", str(STEP_BUDGET)),
        *("--block-size", str(BLOCK_SIZE)),
        *("--max-model-len", "2048"),
        *("--max-num-seqs", "16"),
        *("--dtype", "float32"),
        *("--allowed-local-media-path", str(media)),
        "--enforce-eager",
    ]
    with serve(tiny_checkpoint, folder / "log.txt", arguments) as started:
        yield started


def decoded(path: Path) -> np.ndarray:
    """[T, H, W, 3] uint8 frames as any reader of the mp4 sees them, after the codec."""
    capture, frames = cv2.VideoCapture(str(path)), []
    while True:
        good, frame = capture.read()
        if not good:
            return np.stack(frames)
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))


def openai_messages(turns: list[tuple[str, str, str | None]]) -> list[dict[str, Any]]:
    """(video URL, question, answer) turns in the API's format; the last answer is ``None``."""
    messages: list[dict[str, Any]] = []
    for url, question, answer in turns:
        video = [{"type": "video_url", "video_url": {"url": url}}] if url else []
        messages.append({"role": "user", "content": [*video, {"type": "text", "text": question}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages


def ask(server: Server, messages: list[dict[str, Any]], stream: bool = False, **extra: Any):
    """Greedy tokens and the HTTP client's view of the answer."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    body = {"return_token_ids": True, "ignore_eos": True, **extra}
    reply = client.chat.completions.create(
        model=server.model,
        messages=messages,
        max_tokens=MAX_TOKENS,
        temperature=0,
        stream=stream,
        extra_body=body,
    )
    if not stream:
        return tuple(reply.choices[0].token_ids)
    return tuple(
        token
        for chunk in reply
        for choice in chunk.choices
        for token in getattr(choice, "token_ids", None) or ()
    )


def judged(judge: Judge, name: str, messages: list[dict[str, Any]], ratio: float):
    """A check that tokens are what the reference says to this chat."""
    judge.add(name, messages)
    keep = judge.keep(name, ratio, SETTINGS.prune_layer, SETTINGS, BLOCK_SIZE)
    prompt = judge.prompts[name].token_ids

    def check(tokens: tuple[int, ...]) -> None:
        assert len(tokens) == MAX_TOKENS
        answer = Answer(tokens=tokens, prompt_token_ids=prompt)
        judge.difference(answer, name, SETTINGS.split_layer, keep)

    return check


def part(path: Path) -> dict[str, Any]:
    return {"type": "video", "video": decoded(path), "fps": FPS}


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@pytest.fixture(scope="module")
def one_turn(judge: Judge, media: Path):
    """A check for each clip at each of two ratios."""
    return {
        (seed, ratio): judged(
            judge,
            f"clip{seed} {ratio}",
            [{"role": "user", "content": [part(media / f"clip{seed}.mp4"), words(QUESTION)]}],
            ratio,
        )
        for seed in range(3)
        for ratio in (0.25, 1.0)
    }


def test_data_url_file_url_and_streaming(server: Server, media: Path, one_turn: Any) -> None:
    clip = media / "clip0.mp4"
    for url in (as_data_url(clip), clip.as_uri()):
        for stream in (False, True):
            tokens = ask(server, openai_messages([(url, QUESTION, None)]), stream)
            one_turn[0, 0.25](tokens)


def test_ratio_one_is_unpruned(server: Server, media: Path, one_turn: Any) -> None:
    messages = openai_messages([(as_data_url(media / "clip0.mp4"), QUESTION, None)])
    one_turn[0, 1.0](ask(server, messages, vllm_xargs={"dpp_retention_ratio": 1}))


@pytest.mark.parametrize("second", ["", "clip1.mp4"], ids=["same video", "another video"])
def test_two_turns(server: Server, judge: Judge, media: Path, second: str) -> None:
    clip, answer, question = media / "clip0.mp4", "A disc.", "And then?"
    videos = [part(media / second)] if second else []
    check = judged(
        judge,
        f"two turns {second}",
        [
            {"role": "user", "content": [part(clip), words(QUESTION)]},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": [*videos, words(question)]},
        ],
        0.25,
    )
    url = as_data_url(media / second) if second else ""
    turns = [(as_data_url(clip), QUESTION, answer), (url, question, None)]
    check(ask(server, openai_messages(turns)))


def test_sixteen_clients_at_once(server: Server, media: Path, one_turn: Any) -> None:
    def client(i: int) -> None:
        seed, ratio = i % 3, (0.25, 1.0)[i % 2]
        messages = openai_messages([(as_data_url(media / f"clip{seed}.mp4"), QUESTION, None)])
        args = {"dpp_retention_ratio": ratio}
        one_turn[seed, ratio](ask(server, messages, stream=i % 4 == 0, vllm_xargs=args))

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(client, range(32)))


BAD_ARGUMENTS = {
    "ratio above one": ({"dpp_retention_ratio": 1.5}, "(0, 1]"),
    "ratio zero": ({"dpp_retention_ratio": 0}, "(0, 1]"),
    "ratio as text": ({"dpp_retention_ratio": "half"}, "(0, 1]"),
    "ratio below the server's": ({"dpp_retention_ratio": 0.001}, "min_retention_ratio"),
    "misspelt": ({"dpp_retention": 0.5}, "dpp_retention_ratio"),
    "record without a folder": ({"dpp_record": 1}, "record_dir"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_get_400(server: Server, media: Path, case: str) -> None:
    args, remedy = BAD_ARGUMENTS[case]
    messages = openai_messages([(as_data_url(media / "clip0.mp4"), QUESTION, None)])
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, messages, vllm_xargs=args)
    assert refused.value.status_code == 400 and remedy in str(refused.value)


def test_bad_arguments_of_a_text_request_get_400(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="dpp_retention_ratio"):
        ask(server, openai_messages([("", "Hello", None)]), vllm_xargs={"dpp_retention": 1})


def test_prompt_logprobs_of_a_pruned_request_get_400(server: Server, media: Path) -> None:
    messages = openai_messages([(as_data_url(media / "clip0.mp4"), QUESTION, None)])
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs"):
        ask(server, messages, prompt_logprobs=1)
    unpruned = ask(server, messages, prompt_logprobs=1, vllm_xargs={"dpp_retention_ratio": 1})
    assert len(unpruned) == MAX_TOKENS


def test_a_video_too_long_for_a_step_gets_400_and_runs_unpruned(
    server: Server, media: Path
) -> None:
    messages = openai_messages([(as_data_url(media / "long.mp4"), QUESTION, None)])
    with pytest.raises(openai.BadRequestError, match="--max-num-batched-tokens"):
        ask(server, messages)
    assert len(ask(server, messages, vllm_xargs={"dpp_retention_ratio": 1})) == MAX_TOKENS


def test_a_refused_video_can_be_sent_again(server: Server, media: Path, one_turn: Any) -> None:
    """The front end must not believe that the engine has media which it never passed on."""
    fresh = write_mp4(media / "fresh.mp4", render_frames(7, 16, 112, 112), FPS)
    messages = openai_messages([(as_data_url(fresh), QUESTION, None)])
    with pytest.raises(openai.BadRequestError):
        ask(server, messages, vllm_xargs={"dpp_retention_ratio": 7})
    assert len(ask(server, messages)) == MAX_TOKENS


def test_broken_videos_hurt_nobody(server: Server, media: Path, one_turn: Any) -> None:
    nonsense = base64.b64encode(b"this is not a video").decode()
    for url in (as_data_url(media / "broken.mp4"), f"data:video/mp4;base64,{nonsense}"):
        with pytest.raises(openai.APIStatusError) as refused:
            ask(server, openai_messages([(url, QUESTION, None)]))
        assert 400 <= refused.value.status_code < 600
    messages = openai_messages([(as_data_url(media / "clip1.mp4"), QUESTION, None)])
    one_turn[1, 0.25](ask(server, messages))


def test_afterwards_the_server_lives_and_holds_no_blocks(server: Server) -> None:
    assert server.is_healthy()
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:num_requests_waiting") == 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0
