"""Qwen3-Omni behind a real server: mp4 files over HTTP, both stages."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.server import Server, serve
from tests.e2e.test_qwen3_vl_server import STAGES, check_chat
from tests.e2e.test_server import FPS
from tests.engines.judge import Judge
from vllm_dpp.toy.checkpoint import CheckpointSpec, make_checkpoint
from vllm_dpp.toy.video import render_frames, write_mp4

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = CheckpointSpec(architecture="qwen3_omni_moe")
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "omni", spec)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of frames that the processor leaves as large as they are."""
    path = tmp_path_factory.mktemp("media") / "clip.mp4"
    return write_mp4(path, render_frames(5, 6, 352, 416), FPS)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = ["--max-model-len", "2048", "--max-num-seqs", "8", "--dtype", "float32"]
    arguments += ["--max-num-batched-tokens", "384", "--enforce-eager"]
    with serve(checkpoint, tmp_path_factory.mktemp("server") / "log.txt", arguments) as started:
        yield started


def test_chats_are_the_references_cold_and_warm(
    server: Server, checkpoint: Path, clip: Path
) -> None:
    judge = Judge(checkpoint)
    for xargs, entering, kept in STAGES.values():
        check_chat(server, judge, clip, xargs, entering, kept)
