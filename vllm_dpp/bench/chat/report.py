"""From rounds to numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vllm_dpp.bench.chat.streams import Arrival
from vllm_dpp.bench.chat.talk import Talk
from vllm_dpp.bench.summary import percentile, spread

STOCK = "stock"
GOAL = 1.5
"""The longest gap of a stream may be this many times stock's."""

Arrivals = Sequence[Mapping[str, Arrival]]
"""Of each round, by arm."""


def differing(talk: Talk, lossless: Sequence[str]) -> list[str]:
    """Requests, as ``arm: request``, whose answers are not stock's."""
    return [
        f"{arm}: {name}"
        for arm in lossless
        for name, asked in talk[arm].items()
        if asked.tokens != talk[STOCK][name].tokens
    ]


def chat_results(
    rounds: Sequence[Talk], kv_bytes: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """By arm and request: tokens, KV bytes and TTFT, the last also against stock's of its round.

    Counts must be the same in all rounds; what is reported is the largest.

    Args:
        rounds: At least one.
        kv_bytes: By arm and request.
    """
    return {
        arm: {
            name: {
                "prompt_tokens": max(talk[arm][name].prompt_tokens for talk in rounds),
                "computed_tokens": max(talk[arm][name].computed_tokens for talk in rounds),
                "kv_bytes": kv_bytes[arm].get(name),
                "ttft_s": spread([talk[arm][name].ttft for talk in rounds]),
                "ttft_to_stock": spread(
                    [talk[arm][name].ttft / talk[STOCK][name].ttft for talk in rounds]
                ),
            }
            for name in requests
        }
        for arm, requests in rounds[0].items()
    }


def stream_results(rounds: Arrivals) -> dict[str, dict[str, Any]]:
    """By arm: the gaps of the streams and the video's TTFT, median, smallest and largest.

    Ratios are to stock in the same round, since machines drift.

    Args:
        rounds: At least one.
    """
    return {
        arm: {
            "prompt_tokens": rounds[0][arm].prompt_tokens,
            "computed_tokens": rounds[0][arm].computed_tokens,
            **{key: spread([of(r[arm]) for r in rounds]) for key, of in MEASURES.items()},
            **{
                f"{key}_to_stock": spread([of(r[arm]) / of(r[STOCK]) for r in rounds])
                for key, of in MEASURES.items()
            },
        }
        for arm in rounds[0]
    }


MEASURES = {
    "quiet_s": lambda arrival: percentile(arrival.quiet_gaps, 50),
    "median_s": lambda arrival: percentile(arrival.gaps, 50),
    "p99_s": lambda arrival: percentile(arrival.gaps, 99),
    "longest_s": lambda arrival: max(arrival.gaps),
    "ttft_s": lambda arrival: arrival.ttft,
}


def meets_goal(streams: Mapping[str, Mapping[str, Any]]) -> dict[str, bool]:
    """By arm but stock: whether the median ratio of the longest gaps is within ``GOAL``."""
    return {
        arm: result["longest_s_to_stock"][0] <= GOAL
        for arm, result in streams.items()
        if arm != STOCK
    }


def raw(rounds: Arrivals) -> list[dict[str, Any]]:
    """All gaps, for JSON, to the tenth of a millisecond."""
    return [{arm: _rounded(asdict(arrival)) for arm, arrival in r.items()} for r in rounds]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value
