"""Chat about real mp4 files with a real server over HTTP; the reference judges every answer."""

import base64
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openai
import pytest

from tests.e2e.server import Server, serve
from tests.engines.judge import Judge
from tests.engines.traffic import Answer
from vllm_dpp.serving.cost_model import MOST_BY_QUESTION
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.toy.spec import TINY
from vllm_dpp.toy.video import as_data_url, render_frames, write_mp4

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

SETTINGS = ServingSettings(prune_layer=2, retention_ratio=0.25, max_deferred_tokens=600)
BLOCK_SIZE = 128  # vLLM's own choice on a CPU
STEP_BUDGET = 384  # a clip takes two steps
CLIP_SIZE = 224  # 512 tokens
CACHED_CLIPS = 4
CLIP_BYTES = 512 * 4 * 1176 + 2**12  # of a clip's patches in the media cache, and a little
FPS = 2.0  # the server samples two frames a second: all of them
QUESTION = "What moves?"
MAX_TOKENS = 6
KV_BYTES_OF_LAYER = 2 * TINY.num_kv_heads * TINY.head_dim * 4
MEDIA_CACHE_MISS = "Multi-modal cache miss for request"


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of videos: good ones, one too long for the buffer, one that is no video."""
    folder = tmp_path_factory.mktemp("media")
    for seed in range(3):
        write_mp4(folder / f"clip{seed}.mp4", render_frames(seed, 16, CLIP_SIZE, CLIP_SIZE), FPS)
    write_mp4(folder / "long.mp4", render_frames(9, 24, CLIP_SIZE, CLIP_SIZE), FPS)
    (folder / "broken.mp4").write_bytes((folder / "clip0.mp4").read_bytes()[:300])
    return folder


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, media: Path, tmp_path_factory: Any) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    arguments = [
        *("--prune-layer", str(SETTINGS.prune_layer)),
        *("--retention-ratio", str(SETTINGS.retention_ratio)),
        *("--max-deferred-tokens", str(SETTINGS.max_deferred_tokens)),
        *("--max-num-batched-tokens", str(STEP_BUDGET)),
        *("--mm-processor-cache-gb", str(CACHED_CLIPS * CLIP_BYTES / 2**30)),
        *("--max-model-len", "2048"),
        *("--max-num-seqs", "16"),
        *("--dtype", "float32"),
        *("--allowed-local-media-path", str(media)),
        "--enforce-eager",
        "--enable-scale-out",
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


def ask(
    server: Server,
    messages: list[dict[str, Any]],
    stream: bool = False,
    retries: int = 0,
    **extra: Any,
):
    """Greedy tokens and the HTTP client's view of the answer."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=retries)
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


def test_it_says_what_large_blocks_mean_for_short_videos(server: Server) -> None:
    log = server.log.read_text()
    assert "KV blocks have 128 tokens" in log and "fewer than 298 tokens enter" in log


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


@pytest.mark.parametrize(
    ("xargs", "entering", "kept"),
    [
        ({"dpp_entry_ratio": 0.5}, 0.5, 0.25),
        ({"dpp_entry_ratio": 0.5, "dpp_retention_ratio": 1}, 0.5, 1.0),
        ({"dpp_video_share": 0.2}, 0.36, 1 / 3),  # K = 2 of 6 layers: 0.36 (1/3 + 2/3 1/3)
        ({"dpp_video_share": 0.4}, 0.72, 1 / 3),
    ],
    ids=["both stages", "the first alone", "one number", "where no question is read"],
)
def test_what_enters_is_the_requests_choice(
    server: Server,
    judge: Judge,
    media: Path,
    xargs: dict[str, float],
    entering: float,
    kept: float,
) -> None:
    clip, name = media / "clip0.mp4", f"clip0 of which {entering} enters"
    judge.add("clip0 whole", [{"role": "user", "content": [part(clip), words(QUESTION)]}])
    judge.enter(name, "clip0 whole", entering, SETTINGS.entry_config)
    settings = SETTINGS
    if xargs.get("dpp_video_share", 0) > MOST_BY_QUESTION:
        settings = replace(SETTINGS, relevance="none")
    keep = judge.keep(name, kept, settings.split_layer, settings, BLOCK_SIZE)
    messages = openai_messages([(as_data_url(clip), QUESTION, None)])
    for _ in range(2):  # the second time from the cache
        tokens = ask(server, messages, vllm_xargs=xargs)
        answer = Answer(tokens=tokens, prompt_token_ids=judge.prompts[name].token_ids)
        judge.difference(answer, name, SETTINGS.split_layer, keep)


