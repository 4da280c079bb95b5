from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.reference import Prompt, Reference
from tests.reference.chats import CHATS
from vllm_dpp.toy.checkpoint import make_checkpoint


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are small: on busy cores, threads make these tests ten times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("reference") / "checkpoint")


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@pytest.fixture(scope="session")
def chat(reference: Reference) -> Callable[[str], Prompt]:
    """The prompt of one of `CHATS` by its name."""
    return lambda name: reference.from_messages(CHATS[name])
