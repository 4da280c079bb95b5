"""The prune plan of one prompt: integers only, the same on the scheduler and on every worker.

Which tokens are kept depends on data. How many are kept, and therefore every length, block count
and slot of the upper layers, is a function of the prompt alone. Both sides build the plan from the
request, so nothing has to be sent between them.

Terms: a *turn* is a stretch of the prompt whose videos share one decision point. Its *range*
``[start, end)`` runs from its first pruned video to that point. Chunks may end anywhere in it;
until the decision point is reached the upper layers hold nothing of it, and its rows wait. Past
``decided``, the end of the last video that loses tokens, every token is kept, so that a
prefix-cache hit may end there: the turn has then been decided, by whoever filled the cache.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from vllm_dpp.pruning.budget import num_kept

Span = tuple[int, int]
"""Half-open range of prompt positions."""
Grid = tuple[int, int, int]
"""Slices, rows and columns of a video's tokens."""


@dataclass(frozen=True, slots=True)
class MediaSpan:
    """Where one image or video stands in the prompt.

    Args:
        start: First prompt position.
        length: Number of positions.
        is_prunable: Whether it may lose tokens, as videos may.
        num_text: How many of the positions hold text, such as the time of a slice.
    """

    start: int
    length: int
    is_prunable: bool
    num_text: int = 0

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def num_tokens(self) -> int:
        """The item's own."""
        return self.length - self.num_text


@dataclass(frozen=True, slots=True)
class PrunedVideo:
    """The part of one video that loses tokens: all of it but a short tail, or a piece.

    An image that is pruned, too, is a video of one slice.

    Text between its slices always stays. How much there is, is known; where it stands is not asked:
    up for selection are the first ``length`` of the video's own tokens, and they all lie before
    ``end``, of whose positions beyond there are no more than there are tokens in the tail.

    Args:
        start: First prompt position.
        length: Tokens that are up for selection.
        num_kept: Tokens of these in the upper layers, in [0, length).
        num_tail: Tokens of the video after these, which are kept whatever they show.
        question: Text positions between the video and the decision point.
        piece_of: First prompt position of the video of which this is a piece that is decided by
            itself; ``None`` for a whole video.
        num_text: Positions in [start, end) that are not up for selection: text, and tokens of the
            tail, so far as there is text behind them.
    """

    start: int
    length: int
    num_kept: int
    num_tail: int
    question: tuple[Span, ...]
    piece_of: int | None = None
    num_text: int = 0

    @property
    def media_start(self) -> int:
        """First prompt position of the whole video."""
        return self.start if self.piece_of is None else self.piece_of

    @property
    def end(self) -> int:
        return self.start + self.length + self.num_text

    @property
    def length_with_tail(self) -> int:
        return self.length + self.num_tail

    @property
    def num_pruned(self) -> int:
        return self.length - self.num_kept

    @property
    def question_length(self) -> int:
        return sum(b - a for a, b in self.question)


@dataclass(frozen=True, slots=True)
class PrunedTurn:
    """The pruned videos that share one decision point, in prompt order."""

    videos: tuple[PrunedVideo, ...]
    end: int

    @property
    def start(self) -> int:
        return self.videos[0].start

    @property
    def decided(self) -> int:
        """End of the last pruned video."""
        return self.videos[-1].end

    @property
    def is_piece(self) -> bool:
        """Whether it is a piece of a video, and no more."""
        return self.videos[0].piece_of is not None

    @property
    def length(self) -> int:
        """Rows that wait while the turn is read over several steps."""
        return self.end - self.start

    @property
    def num_pruned(self) -> int:
        return sum(video.num_pruned for video in self.videos)


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """All pruned turns of one prompt, in prompt order and at least one.

    Args:
        turns: The turns.
        end: Past the last of them: from here on nothing is decided any more.
        num_pruned: Tokens of the prompt that the upper layers will not hold.
    """

    turns: tuple[PrunedTurn, ...]
    end: int = field(init=False, compare=False, repr=False)
    num_pruned: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "end", self.turns[-1].end)
        object.__setattr__(self, "num_pruned", sum(turn.num_pruned for turn in self.turns))

    @property
    def start(self) -> int:
        """First position at which full and compact positions may differ."""
        return self.turns[0].start

    def compact_length(self, num_tokens: int) -> int:
        """Upper-layer tokens when the first ``num_tokens`` tokens have been computed."""
        if num_tokens >= self.end:
            return num_tokens - self.num_pruned
        pruned = 0
        for turn in self.turns:
            if num_tokens <= turn.start:
                break
            if num_tokens < turn.end:
                return turn.start - pruned
            pruned += turn.num_pruned
        return num_tokens - pruned

    def turn_at(self, num_tokens: int) -> PrunedTurn | None:
        """The turn that is being read when ``num_tokens`` tokens have been computed."""
        for turn in self.turns:
            if turn.start < num_tokens < turn.end:
                return turn
        return None

    def turns_in(self, start: int, end: int) -> list[PrunedTurn]:
        """The turns that are read, in part at least, by a chunk of positions [start, end)."""
        return [turn for turn in self.turns if start < turn.end and turn.start < end]

    def hit_length(self, num_tokens: int, block_size: int) -> int:
        """The longest prefix, at most ``num_tokens``, at which a cache hit may end."""
        for turn in reversed(self.turns):
            if turn.start < num_tokens < turn.decided:
                num_tokens = turn.start
        return num_tokens // block_size * block_size

    def after_hit(self, num_cached: int) -> "PrunePlan":
        """The plan of a request whose first ``num_cached`` tokens came from the prefix cache.

        A turn that the hit goes past has been decided, even where the hit ends before its
        decision point: it ends where its pruned tokens end, and nothing of it is left to read.
        """
        if num_cached <= self.start:
            return self
        return PrunePlan(
            tuple(
                replace(turn, end=turn.decided) if turn.decided <= num_cached < turn.end else turn
                for turn in self.turns
            )
        )


