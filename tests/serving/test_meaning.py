"""What a server says that its settings mean."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_dpp.serving.front.meaning import meaning
from vllm_dpp.serving.settings import ServingSettings


def config(cache_dtype: str = "auto") -> Any:
    """Of Qwen2.5-VL-7B: 28 layers, 4 KV heads of 128."""
    model = SimpleNamespace(
        hf_text_config=SimpleNamespace(num_hidden_layers=28),
        hf_config=SimpleNamespace(
            vision_config=SimpleNamespace(patch_size=14, spatial_merge_size=2)
        ),
        architecture="DPPQwen2_5_VLForConditionalGeneration",
        dtype=torch.bfloat16,
        get_total_num_kv_heads=lambda: 4,
        get_head_size=lambda: 128,
    )
    cache = SimpleNamespace(cache_dtype=cache_dtype)
    return SimpleNamespace(model_config=model, cache_config=cache)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "15360 tokens enter the decoder and 3840 go on from layer 14 of 28: 525 MiB of KV "
         "instead of 840, 62 %"),
        ({"video_share": 0.3}, "6912 tokens enter the decoder and 2304 go on from layer 14 of 28: "
         "252 MiB of KV instead of 840, 30 %"),
    ],
)  # fmt: skip
def test_a_minute_of_video(settings: dict[str, Any], expected: str) -> None:
    resolved = ServingSettings(prune_layer=14, **settings).with_ratios(28)
    assert meaning(resolved, config()).endswith(expected)


def test_before_the_decoder_alone() -> None:
    """And of layers of linear attention, which have no KV."""
    settings = ServingSettings(video_share=0.3).as_entry_only(28)
    said = meaning(settings, config())
    assert said.endswith(" 4608 tokens enter the decoder: 252 MiB of KV instead of 840, 30 %")
    hybrid = config()
    types = ["linear_attention"] * 3 + ["full_attention"]
    hybrid.model_config.hf_text_config.layer_types = 7 * types
    assert "63 MiB of KV instead of 210, 30 %" in meaning(settings, hybrid)


def test_frames_of_as_many_tokens_whatever_their_size() -> None:
    internvl = config()
    internvl.model_config.architecture = "DPPInternVLForConditionalGeneration"
    internvl.model_config.hf_config = SimpleNamespace(image_seq_length=256)
    said = meaning(ServingSettings(prune_layer=14), internvl)
    assert said.startswith("of a minute of video (30720 tokens and text between slices: ")


def test_frames_that_are_pooled() -> None:
    llava = config()
    llava.model_config.architecture = "DPPLlavaOnevisionForConditionalGeneration"
    vision = SimpleNamespace(image_size=384, patch_size=14)
    llava.model_config.hf_config = SimpleNamespace(vision_config=vision)
    said = meaning(ServingSettings(prune_layer=14), llava)
    assert said.startswith("of a minute of video (23520 tokens: ")


def test_smaller_kv() -> None:
    said = meaning(ServingSettings(prune_layer=14), config("fp8"))
    assert said.endswith("262 MiB of KV instead of 420, 62 %")
