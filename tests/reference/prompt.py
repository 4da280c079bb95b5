"""Chat messages to token ids and media items, the way the engine prepares them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import (
    InternVLProcessor,
    LlavaOnevisionProcessor,
    MiniCPMV4_6Processor,
    ProcessorMixin,
)
from transformers.video_utils import VideoMetadata

from vllm_dpp.toy.video import vllm_video

from . import frames, llava, tiles
from .media import MediaItem

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """Token ids with every placeholder expanded, and the media items in order of position.

    Those of the modalities `prunes` are its videos: an image is one of a single slice.
    """

    token_ids: tuple[int, ...]
    media: tuple[MediaItem, ...]
    turn_end_token_id: int
    prunes: tuple[str, ...] = ("video",)

    @property
    def videos(self) -> tuple[MediaItem, ...]:
        return tuple(item for item in self.media if item.modality in self.prunes)

    @property
    def sent_token_ids(self) -> tuple[int, ...]:
        """As an engine shows them: what enters of a video with text stands in its first slice.

        An engine does not know on the host in which slices the tokens are.
        """
        token_ids = list(self.token_ids)
        for item in self.media:
            if item.entered is None or not item.text:
                continue
            own = [self.token_ids[row] for row in item.rows]
            text = [self.token_ids[p] for p in range(item.start, item.end) if p not in item.rows]
            lead = next(place for place in range(item.end) if place not in item.text)
            token_ids[item.start : item.end] = [*text[:lead], *own, *text[lead:]]
        return tuple(token_ids)

    def entered(self, chosen: Sequence[Sequence[int]]) -> "Prompt":
        """The prompt in which of each video these tokens alone are left, and its text."""
        token_ids, media, token, waiting = [], [], 0, iter(chosen)
        for item in self.media:
            token_ids += self.token_ids[token : item.start]
            left = tuple(next(waiting)) if item.modality == "video" else None
            if left is not None and len(left) == item.length:
                left = None
            length = item.length if left is None else len(left)
            media.append(replace(item, start=len(token_ids), length=length, entered=left))
            token_ids += [self.token_ids[item.start + place] for place in media[-1].left]
            token = item.end
        token_ids += self.token_ids[token:]
        return replace(self, token_ids=tuple(token_ids), media=tuple(media))


def chat_text(processor: ProcessorMixin, messages: Messages) -> str:
    """The prompt as text, with one unexpanded placeholder for each media item."""
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def multi_modal_data(messages: Messages) -> dict[str, list[Any]]:
    """The media of the messages as the engine takes them: images, and (frames, metadata) pairs.

    A video part is `{"type": "video", "video": frames, "fps": float}`, with frames [T, H, W, 3]
    uint8 or a list of PIL images; an image part is `{"type": "image", "image": PIL image}`.
    """
    media: dict[str, list[Any]] = {"image": [], "video": []}
    for message in messages:
        parts = [] if isinstance(message["content"], str) else message["content"]
        for part in parts:
            if part["type"] == "image":
                media["image"].append(part["image"])
            elif part["type"] == "video":
                frames = np.stack([np.asarray(frame) for frame in part["video"]])
                media["video"].append(vllm_video(frames, part["fps"]))
    return {modality: items for modality, items in media.items() if items}


def prompt_from_messages(
    processor: ProcessorMixin,
    messages: Messages,
    *,
    engine_dtype: torch.dtype = torch.float32,
) -> Prompt:
    """Run the checkpoint's processor over the messages.

    The engine casts every floating output of the processor to the model's dtype, the seconds per
    time slice included, and derives positions from the rounded value; `engine_dtype` repeats that.
    No frame is sampled away.
    """
    turn_end = processor.tokenizer.convert_tokens_to_ids(
        "<|assistant|>" if _is_glm(processor) else "<|im_end|>"
    )
    own = {
        InternVLProcessor: frames.expanded,
        LlavaOnevisionProcessor: llava.expanded,
        MiniCPMV4_6Processor: tiles.expanded,
    }
    if expanded := own.get(type(processor)):
        text = chat_text(processor, messages)
        return Prompt(*expanded(processor, text, _in_order(messages), engine_dtype), turn_end)
    media = multi_modal_data(messages)
    videos = [frames for frames, _ in media.get("video", [])]
    metadata = [
        VideoMetadata(**{name: fields[name] for name in fields if name != "do_sample_frames"})
        for _, fields in media.get("video", [])
    ]
    outputs = processor(
        text=[chat_text(processor, messages)],
        images=media.get("image"),
        videos=videos or None,
        videos_kwargs={"video_metadata": metadata, "do_sample_frames": False} if videos else {},
        return_tensors="pt",
    )
    token_ids = tuple(outputs["input_ids"][0].tolist())
    items = _place_media(token_ids, outputs, processor, engine_dtype)
    return Prompt(
        token_ids=token_ids,
        media=items,
        turn_end_token_id=turn_end,
    )


def _in_order(messages: Messages) -> list[tuple[str, Any]]:
    """The media of the messages: modality, and image or frames."""
    parts = [part for m in messages if not isinstance(m["content"], str) for part in m["content"]]
    return [(part["type"], part[part["type"]]) for part in parts if part["type"] != "text"]


def _place_media(
    token_ids: Sequence[int],
    outputs: Mapping[str, Any],
    processor: ProcessorMixin,
    engine_dtype: torch.dtype,
) -> tuple[MediaItem, ...]:
    if "mm_token_type_ids" in outputs:  # GLM has the token of an image in its videos, too
        kinds = outputs["mm_token_type_ids"][0].tolist()
    else:
        known = processor.tokenizer.convert_tokens_to_ids
        of = {known(processor.image_token): 1, known(processor.video_token): 2}
        kinds = [of.get(token, 0) for token in token_ids]
    waiting = {
        1: _items_of("image", outputs, engine_dtype),
        2: _items_of("video", outputs, engine_dtype),
    }
    merged = processor.image_processor.merge_size**2
    placed = []
    position = 0
    while position < len(token_ids):
        if kinds[position] not in waiting:
            position += 1
            continue
        fields = waiting[kinds[position]].pop(0)
        length = len(fields["pixel_values"]) // merged
        item = MediaItem(start=position, length=length, **fields)
        if any(token != token_ids[position] for token in token_ids[position : item.end]):
            item = _with_text(item, token_ids, processor)
        placed.append(item)
        position = item.end
    return tuple(placed)


def _with_text(item: MediaItem, token_ids: Sequence[int], processor: ProcessorMixin) -> MediaItem:
    """An item whose slices stand apart, each beside its time, between two marks of its own.

    The placeholder begins behind the mark that opens the item and ends with that of the last slice;
    in GLM it has both marks of the item.
    """
    pad, first, rows = token_ids[item.start], item.start, []
    for position in range(first, len(token_ids)):
        if token_ids[position] == pad and len(rows) < item.length:
            rows.append(position)
    if _is_glm(processor):
        start = max(p for p in range(first) if token_ids[p] == processor.video_start_id)
        end = token_ids.index(processor.video_end_id, rows[-1]) + 1
    else:
        slice_start = processor.vision_start_token_id
        start = max(p for p in range(first - 1) if token_ids[p] == slice_start) + 1
        end = rows[-1] + 2
    places = set(range(end - start))
    return replace(item, start=start, text=frozenset(places - {row - start for row in rows}))


def _is_glm(processor: ProcessorMixin) -> bool:
    return type(processor).__name__.startswith("Glm")


def _items_of(
    modality: str, outputs: Mapping[str, Any], engine_dtype: torch.dtype
) -> list[dict[str, Any]]:
    if f"{modality}_grid_thw" not in outputs:
        return []
    grids = outputs[f"{modality}_grid_thw"]
    pixels = outputs["pixel_values" if modality == "image" else "pixel_values_videos"]
    pixels_of_item = pixels.to(engine_dtype).split(grids.prod(-1).tolist())
    seconds = torch.ones(len(grids))
    for name in ("second_per_grid_ts", "video_second_per_grid"):
        if name in outputs and modality == "video":
            seconds = torch.as_tensor(outputs[name]).to(engine_dtype)
    return [
        {
            "modality": modality,
            "pixel_values": pixel_values,
            "grid_thw": tuple(grid.tolist()),
            "second_per_grid_t": second.item(),
        }
        for pixel_values, grid, second in zip(pixels_of_item, grids, seconds, strict=True)
    ]
