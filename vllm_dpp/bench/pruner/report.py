"""From times of the pruner benchmark to tables for people and fields for JSON."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import linear_regression, median
from typing import Any

from vllm_dpp.bench.pruner.arms import ARMS, GRAM, KEEP_INDICES, ORIGINAL
from vllm_dpp.bench.pruner.problem import Case
from vllm_dpp.bench.summary import spread, spread_text, table

MIB = 2**20
FEWEST_SIZES = 3  # from which growth is fitted


def case_as_json(
    case: Case,
    *,
    judged_segments: int,
    skipped: Mapping[str, str],
    checked: Mapping[str, Mapping[str, int]],
    seconds: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """All that is known of one case.

    Args:
        case: its size.
        judged_segments: how many segments the reference has judged.
        skipped: by arm, why it did not run.
        checked: by arm, ``near_ties`` where it was judged and ``peak_bytes``.
        seconds: by arm, of every round.
    """
    ours = next((seconds[name] for name in KEEP_INDICES if name in seconds), None)
    return {
        **asdict(case),
        "num_tokens": case.num_tokens,
        "num_kept": case.num_kept,
        "judged_segments": judged_segments,
        "skipped": dict(skipped),
        "arms": {
            name: {
                "seconds": list(taken),
                "median_seconds": median(taken),
                "over_gram": ratio_of_rounds(taken, seconds.get(GRAM)),
                "over_keep_indices": ratio_of_rounds(taken, ours),
                "speedup_over_original": ratio_of_rounds(seconds.get(ORIGINAL), taken),
                **checked[name],
            }
            for name, taken in seconds.items()
        },
    }


def ratio_of_rounds(
    numerator: Sequence[float] | None, denominator: Sequence[float] | None
) -> tuple[float, float, float] | None:
    """Median, smallest and largest ratio of the same round; machines drift between rounds."""
    if numerator is None or denominator is None:
        return None
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def growth_of(cases: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By series and arm: how median time grows with N, where an arm ran at enough sizes."""
    growth: dict[str, dict[str, Any]] = {}
    for series in dict.fromkeys(case["series"] for case in cases if case["series"]):
        for name in ARMS:
            points = points_of(cases, series, name)
            if len(points) >= FEWEST_SIZES:
                growth.setdefault(series, {})[name] = {
                    "exponent": exponent(points),
                    "sizes": [num_tokens for num_tokens, _ in points],
                    "seconds_per_token": [seconds / tokens for tokens, seconds in points],
                    "peak_bytes": [arm["peak_bytes"] for arm in arms_of(cases, series, name)],
                }
    return growth


def points_of(
    cases: Sequence[Mapping[str, Any]], series: str, name: str
) -> list[tuple[int, float]]:
    """N and median seconds of an arm at the sizes of a series."""
    return [(arm["num_tokens"], arm["median_seconds"]) for arm in arms_of(cases, series, name)]


def arms_of(cases: Sequence[Mapping[str, Any]], series: str, name: str) -> list[dict[str, Any]]:
    """What is known of one arm at each size of a series where it ran, and ``num_tokens``."""
    return [
        {**case["arms"][name], "num_tokens": case["num_tokens"]}
        for case in cases
        if case["series"] == series and name in case["arms"]
    ]


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """The p of ``seconds ~ N ** p``: the least-squares slope in logarithms."""
    sizes, seconds = zip(*points, strict=True)
    return linear_regression(list(map(math.log, sizes)), list(map(math.log, seconds))).slope


def render(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Title and text of each table of the JSON document."""
    width = max(map(len, document["arms"]))
    yield "Arms", "\n".join(f"{name:{width}} {ARMS[name].meaning}" for name in document["arms"])
    for case in document["cases"]:
        yield _title(case), _case(case)
    for series, arms in document["growth"].items():
        yield f"Growth of time with N: {series}", _growth(arms)


def _title(case: Mapping[str, Any]) -> str:
    size = Case(**{key: case[key] for key in Case.__dataclass_fields__})
    return f"{size}; {case['judged_segments']} of {case['num_segments']} segments judged"


def _case(case: Mapping[str, Any]) -> str:
    header = (
        "arm",
        "ms (min..max)",
        "x bare Gram",
        "x keep_indices",
        "speed-up over original",
        "peak MiB",
        "near-ties",
    )
    rows = [
        (
            name,
            spread_text(spread([1000 * seconds for seconds in arm["seconds"]]), 2),
            _ratio(arm["over_gram"]),
            _ratio(arm["over_keep_indices"]),
            _ratio(arm["speedup_over_original"]),
            _mib(arm["peak_bytes"]),
            str(arm.get("near_ties", "-")),
        )
        for name, arm in case["arms"].items()
    ]
    skipped = [f"{name}: not run, {reason}" for name, reason in case["skipped"].items()]
    return "\n".join([table(header, rows), *skipped])


def _ratio(values: Sequence[float] | None) -> str:
    return "-" if values is None else spread_text((values[0], values[1], values[2]), 2)


def _mib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / MIB:.1f}"


def _growth(arms: Mapping[str, Any]) -> str:
    header = (
        "arm",
        "N",
        "p of time ~ N^p",
        "us a token",
        "at largest N",
        "peak MiB",
        "at largest N",
    )
    rows = []
    for name, fit in arms.items():
        sizes, seconds, peaks = (fit[key] for key in ("sizes", "seconds_per_token", "peak_bytes"))
        cells = (f"{sizes[0]}..{sizes[-1]}", f"{fit['exponent']:.2f}")
        times = (f"{1e6 * seconds[at]:.1f}" for at in (0, -1))
        rows.append((name, *cells, *times, *(_mib(peaks[at]) for at in (0, -1))))
    return table(header, rows)
