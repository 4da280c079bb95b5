"""The prune plan of one prompt: integers only, the same on the scheduler and on every worker.

Which tokens are kept depends on data. How many are kept, and therefore every length, block count
and slot of the upper layers, is a function of the prompt alone. Both sides build the plan from the
request, so nothing has to be sent between them.

Terms: a *turn* is a stretch of the prompt whose videos share one decision point. Its *atomic range*
``[start, end)`` runs from its first pruned video to that point and is computed in one step.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm_dpp.pruning.budget import num_kept

Span = tuple[int, int]
"""Half-open range of prompt positions."""


@dataclass(frozen=True, slots=True)
class MediaSpan:
    """Where one image or video stands in the prompt.

    Args:
        start: First prompt position of its placeholder tokens.
        length: Number of placeholder tokens.
        is_video: Only videos are pruned.
    """

    start: int
    length: int
    is_video: bool

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class PrunedVideo:
    """One video that loses tokens.

    Args:
        media_index: Its place in the request's list of media.
        start: First prompt position.
        length: Tokens in the lower layers.
        num_kept: Tokens in the upper layers, in [1, length).
        question: Text positions between the video and the decision point.
    """

    media_index: int
    start: int
    length: int
    num_kept: int
    question: tuple[Span, ...]

    @property
    def num_pruned(self) -> int:
        return self.length - self.num_kept


@dataclass(frozen=True, slots=True)
class PrunedTurn:
    """The pruned videos that share one decision point, in prompt order."""

    videos: tuple[PrunedVideo, ...]
    end: int

    @property
    def start(self) -> int:
        return self.videos[0].start

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def num_pruned(self) -> int:
        return sum(video.num_pruned for video in self.videos)


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """All pruned turns of one prompt, in prompt order and at least one."""

    turns: tuple[PrunedTurn, ...]

    @property
    def start(self) -> int:
        """First position at which full and compact positions may differ."""
        return self.turns[0].start

    @property
    def longest_range(self) -> int:
        """Tokens of the longest atomic range: what one step must be able to hold."""
        return max(turn.length for turn in self.turns)

    def num_pruned(self, num_tokens: int) -> int:
        """How many of the first ``num_tokens`` tokens the upper layers do not hold.

        Raises:
            ValueError: ``num_tokens`` ends inside an atomic range, where the answer is undefined.
        """
        pruned = 0
        for turn in self.turns:
            if num_tokens <= turn.start:
                break
            if num_tokens < turn.end:
                raise ValueError(
                    f"position {num_tokens} is inside the atomic range [{turn.start}, {turn.end})"
                )
            pruned += turn.num_pruned
        return pruned

    def compact_length(self, num_tokens: int) -> int:
        """Upper-layer tokens of the first ``num_tokens`` tokens."""
        return num_tokens - self.num_pruned(num_tokens)

    def range_start(self, num_tokens: int) -> int:
        """The largest chunk end that is at most ``num_tokens`` and splits no atomic range."""
        for turn in self.turns:
            if turn.start < num_tokens < turn.end:
                return turn.start
        return num_tokens

    def range_end(self, num_tokens: int) -> int:
        """The smallest chunk end that is at least ``num_tokens`` and splits no atomic range."""
        for turn in self.turns:
            if turn.start < num_tokens < turn.end:
                return turn.end
        return num_tokens


def build_plan(
    prompt_token_ids: Sequence[int],
    media: Sequence[MediaSpan],
    *,
    retention_ratio: float,
    turn_end_token_id: int,
    block_size: int | None,
) -> PrunePlan | None:
    """Plan the pruning of one prompt.

    Args:
        prompt_token_ids: The expanded prompt, one token per placeholder.
        media: Every image and video, in prompt order.
        retention_ratio: Fraction of each video's tokens to keep, in (0, 1].
        turn_end_token_id: The token that ends a chat turn.
        block_size: Tokens in a KV block where prefix caching is on, so that a turn loses whole
            blocks and positions after it keep their place in a block; ``None`` where it is off.

    Returns:
        The plan, or ``None`` where nothing is pruned.
    """
    turns: dict[int, list[PrunedVideo]] = {}
    for index, item in enumerate(media):
        if not item.is_video:
            continue
        end = _decision_point(prompt_token_ids, item.end, turn_end_token_id)
        video = PrunedVideo(
            media_index=index,
            start=item.start,
            length=item.length,
            num_kept=num_kept(item.length, retention_ratio),
            question=_text_spans(item.end, end, media),
        )
        turns.setdefault(end, []).append(video)
    pruned = []
    for end, videos in turns.items():
        kept = [v for v in _whole_blocks(videos, block_size) if v.num_pruned]
        if kept:
            pruned.append(PrunedTurn(videos=tuple(kept), end=end))
    return PrunePlan(tuple(pruned)) if pruned else None


def _decision_point(prompt_token_ids: Sequence[int], start: int, turn_end_token_id: int) -> int:
    """Position just past the first turn end at or after ``start``; else the prompt's length."""
    for position in range(start, len(prompt_token_ids)):
        if prompt_token_ids[position] == turn_end_token_id:
            return position + 1
    return len(prompt_token_ids)


def _text_spans(start: int, end: int, media: Sequence[MediaSpan]) -> tuple[Span, ...]:
    """The parts of ``[start, end)`` that no media item covers."""
    spans = []
    first = bisect_left(media, start, key=lambda item: item.start)
    for item in media[first:]:
        if item.start >= end:
            break
        if item.start > start:
            spans.append((start, item.start))
        start = item.end
    if start < end:
        spans.append((start, end))
    return tuple(spans)


def _whole_blocks(videos: list[PrunedVideo], block_size: int | None) -> list[PrunedVideo]:
    """Give tokens back, from the last video to the first, until whole blocks are pruned."""
    if block_size is None:
        return videos
    surplus = sum(video.num_pruned for video in videos) % block_size
    rounded = []
    for video in reversed(videos):
        back = min(surplus, video.num_pruned)
        surplus -= back
        rounded.append(replace(video, num_kept=video.num_kept + back))
    return rounded[::-1]
