"""Other families than the one of the other tests: still transformers' own forward pass."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.reference import Prompt, Reference
from tests.reference.chats import CHATS
from tests.reference.frames import in_one_token
from tests.reference.test_reference import everything, model_inputs, transformers_forward
from vllm_dpp.toy.checkpoint import make_checkpoint
from vllm_dpp.toy.qwen3_vl import DEEPSTACK_LEVELS
from vllm_dpp.toy.spec import CheckpointSpec

FAMILIES = [
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_omni_moe",
    "glm4v",
    "glm4v_moe",
    "internvl",
    "llava_onevision",
    "minicpmv4_6",
]


@pytest.fixture(scope="module", params=FAMILIES)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("checkpoint")
    path: Path = make_checkpoint(folder / "tiny", CheckpointSpec(architecture=request.param))
    return Reference(path)


@pytest.mark.parametrize("name", CHATS)
def test_without_pruning_the_logits_are_those_of_transformers(
    reference: Reference, name: str
) -> None:
    prompt = reference.from_messages(CHATS[name])
    model_type = reference.network.model.config.model_type
    has_text = not model_type.startswith(("qwen2", "qwen3_omni", "llava"))
    with torch.inference_mode():
        expected = OF_FAMILY[model_type](reference, prompt)
        layer = DEEPSTACK_LEVELS
        if reference.network.has_linear_attention:
            layer = reference.network.num_layers
        actual = reference.logits(prompt, [], layer, everything(prompt))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
    for video in prompt.videos:
        assert len({prompt.token_ids[row] for row in video.rows}) == 1
        assert (len(video.text) >= 2 * video.grid_thw[0]) == has_text


def with_our_positions(reference: Reference, prompt: Prompt) -> Tensor:
    return transformers_forward(reference, prompt).logits[0]


def with_its_own_positions(reference: Reference, prompt: Prompt) -> Tensor:
    """By the types of tokens."""
    ids = torch.tensor([prompt.token_ids])
    types = torch.zeros_like(ids)
    for item in prompt.media:
        types[0, item.rows] = 1 if item.modality == "image" else 2
    return reference.network.model(**model_inputs(prompt), mm_token_type_ids=types).logits[0]


def of_one_kind(reference: Reference, prompt: Prompt) -> Tensor:
    """transformers 5.19 takes GLM's images for its videos where a prompt has both."""
    if len({item.modality for item in prompt.media}) < 2:
        return with_its_own_positions(reference, prompt)
    network = reference.network
    hidden = network.embeddings(prompt, (), network.media_embeddings(prompt))
    positions = network.positions(prompt, 0)[:, None]
    return network.model(inputs_embeds=hidden[None], position_ids=positions).logits[0]


def of_seconds(reference: Reference, prompt: Prompt) -> Tensor:
    """By the tokens, and how long slices are."""
    inputs = model_inputs(prompt)
    seconds = torch.tensor([video.second_per_grid_t for video in prompt.videos])
    mask = torch.ones_like(inputs["input_ids"])
    return reference.network.model(
        **inputs, attention_mask=mask, video_second_per_grid=seconds
    ).logits[0]


def of_pictures(reference: Reference, prompt: Prompt) -> Tensor:
    """All pixels in order, and one token for images and videos."""
    ids = in_one_token(torch.tensor([prompt.token_ids]), reference.processor)
    inputs = {"input_ids": ids}
    if prompt.media:
        inputs["pixel_values"] = torch.cat([item.pixel_values for item in prompt.media])
    return reference.network.model(**inputs).logits[0]


def of_frames(reference: Reference, prompt: Prompt) -> Tensor:
    """transformers stacks videos, which therefore must be as long as each other."""
    images = [item for item in prompt.media if item.modality == "image"]
    inputs = {"input_ids": torch.tensor([prompt.token_ids])}
    if len({len(video.pixel_values) for video in prompt.videos}) > 1:
        network = reference.network
        hidden = network.embeddings(prompt, (), network.media_embeddings(prompt))
        inputs = {"inputs_embeds": hidden[None]}
    elif prompt.videos:
        inputs["pixel_values_videos"] = torch.stack([v.pixel_values for v in prompt.videos])
    if images and "input_ids" in inputs:
        (image,) = images
        inputs["pixel_values"] = image.pixel_values[None]
        inputs["image_sizes"] = torch.tensor([image.image_size])
    return reference.network.model(**inputs).logits[0]


def of_tiles(reference: Reference, prompt: Prompt) -> Tensor:
    """All pictures in order, whether of images or of videos, each with its size."""
    inputs = {"input_ids": torch.tensor([prompt.token_ids])}
    for modality, suffix in (("image", ""), ("video", "_videos")):
        if items := [item for item in prompt.media if item.modality == modality]:
            sizes = torch.tensor([size for item in items for size in item.target_sizes])
            pixels = torch.cat([item.pixel_values for item in items], dim=-1)
            inputs |= {f"pixel_values{suffix}": pixels, f"target_sizes{suffix}": sizes}
    return reference.network.model(**inputs).logits[0]


OF_FAMILY = {
    "qwen2_vl": with_our_positions,
    "qwen3_vl": with_its_own_positions,
    "qwen3_vl_moe": with_its_own_positions,
    "qwen3_5": with_its_own_positions,
    "qwen3_5_moe": with_its_own_positions,
    "qwen3_omni_moe_thinker": of_seconds,
    "glm4v": of_one_kind,
    "glm4v_moe": of_one_kind,
    "internvl": of_pictures,
    "llava_onevision": of_frames,
    "minicpmv4_6": of_tiles,
}


def test_layers_that_deepstack_adds_to_see_every_token(reference: Reference) -> None:
    prompt = reference.from_messages(CHATS["video"])
    if reference.network.has_linear_attention:
        pytest.skip("no layer sees less than all that enter")
    if not reference.network.model.config.model_type.startswith("qwen3"):
        assert len(reference.logits(prompt, [], 2, everything(prompt))) == len(prompt.token_ids)
        return
    with pytest.raises(ValueError, match="DeepStack adds to 3 layers, but K is 2"):
        reference.logits(prompt, [], 2, everything(prompt))
