"""Tokens, pixels and positions, against the functions of vLLM that make them for the engine."""

from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch

from tests.reference import (
    MediaItem,
    Reference,
    chat_text,
    mrope_positions,
    multi_modal_data,
)
from tests.reference.chats import CHATS

LAYOUTS = {
    "text": [5],
    "video": [3, ("video", (4, 4, 6), 1.0), 2],
    "long video": [1, ("video", (9, 4, 4), 1.0), 7],
    "wide video": [1, ("video", (2, 4, 20), 1.0), 3],
    "nothing around": [("video", (3, 4, 4), 1.0)],
    "many frames a second": [2, ("video", (13, 2, 4), 2 / 24), 2],
    "few frames a second": [2, ("video", (3, 2, 4), 3.7), 2],
    "adjacent": [
        2,
        ("video", (4, 2, 4), 1.0),
        ("image", (1, 6, 4), 1.0),
        ("video", (5, 4, 2), 0.3),
    ],
    "mixed": [
        *(1, ("image", (1, 4, 8), 1.0), 2, ("video", (3, 6, 4), 0.7), 4),
        *(("image", (1, 2, 2), 1.0), 1, ("video", (6, 2, 2), 1.0), 9),
    ],
}


def media_of(layout: list) -> tuple[int, list[MediaItem]]:
    media = []
    num_tokens = 0
    for piece in layout:
        if isinstance(piece, int):
            num_tokens += piece
            continue
        modality, (slices, rows, columns), seconds = piece
        # The engine holds seconds in a tensor of its dtype.
        seconds = torch.tensor(seconds, dtype=torch.float32).item()
        length = slices * rows * columns // 4
        grid = (slices, rows, columns)
        media.append(MediaItem(modality, num_tokens, length, torch.empty(0), grid, seconds))
        num_tokens += length
    return num_tokens, media


def vllm_positions(
    num_tokens: int, media: list[MediaItem], tokens_per_second: int
) -> tuple[torch.Tensor, int]:
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration as Model

    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=tokens_per_second)
    model = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    model.iter_mm_grid_thw = MethodType(Model.iter_mm_grid_thw, model)
    features = [
        SimpleNamespace(
            modality=item.modality,
            mm_position=SimpleNamespace(offset=item.start),
            data={
                f"{item.modality}_grid_thw": SimpleNamespace(data=torch.tensor(item.grid_thw)),
                "second_per_grid_ts": SimpleNamespace(data=torch.tensor(item.second_per_grid_t)),
            },
        )
        for item in reversed(media)
    ]
    return Model.get_mrope_input_positions(model, [0] * num_tokens, features)


@pytest.mark.slow
@pytest.mark.parametrize("tokens_per_second", [2, 25])
@pytest.mark.parametrize("name", LAYOUTS)
def test_positions_are_those_of_the_engine(name: str, tokens_per_second: int) -> None:
    num_tokens, media = media_of(LAYOUTS[name])
    expected, delta = vllm_positions(num_tokens, media, tokens_per_second)
    rule = {"tokens_per_second": tokens_per_second, "spatial_merge_size": 2}
    # In decoding, the engine adds delta to the index of the token.
    generated = torch.arange(num_tokens, num_tokens + 3).expand(3, -1) + delta
    assert torch.equal(mrope_positions(num_tokens, media, **rule), expected)
    with_generated = mrope_positions(num_tokens + 3, media[::-1], **rule)
    assert torch.equal(with_generated, torch.cat([expected, generated], dim=1))


@pytest.mark.slow
def test_prompts_are_those_of_the_engine(checkpoint: Path, reference: Reference) -> None:
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.processing import ProcessorInputs, TimingContext

    config = ModelConfig(model=str(checkpoint), dtype="float32", mm_device_do_normalize=False)
    engine = MULTIMODAL_REGISTRY.create_processor(config)
    for messages in CHATS.values():
        prompt = reference.from_messages(messages)
        text = chat_text(reference.processor, messages)
        inputs = ProcessorInputs(
            prompt=reference.processor.tokenizer(text)["input_ids"],
            mm_data_items=engine.info.parse_mm_data(multi_modal_data(messages)),
        )
        expected = engine.apply(inputs, TimingContext())
        assert list(prompt.token_ids) == expected["prompt_token_ids"]
        for modality, names in (
            ("image", ("pixel_values", "image_grid_thw")),
            ("video", ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")),
        ):
            items = [item for item in prompt.media if item.modality == modality]
            ranges = expected["mm_placeholders"].get(modality, [])
            assert [(item.start, item.length) for item in items] == [
                (placeholder.offset, placeholder.length) for placeholder in ranges
            ]
            for item, fields in zip(items, expected["mm_kwargs"].get(modality, []), strict=True):
                pixels, grid, *seconds = (fields.get_data()[name] for name in names)
                assert torch.equal(item.pixel_values, pixels)
                assert item.grid_thw == tuple(grid.tolist())
                assert [second.item() for second in seconds] in ([], [item.second_per_grid_t])
