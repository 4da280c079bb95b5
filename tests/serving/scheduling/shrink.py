"""From a failing scenario to the smallest that still fails."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.serving.scheduling.scenario import Answer, Ask, Media, Part, Scenario, Shape, Text

PLAIN = Shape()
SIMPLER_SHAPE = (
    "asynchronous",
    "v2",
    "watermark",
    "reserve",
    "policy",
    "whole_media",
    "chunk_limit",
    "caching",
    "lower_groups",
    "compact_groups",
    "encoder_cache",
    "encoder_budget",
    "kv_tokens",
    "piece",
    "relevance",
    "graphs",
    "deferred",
    "retention_ratio",
    "max_num_seqs",
)
SIMPLER_ASK = {"abort_at": None, "max_tokens": 1, "step": 0, "priority": 0, "ratio": None}


def shrink(scenario: Scenario, fails: Callable[[Scenario], bool]) -> Scenario:
    """Take things away for as long as it fails."""
    progress = True
    while progress:
        progress = False
        for smaller in _smaller(scenario):
            if smaller.asks and smaller != scenario and fails(smaller):
                scenario, progress = smaller, True
                break
    return scenario


def _smaller(scenario: Scenario) -> Iterator[Scenario]:
    shape, asks = scenario.shape, scenario.asks
    if scenario.resets:
        yield Scenario(shape, asks)
    for i in range(len(asks)):
        yield replace(scenario, asks=asks[:i] + asks[i + 1 :])
    for name in SIMPLER_SHAPE:
        simple = getattr(PLAIN, name)
        if getattr(shape, name) != simple:
            yield replace(scenario, shape=replace(shape, **{name: simple}))
    for i, ask in enumerate(asks):
        for simpler in _simpler(ask):
            yield replace(scenario, asks=asks[:i] + (simpler,) + asks[i + 1 :])
    for name in sorted({item.name for ask in asks for _, item in ask.media}):
        for length in (8, 4, 1):
            shorter = tuple(_shorter_media(ask, name, length) for ask in asks)
            yield replace(scenario, asks=shorter)
    for size in (64, 32, 16):
        if size < shape.budget:
            yield replace(scenario, shape=replace(shape, budget=size))


def _simpler(ask: Ask) -> Iterator[Ask]:
    for j in range(len(ask.parts)):
        if len(ask.parts) > 1:
            yield replace(ask, parts=ask.parts[:j] + ask.parts[j + 1 :])
    for name, simple in SIMPLER_ASK.items():
        if getattr(ask, name) != simple:
            yield replace(ask, **{name: simple})
    for j, part in enumerate(ask.parts):
        if isinstance(part, Text | Answer) and part.length > 1:
            for length in {1, part.length // 2}:
                shorter = replace(part, length=length)
                yield replace(ask, parts=ask.parts[:j] + (shorter,) + ask.parts[j + 1 :])


def _shorter_media(ask: Ask, name: str, by: int) -> Ask:
    def shorter(part: Part) -> Part:
        if isinstance(part, Media) and part.name == name and part.length > by:
            return replace(part, length=part.length - by)
        return part

    return replace(ask, parts=tuple(shorter(part) for part in ask.parts))
