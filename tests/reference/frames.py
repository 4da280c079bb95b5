"""Prompts of a model for which a video is many pictures, each behind its number: InternVL."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from .media import MediaItem


def expanded(
    processor: Any, text: str, media: Sequence[tuple[str, Any]], engine_dtype: torch.dtype
) -> tuple[tuple[int, ...], tuple[MediaItem, ...]]:
    """Token ids as an engine has them, in which videos have a token of their own, and the media.

    Args:
        processor: InternVL's.
        text: the prompt, with one placeholder for each media item.
        media: (modality, image or frames) in order.
        engine_dtype: that of pixels.
    """
    items = [_item(processor, kind, data, engine_dtype) for kind, data in media]
    for item in items:
        name = processor.image_token if item.modality == "image" else processor.video_token
        text = text.replace(name, f"\0{item.modality}\0", 1)
    for item in items:
        text = text.replace(f"\0{item.modality}\0", _words(processor, item), 1)
    token_ids = tuple(processor.tokenizer(text)["input_ids"])
    return token_ids, tuple(_placed(processor, token_ids, items))


def _item(processor: Any, modality: str, data: Any, engine_dtype: torch.dtype) -> MediaItem:
    """An item that has no place yet."""
    if modality == "image":
        pixels = processor.image_processor(images=[data], return_tensors="pt")["pixel_values"]
    else:
        made = processor.video_processor(videos=[data], do_sample_frames=False, return_tensors="pt")
        pixels = made["pixel_values_videos"][0]
    side = 2 * isqrt(processor.image_seq_length)
    return MediaItem(
        modality=modality,
        start=0,
        length=len(pixels) * processor.image_seq_length,
        pixel_values=pixels.to(engine_dtype),
        grid_thw=(len(pixels), side, side),
    )


def _words(processor: Any, item: MediaItem) -> str:
    begin, end = processor.start_image_token, processor.end_image_token
    if item.modality == "image":
        return f"{begin}{processor.image_token * item.length}{end}"
    frame = f"{begin}{processor.video_token * processor.image_seq_length}{end}"
    return "\n".join(f"Frame{i + 1}: {frame}" for i in range(item.grid_thw[0]))


def _placed(
    processor: Any, token_ids: Sequence[int], items: Sequence[MediaItem]
) -> Iterator[MediaItem]:
    """A picture has a mark before and behind it; a video begins with the number of its first."""
    vocabulary = processor.tokenizer.get_vocab()
    lead = len(processor.tokenizer(f"Frame1: {processor.start_image_token}")["input_ids"])
    end = 0
    for item in items:
        is_video = item.modality == "video"
        own = vocabulary[processor.video_token if is_video else processor.image_token]
        rows = [p for p in range(end, len(token_ids)) if token_ids[p] == own][: item.length]
        start, end = rows[0] - (lead if is_video else 1), rows[-1] + 2
        text = frozenset(range(end - start)) - {row - start for row in rows}
        yield replace(item, start=start, text=text)


def in_one_token(token_ids: Tensor, processor: Any) -> Tensor:
    """Token ids as transformers has them, in which videos have the token of images."""
    video = processor.tokenizer.convert_tokens_to_ids(processor.video_token)
    return token_ids.masked_fill(token_ids == video, processor.image_token_id)
