"""How many tokens of each video stay, and what the choice may look at. Pure integers."""

import math
from dataclasses import dataclass
from itertools import groupby

from .media import MediaItem
from .prompt import Prompt


@dataclass(frozen=True)
class VideoPlan:
    """One video of a prompt.

    Args:
        start: position of its first token.
        length: number of its tokens, N.
        num_tail: how many of them, at its end, stay whatever they show.
        num_slices: number of its time slices; where some of it has not entered, of equal parts.
        num_missing: tokens that the last of such parts lacks.
        num_last: how many of its tokens, at its end, are of its last slice, its tail included;
            where some of it has not entered, as many as slices have on average.
        decision_point: position d; nothing from d on may influence the choice.
        question: text positions between the video and d.
        num_kept: number of its tokens that stay, its tail included, between 1 and N.
    """

    start: int
    length: int
    num_tail: int
    num_slices: int
    num_missing: int
    num_last: int
    decision_point: int
    question: tuple[int, ...]
    num_kept: int


def plan_videos(
    prompt: Prompt,
    retention_ratio: float,
    block_size: int | None = None,
    question_free: bool = False,
) -> list[VideoPlan]:
    """Plan every video of the prompt, in order of position.

    With `block_size` each turn drops a multiple of it, and the last video that loses tokens loses
    none after the last block boundary in it: what follows stays aligned to blocks. Without a
    question each video is a turn of its own.
    """
    if not 0 < retention_ratio <= 1:
        raise ValueError(f"retention_ratio must be in (0, 1], got {retention_ratio}")
    plans: list[VideoPlan] = []
    if question_free:
        turns = groupby(prompt.videos, key=lambda video: video.end)
    else:
        turns = groupby(prompt.videos, key=lambda video: _decision_point(prompt, video))
    for decision_point, turn in turns:
        videos = list(turn)
        counts = [num_kept(video.length, retention_ratio) for video in videos]
        tails = [0] * len(videos)
        if block_size is not None:
            counts, tails = _on_blocks(videos, retention_ratio, block_size)
        plans += [
            VideoPlan(
                start=video.start,
                length=video.length,
                num_tail=tail,
                num_slices=_slices(video)[0],
                num_missing=_slices(video)[1],
                num_last=math.ceil(video.length / video.grid_thw[0]),
                decision_point=decision_point,
                question=_question(prompt, video, decision_point),
                num_kept=count,
            )
            for video, count, tail in zip(videos, counts, tails, strict=True)
        ]
    return plans


def _slices(video: MediaItem) -> tuple[int, int]:
    """Number of time slices, or of equal parts of what entered, and what the last one lacks.

    Parts are of 64 tokens at least.
    """
    slices = video.grid_thw[0]
    if video.entered is None:
        return slices, 0
    part = min(max(math.ceil(video.length / slices), 64), video.length)
    parts = math.ceil(video.length / part)
    return parts, parts * part - video.length


def plan_pieces(
    video: MediaItem, ratio: float, piece_length: int, block_size: int | None = None
) -> list[tuple[int, int, int]]:
    """A video that is decided in pieces: first and last offset of each, and how many stay.

    Offsets count from the video's first token. What is dropped up to the end of a piece is what
    the ratio drops of all that has been read, in whole blocks if there are blocks; what the
    pieces do not cover stays.
    """
    unit = block_size or 1
    last = video.end - video.end % unit
    bounds = [video.start]
    while bounds[-1] < last:
        wanted = bounds[-1] + piece_length
        beyond = bounds[-1] - bounds[-1] % unit + unit
        bounds.append(min(last, max(beyond, wanted - wanted % unit)))
    pieces, dropped = [], 0
    for start, end in zip(bounds, bounds[1:], strict=False):
        read = end - video.start
        drop = read - num_kept(read, ratio) - dropped
        drop = min(drop, end - start - 1)
        drop -= drop % unit
        dropped += drop
        pieces.append((start - video.start, end - video.start, end - start - drop))
    return pieces


def num_kept(length: int, retention_ratio: float) -> int:
    """Round half up, at least one token; a ratio of one keeps all."""
    if retention_ratio == 1:
        return length
    return max(1, math.floor(length * retention_ratio + 0.5))


def _on_blocks(
    videos: list[MediaItem], ratio: float, block_size: int
) -> tuple[list[int], list[int]]:
    """How many tokens of each video stay, and how many of these are its tail."""
    lengths = [video.length for video in videos]
    for last in reversed(range(len(videos))):
        tails = [0] * len(videos)
        tails[last] = min(videos[last].end % block_size, lengths[last])
        counts = [
            tail + num_kept(length - tail, ratio) if tail < length and i <= last else length
            for i, (length, tail) in enumerate(zip(lengths, tails, strict=True))
        ]
        surplus = (sum(lengths) - sum(counts)) % block_size
        for i in reversed(range(last + 1)):  # give back, last video first
            returned = min(surplus, lengths[i] - counts[i])
            counts[i] += returned
            surplus -= returned
        if counts[last] < lengths[last]:
            return counts, tails
    return lengths, [0] * len(videos)


def _decision_point(prompt: Prompt, video: MediaItem) -> int:
    """One past the turn-end token that follows the video, or the end of the prompt."""
    for position in range(video.end, len(prompt.token_ids)):
        if prompt.token_ids[position] == prompt.turn_end_token_id:
            return position + 1
    return len(prompt.token_ids)


def _question(prompt: Prompt, video: MediaItem, decision_point: int) -> tuple[int, ...]:
    media = {position for item in prompt.media for position in range(item.start, item.end)}
    return tuple(position for position in range(video.end, decision_point) if position not in media)
