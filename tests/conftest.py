"""Fixtures that more than one folder of tests needs."""

from pathlib import Path

import pytest

from vllm_dpp.toy.checkpoint import TINY, make_checkpoint


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen2.5-VL: 6 layers, hidden size 256, float32."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", TINY)