def build_plan(
    prompt_token_ids: Sequence[int],
    media: Sequence[MediaSpan],
    *,
    retention_ratio: float,
    turn_end_token_id: int | None,
    block_size: int | None,
    piece_length: int | None = None,
) -> PrunePlan | None:
    """Plan the pruning of one prompt.

    Args:
        prompt_token_ids: The expanded prompt, one token per placeholder.
        media: Every image and video, in prompt order.
        retention_ratio: Fraction of each video's tokens to keep, in (0, 1].
        turn_end_token_id: The token that ends a chat turn, after which the videos of the turn are
            decided; ``None`` decides each video at its own end, without a question.
        block_size: Tokens in a KV block where prefix caching is on, ``None`` where it is off. A
            turn then loses whole blocks, so that positions after it keep their place in a block,
            and its pruned tokens end with a block, so that a hit may end right after them.
        piece_length: Without a question, decide each video in pieces of so many tokens, each as it
            is read; ``None`` decides it as a whole.

    Returns:
        The plan, or ``None`` where nothing is pruned.
    """
    turns: dict[int, list[PrunedVideo]] = {}
    for item in media:
        if not item.is_prunable:
            continue
        end = item.end
        if turn_end_token_id is not None:
            end = _decision_point(prompt_token_ids, item.end, turn_end_token_id)
        video = PrunedVideo(
            start=item.start,
            length=item.num_tokens,
            num_kept=num_kept(item.num_tokens, retention_ratio),
            num_tail=0,
            question=_text_spans(item.end, end, media),
            num_text=item.num_text,
        )
        turns.setdefault(end, []).append(video)
    pruned: list[PrunedTurn] = []
    for end, videos in turns.items():
        if piece_length is not None:
            (video,) = videos
            pruned += _pieces(video, retention_ratio, block_size or 1, piece_length)
            continue
        if block_size is not None:
            videos = _on_blocks(videos, retention_ratio, block_size)
        kept = tuple(video for video in videos if video.num_pruned)
        if kept:
            question_decides = turn_end_token_id is not None
            pruned.append(PrunedTurn(kept, end if question_decides else kept[-1].end))
    return PrunePlan(tuple(pruned)) if pruned else None


def loses_a_block(block_size: int, retention_ratio: float) -> int:
    """Tokens of which a video alone in its turn loses a KV block, wherever in the prompt it stands.

    Args:
        block_size: Tokens in a block.
        retention_ratio: Fraction of its tokens to keep, in (0, 1).
    """
    least = int((block_size - 0.5) / (1 - retention_ratio)) + 1  # `num_kept` rounds half up
    return least + block_size - 1  # so much may be its tail


def _pieces(
    video: PrunedVideo, retention_ratio: float, block_size: int, piece_length: int
) -> list[PrunedTurn]:
    """A video as turns of its own, one after the other; what rounding leaves is carried on."""
    end = video.end // block_size * block_size
    turns, at, pruned = [], video.start, 0
    while at < end:
        stop = max((at + piece_length) // block_size, at // block_size + 1) * block_size
        stop = min(stop, end)
        read = stop - video.start
        due = read - num_kept(read, retention_ratio) - pruned
        lost = min(due, stop - at - 1) // block_size * block_size
        if lost > 0:
            piece = replace(
                video,
                start=at,
                length=stop - at,
                num_kept=stop - at - lost,
                num_tail=video.end - stop if stop == end else 0,
                piece_of=video.start,
            )
            turns.append(PrunedTurn((piece,), stop))
            pruned += lost
        at = stop
    return turns


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


def _on_blocks(
    videos: list[PrunedVideo], retention_ratio: float, block_size: int
) -> list[PrunedVideo]:
    """Keep so much more of a turn that whole blocks are pruned, and the last ends with a block.

    A video that would lose nothing is left out, and the one before it is the last.
    """
    while videos:
        last = _end_with_a_block(videos[-1], retention_ratio, block_size)
        if last is not None:
            rounded = _whole_blocks([*videos[:-1], last], block_size)
            if rounded[-1].num_pruned:
                return rounded
        videos = videos[:-1]
    return []


def _end_with_a_block(
    video: PrunedVideo, retention_ratio: float, block_size: int
) -> PrunedVideo | None:
    """The video with the tokens after the last whole block as its tail."""
    tail = video.end % block_size
    if tail >= video.length:
        return None
    length = video.length - tail
    kept = num_kept(length, retention_ratio)
    return replace(video, length=length, num_kept=kept, num_tail=tail)


def _whole_blocks(videos: list[PrunedVideo], block_size: int) -> list[PrunedVideo]:
    """Give tokens back, from the last video to the first, until whole blocks are pruned."""
    surplus = sum(video.num_pruned for video in videos) % block_size
    rounded = []
    for video in reversed(videos):
        back = min(surplus, video.num_pruned)
        surplus -= back
        rounded.append(replace(video, num_kept=video.num_kept + back))
    return rounded[::-1]
