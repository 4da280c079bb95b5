"""One configuration for all shapes."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.config import VllmConfig

from tests.serving.scheduling.build import base_config


@pytest.fixture(scope="session")
def base(tiny_checkpoint: Path) -> Iterator[VllmConfig]:
    config = base_config(tiny_checkpoint)
    logging.disable(logging.ERROR)  # a line for every scheduler that is built
    yield config
    logging.disable(logging.NOTSET)