def test_sixteen_clients_at_once(server: Server, media: Path, one_turn: Any) -> None:
    """With the client's own retries: vLLM, stock too, answers some first requests about a video
    with 500 where another about the same video overtakes it, and counts on being asked again."""

    def client(i: int) -> None:
        seed, ratio = i % 3, (0.25, 1.0)[i % 2]
        messages = openai_messages([(as_data_url(media / f"clip{seed}.mp4"), QUESTION, None)])
        args = {"dpp_retention_ratio": ratio}
        one_turn[seed, ratio](
            ask(server, messages, i % 4 == 0, openai.DEFAULT_MAX_RETRIES, vllm_xargs=args)
        )

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(client, range(32)))
    log = server.log.read_text()
    assert log.count("failed with an internal error") == log.count(MEDIA_CACHE_MISS)


BAD_REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "ratio above one": ({"vllm_xargs": {"dpp_retention_ratio": 1.5}}, "(0, 1]"),
    "ratio zero": ({"vllm_xargs": {"dpp_retention_ratio": 0}}, "(0, 1]"),
    "ratio as text": ({"vllm_xargs": {"dpp_retention_ratio": "half"}}, "(0, 1]"),
    "ratio too low": ({"vllm_xargs": {"dpp_retention_ratio": 0.001}}, "--min-retention-ratio"),
    "misspelt": ({"vllm_xargs": {"dpp_retention": 0.5}}, "did you mean 'dpp_retention_ratio'"),
    "record without a folder": ({"vllm_xargs": {"dpp_record": 1}}, "--record-dir"),
    "entry ratio above one": ({"vllm_xargs": {"dpp_entry_ratio": 1.5}}, "(0, 1]"),
    "entry ratio to the processor": (
        {"mm_processor_kwargs": {"dpp_entry_ratio": 0}},
        "dpp_entry_ratio must be a number in (0, 1]",
    ),
    "two ratios for a stage": (
        {"vllm_xargs": {"dpp_video_share": 0.5, "dpp_retention_ratio": 0.5}},
        "leave those out, or it",
    ),
    "beams": ({"use_beam_search": True, "vllm_xargs": {"dpp_retention_ratio": 1}}, "beam search"),
    "echo": (
        {"echo": True, "vllm_xargs": {"dpp_retention_ratio": 0.25}},
        "dpp_retention_ratio=1",
    ),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests_get_400(server: Server, media: Path, case: str, stream: bool) -> None:
    extra, remedy = BAD_REQUESTS[case]
    messages = openai_messages([(as_data_url(media / "clip0.mp4"), QUESTION, None)])
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, messages, stream, **extra)
    assert refused.value.status_code == 400 and remedy in str(refused.value)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Hello"}),
        ("/v1/responses", {"input": "Hello"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "Hello"}]}),
        ("/v1/chat/completions/batch", {"messages": [[{"role": "user", "content": "Hello"}]]}),
    ],
)
def test_every_endpoint_checks_arguments(server: Server, path: str, body: dict[str, Any]) -> None:
    more = {"model": server.model, "max_tokens": 1, "vllm_xargs": {"dpp_retention": 1}}
    status, reply = server.post(path, body | more)
    assert status == 400 and "dpp_retention_ratio" in reply["error"]["message"]


def test_true_keeps_everything(server: Server, media: Path, one_turn: Any) -> None:
    """vLLM reads JSON ``true`` as 1 before a plugin sees it."""
    messages = openai_messages([(as_data_url(media / "clip0.mp4"), QUESTION, None)])
    one_turn[0, 1.0](ask(server, messages, vllm_xargs={"dpp_retention_ratio": True}))


