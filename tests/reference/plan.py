"""How many tokens of each video stay, and what the choice may look at. Pure integers."""

import math
from dataclasses import dataclass
from itertools import groupby

from .prompt import MediaItem, Prompt


@dataclass(frozen=True)
class VideoPlan:
    """One video of a prompt.

    Args:
        start: position of its first token.
        length: number of its tokens, N.
        num_slices: number of its time slices.
        decision_point: position d; nothing from d on may influence the choice.
        question: text positions between the video and d.
        num_kept: number of its tokens that stay, between 1 and N.
    """

    start: int
    length: int
    num_slices: int
    decision_point: int
    question: tuple[int, ...]
    num_kept: int


def plan_videos(
    prompt: Prompt, retention_ratio: float, block_size: int | None = None
) -> list[VideoPlan]:
    """Plan every video of the prompt, in order of position.

    With `block_size` each turn drops a multiple of it: what follows stays aligned to blocks.
    """
    if not 0 < retention_ratio <= 1:
        raise ValueError(f"retention_ratio must be in (0, 1], got {retention_ratio}")
    plans: list[VideoPlan] = []
    turns = groupby(prompt.videos, key=lambda video: _decision_point(prompt, video))
    for decision_point, turn in turns:
        videos = list(turn)
        counts = [num_kept(video.length, retention_ratio) for video in videos]
        if block_size is not None:
            counts = _round_to_blocks([video.length for video in videos], counts, block_size)
        plans += [
            VideoPlan(
                start=video.start,
                length=video.length,
                num_slices=video.grid_thw[0],
                decision_point=decision_point,
                question=_question(prompt, video, decision_point),
                num_kept=count,
            )
            for video, count in zip(videos, counts, strict=True)
        ]
    return plans


def num_kept(length: int, retention_ratio: float) -> int:
    """Round half up, at least one token; a ratio of one keeps all."""
    if retention_ratio == 1:
        return length
    return max(1, math.floor(length * retention_ratio + 0.5))


def _round_to_blocks(lengths: list[int], counts: list[int], block_size: int) -> list[int]:
    """Give back tokens, last video first, until a multiple of the block size is dropped."""
    counts = list(counts)
    surplus = (sum(lengths) - sum(counts)) % block_size
    for index in reversed(range(len(counts))):
        returned = min(surplus, lengths[index] - counts[index])
        counts[index] += returned
        surplus -= returned
    return counts


def _decision_point(prompt: Prompt, video: MediaItem) -> int:
    """One past the turn-end token that follows the video, or the end of the prompt."""
    for position in range(video.end, len(prompt.token_ids)):
        if prompt.token_ids[position] == prompt.turn_end_token_id:
            return position + 1
    return len(prompt.token_ids)


def _question(prompt: Prompt, video: MediaItem, decision_point: int) -> tuple[int, ...]:
    media = {position for item in prompt.media for position in range(item.start, item.end)}
    return tuple(position for position in range(video.end, decision_point) if position not in media)
