"""Other families than the one of the other tests: still transformers' own forward pass."""

from pathlib import Path

import pytest
import torch

from tests.reference import Reference
from tests.reference.chats import CHATS
from tests.reference.test_reference import everything, model_inputs, transformers_forward
from vllm_dpp.toy.checkpoint import CheckpointSpec, make_checkpoint
from vllm_dpp.toy.qwen3_vl import DEEPSTACK_LEVELS


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v"])
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("checkpoint")
    path: Path = make_checkpoint(folder / "tiny", CheckpointSpec(architecture=request.param))
    return Reference(path)


@pytest.mark.parametrize("name", CHATS)
def test_without_pruning_the_logits_are_those_of_transformers(
    reference: Reference, name: str
) -> None:
    prompt = reference.from_messages(CHATS[name])
    config, ids = reference.network.model.config, torch.tensor([prompt.token_ids])
    is_glm = config.model_type.startswith("glm")
    has_text = config.model_type.startswith("qwen3") or is_glm
    own = config.image_token_id if is_glm else config.video_token_id
    types = torch.zeros_like(ids)  # by which transformers finds its own positions
    types[ids == config.image_token_id] = 1
    for video in prompt.videos:
        types[0, video.rows] = 2
    with torch.inference_mode():
        if has_text:  # and our positions are transformers' own
            inputs = model_inputs(prompt)
            expected = reference.network.model(**inputs, mm_token_type_ids=types).logits[0]
        else:
            expected = transformers_forward(reference, prompt).logits[0]
        actual = reference.logits(prompt, [], DEEPSTACK_LEVELS, everything(prompt))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
    for video in prompt.videos:
        assert (ids[0, video.rows] == own).all()
        assert (len(video.text) > 10) == has_text


def test_layers_that_deepstack_adds_to_see_every_token(reference: Reference) -> None:
    prompt = reference.from_messages(CHATS["video"])
    if not reference.network.model.config.model_type.startswith("qwen3"):
        assert len(reference.logits(prompt, [], 2, everything(prompt))) == len(prompt.token_ids)
        return
    with pytest.raises(ValueError, match="DeepStack adds to 3 layers, but K is 2"):
        reference.logits(prompt, [], 2, everything(prompt))
