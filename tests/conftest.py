"""Fixtures that more than one folder of tests needs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engines.judge import Judge
from vllm_dpp.toy.checkpoint import make_checkpoint
from vllm_dpp.toy.spec import TINY


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stress-requests", type=int, default=70, help="of each run of tests/serving/test_stress"
    )
    parser.addoption(
        "--family", metavar="NAME", help="of tests/serving/test_families.py: all of it"
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen2.5-VL: 6 layers, hidden size 256, float32."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", TINY)


@pytest.fixture(scope="session")
def judge(tiny_checkpoint: Path) -> Iterator[Judge]:
    """The reference. One thread: an engine process wants the other core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Judge(tiny_checkpoint)
    torch.set_num_threads(threads)
