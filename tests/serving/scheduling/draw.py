"""Random scenarios: one seed, one scenario, always the same."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tests.serving.scheduling.scenario import (
    Answer,
    Ask,
    Media,
    Part,
    Scenario,
    Shape,
    Text,
    TurnEnd,
)
from vllm_dpp.serving import vllm_versions

LAYOUTS = ((1, 1), (1, 2), (2, 1), (1, 3), (0, 1))
RATIOS = (None, None, 1.0, 0.5, 0.25, 0.1, 0.01)
NONSENSE = 7.0
MAX_ASKS = 10


def draw(seed: int) -> Scenario:
    """Scenario number ``seed``."""
    rng = np.random.default_rng(seed)
    budget = int(2 ** rng.uniform(4, 8))
    media = _media(rng, budget)
    asks = _asks(rng, media)
    longest = max(item.length for item in media)
    total = max(ask.total_length for ask in asks)
    block_size = int(rng.choice([4, 5, 8, 16]))
    lower, compact = LAYOUTS[rng.integers(len(LAYOUTS))]
    shape = Shape(
        budget=budget,
        max_num_seqs=int(rng.integers(1, 9)),
        block_size=block_size,
        lower_groups=lower,
        compact_groups=compact,
        kv_tokens=int(total * rng.choice([1, 1.2, 1.5, 2, 4])) + 2 * block_size,
        encoder_cache=int(longest * rng.choice([0, 1, 1.3, 1.9, 2.5])),
        encoder_budget=int(longest * rng.choice([0, 1, 1.3, 2.5])),
        chunk_limit=int(rng.integers(4, budget + 1)) if rng.random() < 0.2 else 0,
        caching=bool(rng.random() < 0.6),
        policy="priority" if rng.random() < 0.2 else "fcfs",
        asynchronous=bool(rng.random() < 0.5),
        whole_media=bool(rng.random() < 0.2 and longest <= budget),
        reserve=bool(rng.random() < 0.5),
        watermark=float(rng.choice([0, 0, 0.05])),
        retention_ratio=float(rng.choice([0.25, 0.5, 0.1, 1.0])),
        **_decision(rng),
        deferred=_deferred(rng, asks),
        graphs=bool(rng.random() < 0.3),
        v2=bool(rng.random() < 0.5),
    )
    if shape.whole_media and not may_be_kept_whole(shape, longest):
        shape = replace(shape, whole_media=False)
    resets = (int(rng.integers(1, 40)),) if rng.random() < 0.05 else ()
    return Scenario(shape, asks, resets)


def may_be_kept_whole(shape: Shape, longest: int) -> bool:
    """Whether vLLM comes to an end with ``disable_chunked_mm_input`` and an item of that length.

    From 0.33 on it waits for ever for a chunk that holds the item.
    """
    limit = min(shape.budget, shape.chunk_limit or shape.budget)
    return vllm_versions.MAY_SPLIT_MEDIA_AT_THEIR_START or longest < limit


def _decision(rng: np.random.Generator) -> dict[str, Any]:
    if rng.random() < 0.7:
        return {"relevance": "question"}
    return {"relevance": "none", "piece": int(rng.integers(1, 80)) if rng.random() < 0.5 else None}


def _deferred(rng: np.random.Generator, asks: Sequence[Ask]) -> int | None:
    """Plenty, or about the longest range; what is longer still is refused."""
    lengths = [_longest_range(ask) for ask in asks]
    factor = rng.choice([0, 0.7, 1, 1, 1.3, 2])
    return int(max(lengths) * factor) + 1 if factor else None


def _longest_range(ask: Ask) -> int:
    longest, start = 0, None
    for position, part in ask.placed():
        if start is None and isinstance(part, Media) and part.kind == "video":
            start = position
        if start is not None:
            longest = max(longest, position + part.length - start)
        if isinstance(part, TurnEnd):
            start = None
    return longest


def _media(rng: np.random.Generator, budget: int) -> list[Media]:
    """A few items, shared among the requests; videos of up to a step, or of several."""
    longest = min(240, budget * (0.8 if rng.random() < 0.5 else 3))
    videos = [
        Media(f"video{i}", int(rng.integers(2, max(4, longest)))) for i in range(rng.integers(1, 5))
    ]
    images = [
        Media(f"image{i}", int(rng.integers(1, max(3, longest / 3))), "image")
        for i in range(rng.integers(0, 3))
    ]
    return videos + images


def _asks(rng: np.random.Generator, media: Sequence[Media]) -> tuple[Ask, ...]:
    asks: list[Ask] = []
    step = 0
    for i in range(rng.integers(1, MAX_ASKS + 1)):
        step += int(rng.choice([0, 0, 1, 3, 20]))
        ask = _ask(rng, media, asks, i)
        abort = step + int(rng.integers(0, 15)) if rng.random() < 0.1 else None
        asks.append(replace(ask, step=step, abort_at=abort))
    return tuple(asks)


def _ask(rng: np.random.Generator, media: Sequence[Media], asks: Sequence[Ask], i: int) -> Ask:
    """A new chat, one of the earlier ones again, or one that goes on."""
    parts: tuple[Part, ...] = ()
    kind = rng.random() if asks else 0.0
    if kind > 0.6:
        earlier = asks[rng.integers(len(asks))]
        parts = earlier.parts
        if kind > 0.75:
            parts += (Answer(int(rng.integers(1, earlier.max_tokens + 1))), TurnEnd())
    if kind <= 0.6 or kind > 0.75:
        parts = parts or (Text(0, int(rng.integers(1, 12))),)
        parts += _turns(rng, media)
    return Ask(
        name=f"r{i}",
        parts=parts,
        max_tokens=int(rng.choice([1, 2, 8, 40], p=[0.3, 0.3, 0.3, 0.1])),
        ratio=RATIOS[rng.integers(len(RATIOS))] if rng.random() < 0.98 else NONSENSE,
        priority=int(rng.integers(0, 3)),
    )


def _turns(rng: np.random.Generator, media: Sequence[Media]) -> tuple[Part, ...]:
    parts: list[Any] = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3, 4])):
            if rng.random() < 0.5:
                parts.append(Text(int(rng.integers(0, 3)), int(rng.integers(1, 10))))
            parts.append(media[rng.integers(len(media))])
        if rng.random() < 0.9:
            long = rng.random() < 0.1
            parts.append(Text(int(rng.integers(0, 3)), int(rng.integers(1, 200 if long else 12))))
        if rng.random() < 0.8:
            parts.append(TurnEnd())
    return tuple(parts)
