"""A server that leaves tokens out before the decoder alone: Qwen3.5, mp4 files over HTTP."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest

from tests.e2e.server import Server, serve
from tests.e2e.test_server import FPS
from vllm_dpp.toy.checkpoint import make_checkpoint
from vllm_dpp.toy.spec import CheckpointSpec
from vllm_dpp.toy.video import as_data_url, render_frames, write_mp4

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

TOKENS = 8 * 7 * 7  # of a clip
ENTERING = 157
"""40 % of them, the default."""
BYTES = 2 * 2 * 2 * 64 * 2  # of a token: two layers, keys and values of two heads of 64


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    spec = CheckpointSpec(architecture="qwen3_5", num_layers=8, dtype="bfloat16")
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "qwen3_5", spec)
    arguments = ["--max-model-len", "2048", "--max-num-seqs", "8", "--enforce-eager"]
    with serve(checkpoint, tmp_path_factory.mktemp("server") / "log.txt", arguments) as started:
        yield replace(started, entry_only=True)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("media")
    files = [
        write_mp4(folder / f"{seed}.mp4", render_frames(seed, 16, 224, 224), FPS)
        for seed in range(3)
    ]
    return [as_data_url(file) for file in files]


def ask(server: Server, clips: list[str], **xargs: Any) -> tuple[int, str]:
    """Tokens of the prompt, and the answer."""
    content: list[Any] = [{"type": "video_url", "video_url": {"url": clip}} for clip in clips]
    reply = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none").chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}],
        max_tokens=4,
        temperature=0,
        extra_body={"vllm_xargs": xargs},
    )
    assert reply.usage is not None
    return reply.usage.prompt_tokens, str(reply.choices[0].message.content)


def test_a_share_enters_and_is_counted(server: Server, clips: list[str]) -> None:
    whole, _ = ask(server, clips[1:], dpp_video_share=1)
    before = server.counts()
    default, answer = ask(server, clips[1:])
    assert default == whole - 2 * (TOKENS - ENTERING)
    assert ask(server, clips[1:])[1] == answer
    counted = server.counted(before, 2 * TOKENS)
    assert counted['stage="seen"'] == 2 * TOKENS, "what is cached is not encoded again"
    assert counted['stage="entered"'] == counted['stage="kept"'] == 2 * ENTERING
    assert counted["vllm_dpp_saved_kv_bytes_total"] == 2 * (TOKENS - ENTERING) * BYTES


def test_nothing_else_is_up_for_choice(server: Server, clips: list[str]) -> None:
    for name, value in (("dpp_retention_ratio", 0.5), ("dpp_rule", "uniform")):
        with pytest.raises(openai.BadRequestError, match="before the decoder alone"):
            ask(server, clips, **{name: value})
    assert ask(server, clips[:1], dpp_entry_ratio=0.2) < ask(server, clips[:1])
    assert server.is_healthy()
