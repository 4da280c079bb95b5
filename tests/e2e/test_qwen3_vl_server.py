"""Qwen3-VL behind a real server: mp4 files over HTTP, and what it cannot do yet."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.server import Server, serve
from tests.e2e.test_server import FPS, MAX_TOKENS, ask, openai_messages, part, words
from tests.engines.judge import Judge
from tests.engines.traffic import Answer
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.toy.checkpoint import TINY_QWEN3, make_checkpoint
from vllm_dpp.toy.video import as_data_url, render_frames, write_mp4

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

SETTINGS = ServingSettings(prune_layer=3, retention_ratio=0.25)
BLOCK_SIZE = 128  # vLLM's own choice on a CPU
QUESTION, LATER = "What moves?", "And then?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "qwen3", TINY_QWEN3)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 frames of 7 x 7 tokens a slice, and as many times told."""
    path = tmp_path_factory.mktemp("media") / "clip.mp4"
    return write_mp4(path, render_frames(0, 16, 224, 224), FPS)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = ["--max-model-len", "2048", "--max-num-seqs", "8", "--dtype", "float32"]
    arguments += ["--max-num-batched-tokens", "384", "--enforce-eager"]
    with serve(checkpoint, tmp_path_factory.mktemp("server") / "log.txt", arguments) as started:
        yield started


def test_a_chat_is_the_references_cold_and_warm(
    server: Server, checkpoint: Path, clip: Path
) -> None:
    judge, answer = Judge(checkpoint), "A disc."
    first = [{"role": "user", "content": [part(clip), words(QUESTION)]}]
    then = [
        {"role": "assistant", "content": answer},
        {"role": "user", "content": [words(LATER)]},
    ]
    url = as_data_url(clip)
    turns = {
        "one turn": (first, [(url, QUESTION, None)]),
        "two turns": ([*first, *then], [(url, QUESTION, answer), ("", LATER, None)]),
    }
    for ratio in (0.25, 1.0):
        for name, (messages, asked) in turns.items():
            judge.add(name, messages)
            keep = judge.keep(name, ratio, SETTINGS.split_layer, SETTINGS, BLOCK_SIZE)
            assert (len(keep[0]) < judge.prompts[name].videos[0].length) == (ratio < 1)
            for _ in range(2):
                xargs = {"dpp_retention_ratio": ratio}
                tokens = ask(server, openai_messages(asked), vllm_xargs=xargs)
                assert len(tokens) == MAX_TOKENS
                found = Answer(tokens=tokens, prompt_token_ids=judge.prompts[name].token_ids)
                judge.difference(found, name, SETTINGS.split_layer, keep)


@pytest.mark.parametrize("xargs", [{"dpp_video_share": 0.4}, {"dpp_entry_ratio": 0.5}], ids=str)
def test_videos_that_would_enter_in_part_are_refused(
    server: Server, clip: Path, xargs: dict[str, float]
) -> None:
    messages = openai_messages([(as_data_url(clip), QUESTION, None)])
    with pytest.raises(openai.BadRequestError, match="enter the decoder as a whole"):
        ask(server, messages, vllm_xargs=xargs)
