"""Every file of `configs/` means what it says, read by vLLM's own parser."""

from argparse import Namespace
from pathlib import Path

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_dpp.serve_command import DEFAULT_SHARE
from vllm_dpp.serving.front.families import family_of
from vllm_dpp.serving.layer_groups import default_prune_layer, wasted_fraction
from vllm_dpp.serving.settings import ServingSettings

TIME_TOKENS = 9  # "<12.5 seconds>" and the markers of a slice
NUMBER_TOKENS = 7  # "Frame12: " and the markers of a frame
MOST_PICTURES, MOST_TOKENS = 10, 72  # of a frame of MiniCPM-V, and of each between two markers
FOLDER = Path(__file__).parents[1] / "configs"
MODELS = {  # file: model, layers, prune layer if any, longest prompt, tensor-parallel size
    "qwen2_5_vl_3b.yaml": ("Qwen/Qwen2.5-VL-3B-Instruct", 36, 18, 32768, 1),
    "qwen2_5_vl_7b.yaml": ("Qwen/Qwen2.5-VL-7B-Instruct", 28, 14, 32768, 1),
    "qwen2_5_vl_72b.yaml": ("Qwen/Qwen2.5-VL-72B-Instruct", 80, 40, 32768, 4),
    "qwen3_vl_8b.yaml": ("Qwen/Qwen3-VL-8B-Instruct", 36, 18, 32768, 1),
    "qwen3_vl_30b_a3b.yaml": ("Qwen/Qwen3-VL-30B-A3B-Instruct", 48, 24, 32768, 1),
    "qwen3_omni_30b_a3b.yaml": ("Qwen/Qwen3-Omni-30B-A3B-Instruct", 48, 24, 32768, 1),
    "qwen3_5_27b.yaml": ("Qwen/Qwen3.5-27B", 64, None, 32768, 1),
    "internvl3_5_8b.yaml": ("OpenGVLab/InternVL3_5-8B-HF", 36, 18, 32768, 1),
    "glm4_1v_9b.yaml": ("zai-org/GLM-4.1V-9B-Thinking", 40, 20, 32768, 1),
    "glm4_5v.yaml": ("zai-org/GLM-4.5V", 46, 23, 32768, 4),
    "llava_onevision_7b.yaml": ("llava-hf/llava-onevision-qwen2-7b-ov-hf", 28, 14, 32768, 1),
    "minicpm_v_4_6.yaml": ("openbmb/MiniCPM-V-4.6", 24, None, 32768, 1),
    "cpu_demo.yaml": ("Qwen/Qwen2.5-VL-3B-Instruct", 36, 18, 8192, 1),
}


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


def parse(parser: FlexibleArgumentParser, name: str) -> Namespace:
    return parser.parse_args(["--config", str(FOLDER / name)])


def test_every_file_is_listed() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_settings(parser: FlexibleArgumentParser, name: str) -> None:
    model, num_layers, prune_layer, max_model_len, tensor_parallel = MODELS[name]
    args = parse(parser, name)
    assert args.model == model
    assert args.hf_overrides == {"architectures": [variant_of(model)]}
    assert ServingSettings.from_additional_config(args.additional_config) == ServingSettings(
        prune_layer=prune_layer, video_share=DEFAULT_SHARE
    )
    assert prune_layer in (None, default_prune_layer(num_layers))
    assert prune_layer is None or wasted_fraction(num_layers, prune_layer) == 0
    assert (prune_layer is None) == bool(family_of(variant_of(model)).entry_only_because)
    assert args.max_model_len == max_model_len
    assert args.max_num_batched_tokens is None, "videos are read over as many steps as vLLM takes"
    assert args.tensor_parallel_size == tensor_parallel


KINDS = {
    "InternVL": "InternVL",
    "Qwen2.5": "Qwen2_5_VL",
    "Omni": "Qwen3OmniMoe",
    "A3B": "Qwen3VLMoe",
    "Qwen3.5": "Qwen3_5",
    "Qwen3": "Qwen3VL",
    "GLM-4.1V": "Glm4v",
    "GLM-4.5V": "Glm4vMoe",
    "llava-onevision": "LlavaOnevision",
    "MiniCPM-V-4.6": "MiniCPMV4_6",
}


def variant_of(model: str) -> str:
    """By the name that its publisher gives it."""
    kind = next(kind for part, kind in KINDS.items() if part in model)
    return family_of(f"{kind}ForConditionalGeneration").variant


@pytest.mark.parametrize("name", MODELS)
def test_the_longest_video_leaves_half_of_the_prompt(
    parser: FlexibleArgumentParser, name: str
) -> None:
    args = parse(parser, name)
    if "InternVL" in args.model:  # of whatever size, and each frame says its number
        frames = args.media_io_kwargs["video"]["num_frames"]
        assert frames * (256 + NUMBER_TOKENS) <= args.max_model_len // 2
        return
    if "llava" in args.model:
        assert args.media_io_kwargs["video"]["num_frames"] * 196 <= args.max_model_len // 2
        return
    if "MiniCPM" in args.model:
        frames = args.media_io_kwargs["video"]["num_frames"]
        assert frames * MOST_PICTURES * (MOST_TOKENS + 2) <= args.max_model_len // 2
        return
    if "Omni" in args.model:  # of whatever size, and more than the length of a video may say
        assert args.media_io_kwargs["video"]["num_frames"] // 2 * 768 <= args.max_model_len // 2
        return
    frames = args.media_io_kwargs["video"]
    slices = (frames.get("max_frames") or frames["fps"] * frames["max_duration"]) // 2
    pixels = args.mm_processor_kwargs["videos_kwargs"]["size"]["longest_edge"]
    if "Qwen2.5" in args.model:
        tokens = slices * (pixels // 28**2)
    else:  # of all frames of a video, and each slice says its time
        side = 32 if "Qwen3" in args.model else 28
        tokens = pixels // (2 * side**2) + slices * TIME_TOKENS
    assert tokens <= args.max_model_len // 2


def test_the_cpu_demo_starts_fast(parser: FlexibleArgumentParser) -> None:
    assert parse(parser, "cpu_demo.yaml").enforce_eager is True
