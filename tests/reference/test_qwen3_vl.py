"""Text between slices, DeepStack and its own positions: still transformers' own forward pass."""

from pathlib import Path

import pytest
import torch

from tests.reference import Reference
from tests.reference.chats import CHATS
from tests.reference.test_reference import everything, model_inputs
from vllm_dpp.toy.checkpoint import TINY_QWEN3, make_checkpoint
from vllm_dpp.toy.qwen3_vl import DEEPSTACK_LEVELS


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    path: Path = make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "qwen3", TINY_QWEN3)
    return Reference(path)


@pytest.mark.parametrize("name", CHATS)
def test_without_pruning_the_logits_are_those_of_transformers(qwen3: Reference, name: str) -> None:
    prompt = qwen3.from_messages(CHATS[name])
    ids = torch.tensor([prompt.token_ids])
    types = torch.zeros_like(ids)  # by which transformers finds its own positions
    config = qwen3.network.model.config
    types[ids == config.image_token_id], types[ids == config.video_token_id] = 1, 2
    with torch.inference_mode():
        inputs = model_inputs(prompt)
        expected = qwen3.network.model(**inputs, mm_token_type_ids=types).logits[0]
        actual = qwen3.logits(prompt, [], DEEPSTACK_LEVELS, everything(prompt))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
    for video in prompt.videos:
        assert (ids[0, video.rows] == config.video_token_id).all()
        assert len(video.text) > 10


def test_layers_that_deepstack_adds_to_see_every_token(qwen3: Reference) -> None:
    prompt = qwen3.from_messages(CHATS["video"])
    with pytest.raises(ValueError, match="DeepStack adds to 3 layers, but K is 2"):
        qwen3.logits(prompt, [], 2, everything(prompt))
