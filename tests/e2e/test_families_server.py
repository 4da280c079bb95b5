"""Families that vLLM itself cannot prune, behind a real server: mp4 files, both stages."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.server import Server, serve
from tests.e2e.test_qwen3_vl_server import STAGES, check_chat
from tests.e2e.test_server import FPS
from tests.engines.judge import Judge
from vllm_dpp.toy.checkpoint import make_checkpoint
from vllm_dpp.toy.spec import Architecture, CheckpointSpec
from vllm_dpp.toy.video import render_frames, write_mp4

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

OMNI: Architecture = "qwen3_omni_moe"


@pytest.fixture(scope="module", params=["internvl", "glm4v", "llava_onevision", OMNI])
def family(request: pytest.FixtureRequest) -> Architecture:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family: Architecture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = CheckpointSpec(architecture=family)
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / family, spec)


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    arguments = ["--max-model-len", "2048", "--max-num-seqs", "8", "--dtype", "float32"]
    arguments += ["--max-num-batched-tokens", "384", "--enforce-eager"]
    with serve(checkpoint, tmp_path_factory.mktemp("server") / "log.txt", arguments) as started:
        yield started


def test_chats_are_the_references_cold_and_warm(
    server: Server, family: Architecture, checkpoint: Path, tmp_path: Path
) -> None:
    judge = Judge(checkpoint)
    size = (6, 352, 416) if family == OMNI else (16, 224, 224)  # it makes small frames large
    clip = write_mp4(tmp_path / "clip.mp4", render_frames(5, *size), FPS)
    for xargs, entering, kept in STAGES.values():
        check_chat(server, judge, clip, xargs, entering, kept)
