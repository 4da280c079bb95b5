"""Engines and their judge, one of each for a whole test session."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engines.host import EngineHost, engine_host
from tests.engines.judge import Judge


@pytest.fixture(scope="session")
def judge(tiny_checkpoint: Path) -> Iterator[Judge]:
    """The reference. One thread: an engine process wants the other core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Judge(tiny_checkpoint)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["v1", "v2"])
def host(request: pytest.FixtureRequest) -> Iterator[EngineHost]:
    """An engine process on each of vLLM's two model runners."""
    with engine_host(request.param) as started:
        yield started
