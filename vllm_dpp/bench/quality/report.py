"""From the JSON document to tables in Markdown."""

from collections.abc import Callable, Mapping
from functools import partial
from statistics import fmean
from typing import Any

from vllm_dpp.bench.quality.arms import FULL
from vllm_dpp.bench.quality.results import LEVEL
from vllm_dpp.bench.summary import table


def render(document: Mapping[str, Any]) -> str:
    """All tables, as Markdown with the numbers aligned."""
    parts = []
    for split in document["splits"]:
        count = split["num_questions"]
        seeds = "" if split["num_models"] == 1 else f", {split['num_models']} models together"
        parts.append(f"### {split['split'].capitalize()} videos: {count} questions{seeds}")
        if split["left_out"]:
            named = ", ".join(f"{kind} ({100 * x:.0f} %)" for kind, x in split["left_out"].items())
            parts.append(f"Left out, since the unpruned model does not answer them: {named}.")
        commits = sorted({commit for arm in split["arms"] for commit in arm["commits"]})
        parts.append(f"Answers of {', '.join(commits)}.")
        parts.append("± is half of Wilson's 95 % interval, which takes questions for independent.")
        parts.append(_fence(_by_budget(split, "right, % (tokens kept)", _accuracy)))
        for method in split["against"]:
            parts.append(
                f"Points to `{method}`, with the 95 % interval of paired answers, clustered by "
                f"video; `*` where it is called a difference: {100 * LEVEL:g} % for all of this "
                "table together (Holm), and every model has its sign:"
            )
            parts.append(_fence(_by_budget(split, "points", partial(_difference, to=method))))
        if split["num_models"] > 1:
            parts.append("Right, %, of each model:")
            parts.append(_fence(_by_budget(split, "right, %", _of_each_model)))
        for budget in _budgets(split):
            parts.append(f"By kind of question, at {budget:g}:")
            parts.append(_fence(_kind_table(split, budget)))
        if "floors" in split:
            parts.append(
                "Floors: right in % with all of the video dropped before layer K, by model:"
            )
            parts += [_fence(_floor_table(split, floors)) for floors in split["floors"]]
    return "\n\n".join(parts) + "\n"


def _fence(text: str) -> str:
    return f"```\n{text}\n```"


def _budgets(split: Mapping[str, Any]) -> list[float]:
    return sorted({arm["budget"] for arm in split["arms"] if arm["method"] != FULL}, reverse=True)


def _by_budget(
    split: Mapping[str, Any], header: str, cell: Callable[[Mapping[str, Any]], str | None]
) -> str:
    """A row per method, a column per budget; methods without any cell are left out."""
    arms, budgets = {(arm["method"], arm["budget"]): arm for arm in split["arms"]}, _budgets(split)
    rows = []
    for method in dict.fromkeys(arm["method"] for arm in split["arms"]):
        found = [arms.get((method, 1.0 if method == FULL else budget)) for budget in budgets]
        cells = [cell(arm) if arm else None for arm in found]
        if any(cells):
            rows.append([method, *(text or "-" for text in cells)])
    return table([header, *(f"{budget:g}" for budget in budgets)], rows)


def _accuracy(arm: Mapping[str, Any]) -> str:
    half = 50 * (arm["high"] - arm["low"])
    return f"{100 * arm['accuracy']:.1f} ±{half:.1f} ({arm['kept']})"


def _of_each_model(arm: Mapping[str, Any]) -> str:
    return " ".join(f"{100 * accuracy:.1f}" for accuracy in arm["by_model"])


def _difference(arm: Mapping[str, Any], to: str) -> str | None:
    found = arm["points_to"].get(to)
    if found is None:
        return None
    mark = "*" if found["is_called"] else " "
    return f"{found['points']:+.1f} ({found['low']:+.1f}..{found['high']:+.1f}){mark}"


def _kind_table(split: Mapping[str, Any], budget: float) -> str:
    kinds = list(split["arms"][0]["kinds"])
    rows = [
        [
            arm["method"],
            *(_percent(arm["kinds"][kind]) for kind in kinds),
            f"{100 * arm['accuracy']:.1f}",
        ]
        for arm in split["arms"]
        if arm["budget"] == budget or arm["method"] == FULL
    ]
    if "chance" in split:
        chance = (split["chance"].get(kind) for kind in kinds)
        rows.append(["chance", *("" if x is None else f"{100 * x:.0f}" for x in chance), ""])
    return table(["right, %", *kinds, "all"], rows)


def _percent(score: Mapping[str, Any]) -> str:
    return f"{100 * score['right'] / score['asked']:.0f}"


def _floor_table(split: Mapping[str, Any], floors: Mapping[str, Mapping[str, float]]) -> str:
    """Of one model."""
    kinds = [kind for kind in next(iter(floors.values())) if kind not in split["left_out"]]
    rows = [
        [
            f"K = {layer}",
            *(f"{100 * own[kind]:.0f}" for kind in kinds),
            f"{100 * fmean(own[kind] for kind in kinds):.0f}",
        ]
        for layer, own in floors.items()
    ]
    return table(["right, %", *kinds, "mean"], rows)
