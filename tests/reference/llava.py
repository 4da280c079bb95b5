"""Prompts of LLaVA-OneVision: frames of as many tokens each, and one newline behind the last.

The newline is no token of the video: here it is text behind it, whose embedding is the model's own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isqrt
from typing import Any

import torch

from .media import MediaItem


def expanded(
    processor: Any, text: str, media: Sequence[tuple[str, Any]], engine_dtype: torch.dtype
) -> tuple[tuple[int, ...], tuple[MediaItem, ...]]:
    """Token ids as an engine has them, and the media.

    Args:
        processor: LLaVA-OneVision's.
        text: the prompt, with one placeholder for each media item.
        media: (modality, image or frames) in order.
        engine_dtype: that of pixels.
    """
    items = [_item(processor, kind, data, engine_dtype) for kind, data in media]
    for item in items:
        text = text.replace(_token(processor, item), f"\0{item.modality}\0", 1)
    for item in items:
        number = item.length + (item.modality == "video")
        text = text.replace(f"\0{item.modality}\0", _token(processor, item) * number, 1)
    token_ids = tuple(processor.tokenizer(text)["input_ids"])
    return token_ids, tuple(_placed(processor, token_ids, items))


def _token(processor: Any, item: MediaItem) -> str:
    return processor.video_token if item.modality == "video" else processor.image_token


def _item(processor: Any, modality: str, data: Any, engine_dtype: torch.dtype) -> MediaItem:
    """An item that has no place yet."""
    if modality == "image":
        made = processor(text=processor.image_token, images=data, return_tensors="pt")
        pixels, length = made["pixel_values"][0], made["input_ids"].shape[1]
        size, grid = tuple(made["image_sizes"][0].tolist()), (1, 2, 2 * length)
    else:
        made = processor(text=processor.video_token, videos=data, return_tensors="pt")
        pixels, length = made["pixel_values_videos"][0], made["input_ids"].shape[1] - 1
        side = isqrt(length // len(pixels))
        size, grid = None, (len(pixels), 2 * side, 2 * side)
    return MediaItem(modality, 0, length, pixels.to(engine_dtype), grid, image_size=size)


def _placed(
    processor: Any, token_ids: Sequence[int], items: Sequence[MediaItem]
) -> Iterator[MediaItem]:
    vocabulary, at = processor.tokenizer.get_vocab(), 0
    for item in items:
        start = token_ids.index(vocabulary[_token(processor, item)], at)
        at = start + item.length + (item.modality == "video")
        yield replace(item, start=start)