def test_a_prompt_that_is_scored_keeps_its_video(
    server: Server, media: Path, one_turn: Any
) -> None:
    messages = openai_messages([(as_data_url(media / "clip0.mp4"), QUESTION, None)])
    one_turn[0, 1.0](ask(server, messages, prompt_logprobs=1))
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs"):
        ask(server, messages, prompt_logprobs=1, vllm_xargs={"dpp_retention_ratio": 0.25})


def test_beams_prune_as_the_server_does(server: Server, media: Path, one_turn: Any) -> None:
    messages = openai_messages([(as_data_url(media / "clip0.mp4"), QUESTION, None)])
    one_turn[0, 0.25](ask(server, messages, use_beam_search=True))


def test_several_answers_and_constrained_ones(
    server: Server, judge: Judge, media: Path, one_turn: Any
) -> None:
    messages = openai_messages([(as_data_url(media / "clip0.mp4"), QUESTION, None)])
    body = {"model": server.model, "messages": messages, "temperature": 0}
    status, reply = server.post(
        "/v1/chat/completions",
        body
        # The likeliest token, drawn: vLLM refuses several answers at temperature 0.
        | {"n": 3, "temperature": 1, "top_k": 1}
        | {"max_tokens": MAX_TOKENS, "ignore_eos": True, "return_token_ids": True},
    )
    assert status == 200 and len(reply["choices"]) == 3
    for choice in reply["choices"]:
        one_turn[0, 0.25](tuple(choice["token_ids"]))

    choices = ["red", "blue", "a disc"]
    status, reply = server.post(
        "/v1/chat/completions", body | {"structured_outputs": {"choice": choices}}
    )
    assert status == 200 and reply["choices"][0]["message"]["content"] in choices


