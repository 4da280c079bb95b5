"""Traffic and engine shapes as plain values: what a failing seed prints, and what a test writes."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

TURN_END = 9
PLACEHOLDER = {"video": 7, "image": 8}


@dataclass(frozen=True)
class Text:
    """Equal seeds give equal tokens, so that prompts share prefixes."""

    seed: int
    length: int


@dataclass(frozen=True)
class Answer:
    """What the worker says at these positions: the history of a conversation."""

    length: int


@dataclass(frozen=True)
class Media:
    """A video or an image; equal names are equal items."""

    name: str
    length: int
    kind: str = "video"


@dataclass(frozen=True)
class TurnEnd:
    """Ends a chat turn."""

    length = 1


Part = Text | Answer | Media | TurnEnd


@dataclass(frozen=True)
class Ask:
    """One request.

    Args:
        name: Its request id.
        parts: Its prompt.
        max_tokens: How many tokens it generates.
        step: When it arrives, in calls of ``schedule``.
        ratio: ``dpp_retention_ratio``; ``None`` takes the engine's.
        abort_at: When it is aborted, if it still runs.
        priority: For the policy of that name; smaller goes first.
    """

    name: str
    parts: tuple[Part, ...]
    max_tokens: int = 1
    step: int = 0
    ratio: float | None = None
    abort_at: int | None = None
    priority: int = 0

    @cached_property
    def prompt_length(self) -> int:
        return sum(part.length for part in self.parts)

    @property
    def total_length(self) -> int:
        return self.prompt_length + self.max_tokens

    def placed(self) -> Iterator[tuple[int, Part]]:
        """Every part with its first position."""
        start = 0
        for part in self.parts:
            yield start, part
            start += part.length

    @cached_property
    def media(self) -> tuple[tuple[int, Media], ...]:
        return tuple((start, part) for start, part in self.placed() if isinstance(part, Media))

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        """[total_length] int64: the prompt, and what the worker will answer."""
        pieces = [_tokens(start, part) for start, part in self.placed()]
        return np.concatenate([*pieces, said(self.prompt_length, self.max_tokens)])

    @cached_property
    def identities(self) -> NDArray[np.int64]:
        """[total_length] int64: the tokens, where media count by name and not as placeholders."""
        identities = self.tokens.copy()
        for start, item in self.media:
            identities[start : start + item.length] = zlib.crc32(item.name.encode()) + 1000
        return identities


def said(position: int, length: int) -> NDArray[np.int64]:
    """The worker's answer, a function of positions alone."""
    return 20 + np.arange(position, position + length) % 7


def _tokens(start: int, part: Part) -> NDArray[np.int64]:
    match part:
        case Text(seed, length):
            return 100 + (17 * seed + 3 * np.arange(length)) % 61
        case Answer(length):
            return said(start, length)
        case Media(_, length, kind):
            return np.full(length, PLACEHOLDER[kind])
        case TurnEnd():
            return np.array([TURN_END])


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One engine.

    Args:
        budget: ``max_num_batched_tokens``.
        lower_groups: KV groups that hold every token.
        compact_groups: KV groups that hold kept tokens alone.
        kv_tokens: Tokens of unpruned requests that the KV cache holds.
        encoder_cache: Embeddings that the encoder cache holds; never less than the longest item.
        encoder_budget: Embeddings that the encoder makes in a step; likewise.
        chunk_limit: ``long_prefill_token_threshold``.
        whole_media: ``disable_chunked_mm_input``.
        reserve: ``scheduler_reserve_full_isl``.
        relevance: ``none`` decides each video at its own end.
        piece: ``decide_every``: ... and in pieces of so many tokens.
        deferred: Rows of the buffer for ranges that are read over several steps; ``None``: plenty.
        graphs: Whether steps of single tokens replay a full CUDA graph.
        v2: Whether the scheduler serves the V2 model runner.
    """

    budget: int = 64
    max_num_seqs: int = 8
    block_size: int = 16
    lower_groups: int = 1
    compact_groups: int = 1
    kv_tokens: int = 1024
    encoder_cache: int = 0
    encoder_budget: int = 0
    chunk_limit: int = 0
    caching: bool = True
    policy: str = "fcfs"
    asynchronous: bool = False
    whole_media: bool = False
    reserve: bool = True
    watermark: float = 0.0
    retention_ratio: float = 0.25
    relevance: str = "question"
    piece: int | None = None
    deferred: int | None = None
    graphs: bool = False
    v2: bool = False


PLENTY = 10**6


@dataclass(frozen=True)
class Scenario:
    """An engine and its traffic.

    Args:
        shape: The engine.
        asks: Its requests; those of one step in order of arrival.
        resets: Steps at which all running requests are preempted, to reset the prefix cache.
    """

    shape: Shape
    asks: tuple[Ask, ...]
    resets: tuple[int, ...] = ()

    @property
    def longest_item(self) -> int:
        return max((item.length for ask in self.asks for _, item in ask.media), default=1)
