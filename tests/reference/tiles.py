"""Prompts of MiniCPM-V: a frame is a picture between marks, and tiles of it where it is large."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from .media import MediaItem

TOKEN_SIDE = 4
"""Patches of a token, along each side."""


def expanded(
    processor: Any, text: str, media: Sequence[tuple[str, Any]], engine_dtype: torch.dtype
) -> tuple[tuple[int, ...], tuple[MediaItem, ...]]:
    """Token ids, and the media.

    transformers 5.19 takes no two videos of other lengths at once, so each is prepared alone.

    Args:
        processor: MiniCPM-V's.
        text: the prompt, with one placeholder for each media item.
        media: (modality, image or frames) in order.
        engine_dtype: that of pixels.
    """
    made = [_made(processor, modality, data, engine_dtype) for modality, data in media]
    for item, _ in made:
        text = text.replace(_token(processor, item), f"\0{item.modality}\0", 1)
    number = {"image": 0, "video": 0}
    for item, words in made:
        name = f"<image_id>{number[item.modality]}</image_id>"
        number[item.modality] += 1
        text = text.replace(f"\0{item.modality}\0", name + words, 1)
    token_ids = tuple(processor.tokenizer(text)["input_ids"])
    return token_ids, tuple(_placed(processor, token_ids, [item for item, _ in made]))


def _made(
    processor: Any, modality: str, data: Any, engine_dtype: torch.dtype
) -> tuple[MediaItem, str]:
    """An item that has no place yet, and its placeholder without its number."""
    if modality == "image":
        made, words = processor._process_images([data])
        pixels, sizes, num_frames = made["pixel_values"], made["target_sizes"], 1
    else:
        made, words = processor._process_videos(
            [data], do_sample_frames=False, video_metadata=[{"total_num_frames": len(data)}]
        )
        pixels, sizes = made["pixel_values_videos"], made["target_sizes_videos"]
        num_frames = len(data)
    length = int(sizes.prod(dim=1).sum()) // TOKEN_SIDE**2
    item = MediaItem(
        modality=modality,
        start=0,
        length=length,
        pixel_values=pixels.to(engine_dtype),
        grid_thw=(num_frames, 1, length // num_frames),
        target_sizes=tuple(map(tuple, sizes.tolist())),
    )
    return item, words[0]


def _token(processor: Any, item: MediaItem) -> str:
    return processor.video_token if item.modality == "video" else processor.image_token


def _placed(
    processor: Any, token_ids: Sequence[int], items: Sequence[MediaItem]
) -> Iterator[MediaItem]:
    """From the mark before an item's first picture to that behind its last; not its number."""
    vocabulary, end = processor.tokenizer.get_vocab(), 0
    for item in items:
        own = vocabulary[_token(processor, item)]
        rows = [p for p in range(end, len(token_ids)) if token_ids[p] == own][: item.length]
        start, end = rows[0] - 1, rows[-1] + 2
        text = frozenset(range(end - start)) - {row - start for row in rows}
        yield replace(item, start=start, text=text)