def test_tokens_in_tokens_out(server: Server, media: Path, one_turn: Any) -> None:
    """``/inference/v1/generate`` takes prompts that another server has rendered."""
    messages = openai_messages([(as_data_url(media / "clip0.mp4"), QUESTION, None)])
    chat = {"model": server.model, "messages": messages}
    status, rendered = server.post("/v1/chat/completions/render", chat)
    assert status == 200

    def generate(**params: Any) -> tuple[int, dict[str, Any]]:
        common = {"max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
        body = rendered | {"sampling_params": common | params}
        return server.post("/inference/v1/generate", body)

    for args, ratio in (({}, 0.25), ({"dpp_retention_ratio": 1}, 1.0)):
        status, reply = generate(extra_args=args)
        assert status == 200
        one_turn[0, ratio](tuple(reply["choices"][0]["token_ids"]))
    for params, remedy in (
        (
            {"prompt_logprobs": 1, "extra_args": {"dpp_retention_ratio": 0.25}},
            "prompt_logprobs",
        ),
        ({"extra_args": {"dpp_retention_ratio": 0.001}}, "min_retention_ratio"),
        ({"extra_args": {"dpp_retention_ratio": True}}, "got True"),
    ):
        status, reply = generate(**params)
        assert status == 400 and remedy in reply["error"]["message"]


def test_metrics_tell_what_was_pruned(server: Server, tmp_path: Path) -> None:
    clip = write_mp4(tmp_path / "new.mp4", render_frames(70, 16, CLIP_SIZE, CLIP_SIZE), FPS)
    messages = openai_messages([(as_data_url(clip), QUESTION, None)])
    before = server.counts()
    ask(server, messages, vllm_xargs={"dpp_entry_ratio": 0.5})
    cold = server.counted(before, 512)
    assert (cold['stage="seen"'], cold['stage="entered"']) == (512, 256)
    kept = cold['stage="kept"']
    assert 64 <= kept < 64 + BLOCK_SIZE
    left_out = 256 * TINY.num_layers + (256 - kept) * (TINY.num_layers - SETTINGS.split_layer)
    assert cold["vllm_dpp_saved_kv_bytes_total"] == left_out * KV_BYTES_OF_LAYER
    assert cold["vllm_dpp_cached_videos_total"] == 0
    assert (cold['part="entry"'], cold['part="choice"']) == (1, 1) and cold['part="relevance"'] >= 1

    before = server.counts()
    ask(server, messages, vllm_xargs={"dpp_entry_ratio": 0.5})
    warm = server.counted(before, 512)
    assert warm['stage="kept"'] == kept and warm["vllm_dpp_cached_videos_total"] == 1
    assert not any(count for name, count in warm.items() if name.startswith("part="))


def test_metrics_tell_why_requests_were_refused(server: Server) -> None:
    refused = "vllm_dpp_refused_requests_total"
    for reason, xargs in {
        "min_retention_ratio": {"dpp_retention_ratio": 0.001},
        "record_dir": {"dpp_record": 1},
        "argument": {"dpp_ratio": 0.5},
    }.items():
        before = server.metric(refused, f'reason="{reason}"')
        body = {"model": server.model, "messages": openai_messages([("", QUESTION, None)])}
        assert server.post("/v1/chat/completions", body | {"vllm_xargs": xargs})[0] == 400
        assert server.metric(refused, f'reason="{reason}"') == before + 1


def test_metrics_are_those_of_the_documentation(server: Server) -> None:
    names = {re.split(r"[{ ]", line)[0] for line in server.metrics() if line.startswith("vllm_dpp")}
    found = {re.sub("_(bucket|sum|count)$", "", n) for n in names if not n.endswith("_created")}
    page = Path(__file__).parents[2] / "vllm_dpp" / "serving" / "README.md"
    assert found == set(re.findall(r"`(vllm_dpp_[a-z_]+)`", page.read_text()))


def test_a_video_too_long_for_the_buffer_gets_400_and_runs_unpruned(
    server: Server, media: Path
) -> None:
    messages = openai_messages([(as_data_url(media / "long.mp4"), QUESTION, None)])
    with pytest.raises(openai.BadRequestError, match="--max-deferred-tokens"):
        ask(server, messages)
    assert len(ask(server, messages, vllm_xargs={"dpp_retention_ratio": 1})) == MAX_TOKENS


def fresh_clips(folder: Path, count: int) -> list[str]:
    """URLs of clips that no other test sends."""
    seeds = range(zlib.crc32(bytes(folder)), zlib.crc32(bytes(folder)) + count)
    frames = {seed: render_frames(seed, 16, CLIP_SIZE, CLIP_SIZE) for seed in seeds}
    return [as_data_url(write_mp4(folder / f"{s}.mp4", f, FPS)) for s, f in frames.items()]


TOO_LONG = " ".join(["Why?"] * 100)
REFUSALS = {
    "early": (QUESTION, {"vllm_xargs": {"dpp_retention_ratio": 7}}),
    "late": (TOO_LONG, {}),  # known only when the media have been processed
}


@pytest.mark.parametrize("when", REFUSALS)
def test_a_refused_request_moves_no_cached_video(server: Server, tmp_path: Path, when: str) -> None:
    """Both halves of the media cache drop the same video when another one needs the room."""
    question, extra = REFUSALS[when]
    clips = fresh_clips(tmp_path, CACHED_CLIPS + 1)

    def good(url: str) -> None:
        assert len(ask(server, openai_messages([(url, QUESTION, None)]))) == MAX_TOKENS

    for url in clips[:-1]:
        good(url)
    with pytest.raises(openai.BadRequestError):
        ask(server, openai_messages([(clips[0], question, None)]), **extra)
    good(clips[-1])
    good(clips[0])


@pytest.mark.parametrize("when", REFUSALS)
def test_a_refused_video_may_be_shared(server: Server, tmp_path: Path, when: str) -> None:
    """Two requests at once bring a video that nobody has sent before; one of them is refused."""
    question, extra = REFUSALS[when]

    def status(url: str, question: str, extra: dict[str, Any]) -> int:
        messages = openai_messages([(url, question, None)])
        body = {"model": server.model, "messages": messages, "max_tokens": 1, **extra}
        return server.post("/v1/chat/completions", body)[0]

    with ThreadPoolExecutor(2) as pool:
        for url in fresh_clips(tmp_path, 6):
            refused = pool.submit(status, url, question, extra)
            good = pool.submit(status, url, QUESTION, {})
            assert (refused.result(), good.result()) == (400, 200)


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
