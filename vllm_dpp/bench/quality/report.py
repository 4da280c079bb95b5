"""From answers to accuracies, differences, tables and JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from vllm_dpp.bench.quality.arms import FULL
from vllm_dpp.bench.quality.statistics import Difference, paired_difference
from vllm_dpp.bench.summary import table
from vllm_dpp.quality.evaluate import Score, Scores, overall

SMALL_POINTS = 4.0
"""A smaller difference is called one only if two models were trained, from different seeds."""


LEAST_UNPRUNED = 0.9
"""Kinds that the model answers less often without pruning say nothing about pruning."""


@dataclass(frozen=True)
class Pool:
    """The answers of all models to one test set.

    Args:
        split: of the test set.
        kinds: of each question, model after model.
        groups: its cluster: the model and the video.
        num_models: how many.
        arms: by method and budget: kept, share, and right as a string of 0 and 1.
    """

    split: str
    kinds: list[str]
    groups: list[int]
    num_models: int
    arms: dict[tuple[str, float], dict[str, Any]]


def pool(
    split: str,
    kinds: Sequence[str],
    groups: Sequence[int],
    answers: Sequence[Mapping[tuple[str, float], Mapping[str, Any]]],
) -> Pool:
    """Joins the answers of several models to the same questions; arms that all of them have."""
    shared = [key for key in answers[0] if all(key in own for own in answers)]
    return Pool(
        split,
        list(kinds) * len(answers),
        [(max(groups) + 1) * i + group for i in range(len(answers)) for group in groups],
        len(answers),
        {
            key: {
                "kept": answers[0][key]["kept"],
                "share": answers[0][key]["share"],
                "right": "".join(own[key]["right"] for own in answers),
            }
            for key in shared
        },
    )


def without_unlearned(pooled: Pool) -> tuple[Pool, dict[str, float]]:
    """Leaves out the kinds that the unpruned model does not answer, if it was asked.

    Returns:
        The others' answers; and the accuracy, unpruned, of the kinds that are left out.
    """
    if (FULL, 1.0) not in pooled.arms:
        return pooled, {}
    full = score_kinds(pooled.kinds, pooled.arms[FULL, 1.0]["right"])
    left_out = {
        kind: round(own.accuracy, 4) for kind, own in full.items() if own.accuracy < LEAST_UNPRUNED
    }
    chosen = [i for i, kind in enumerate(pooled.kinds) if kind not in left_out]
    arms = {
        key: {**arm, "right": "".join(arm["right"][i] for i in chosen)}
        for key, arm in pooled.arms.items()
    }
    kinds = [pooled.kinds[i] for i in chosen]
    groups = [pooled.groups[i] for i in chosen]
    return replace(pooled, kinds=kinds, groups=groups, arms=arms), left_out


def summarise(pooled: Pool, against: str) -> dict[str, Any]:
    """Everything about a split, for JSON.

    Args:
        pooled: the answers.
        against: method to which the others are compared at their own budget.
    """
    pooled, left_out = without_unlearned(pooled)
    return {
        "split": pooled.split,
        "left_out": left_out,
        "num_models": pooled.num_models,
        "num_questions": len(pooled.kinds) // pooled.num_models,
        "against": against,
        "arms": [_summarise_arm(pooled, key, against) for key in pooled.arms],
    }


def _summarise_arm(pooled: Pool, key: tuple[str, float], against: str) -> dict[str, Any]:
    arm = pooled.arms[key]
    scores = score_kinds(pooled.kinds, arm["right"])
    total = overall(scores)
    low, high = total.interval()
    summary = {
        "method": key[0],
        "budget": key[1],
        "kept": arm["kept"],
        "share": round(arm["share"], 4),
        "accuracy": round(total.accuracy, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "kinds": {
            kind: {**asdict(own), "interval": [round(x, 4) for x in own.interval()]}
            for kind, own in scores.items()
        },
    }
    for name, other in (("to_full", (FULL, 1.0)), ("to_against", (against, key[1]))):
        if other in pooled.arms and other != key:
            summary[name] = _difference(pooled, key, other)
    return summary


def _difference(
    pooled: Pool, key: tuple[str, float], other: tuple[str, float]
) -> dict[str, float | bool]:
    ours, theirs = ([bit == "1" for bit in pooled.arms[one]["right"]] for one in (key, other))
    difference = paired_difference(ours, theirs, pooled.groups)
    numbers = {name: round(value, 4) for name, value in asdict(difference).items()}
    return {**numbers, "is_called": is_called(difference, pooled.num_models)}


def is_called(difference: Difference, num_models: int) -> bool:
    """Whether it is called a difference."""
    is_large = abs(difference.points) >= SMALL_POINTS
    return difference.is_clear and (is_large or num_models > 1)


def score_kinds(kinds: Sequence[str], right: str) -> Scores:
    """Scores by kind, from a string of 0 and 1."""
    scores: Scores = {}
    for kind, bit in zip(kinds, right, strict=True):
        scores[kind] = scores.get(kind, Score(0, 0)) + Score(int(bit), 1)
    return scores


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
        parts.append(_fence(_overall_table(split)))
        parts.append(
            f"Points to `{split['against']}` at the same budget, with the 95 % interval of paired "
            "answers; `*` where it is called a difference:"
        )
        parts.append(_fence(_difference_table(split)))
        for budget in _budgets(split):
            parts.append(f"By kind of question, at {budget:g}:")
            parts.append(_fence(_kind_table(split, budget)))
        if "floors" in split:
            parts.append("Floors: right in % with all of the video dropped before layer K:")
            parts.append(_fence(_floor_table(split)))
    return "\n\n".join(parts) + "\n"


def _fence(text: str) -> str:
    return f"```\n{text}\n```"


def _budgets(split: Mapping[str, Any]) -> list[float]:
    return sorted({arm["budget"] for arm in split["arms"] if arm["method"] != FULL}, reverse=True)


def _methods(split: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(arm["method"] for arm in split["arms"]))


def _by_key(split: Mapping[str, Any]) -> dict[tuple[str, float], Mapping[str, Any]]:
    return {(arm["method"], arm["budget"]): arm for arm in split["arms"]}


def _overall_table(split: Mapping[str, Any]) -> str:
    """Accuracy in %, half the interval, and tokens kept."""
    arms, budgets = _by_key(split), _budgets(split)
    rows = []
    for method in _methods(split):
        cells = []
        for budget in budgets:
            arm = arms.get((method, 1.0 if method == FULL else budget))
            if arm is None:
                cells.append("-")
                continue
            half = 50 * (arm["high"] - arm["low"])
            cells.append(f"{100 * arm['accuracy']:.1f} ±{half:.1f} ({arm['kept']})")
        rows.append([method, *cells])
    return table(["right, % (tokens kept)", *(f"{budget:g}" for budget in budgets)], rows)


def _difference_table(split: Mapping[str, Any]) -> str:
    arms, budgets = _by_key(split), _budgets(split)
    rows = []
    for method in _methods(split):
        found = [arms.get((method, budget), {}).get("to_against") for budget in budgets]
        if any(found):
            rows.append([method, *map(_difference_cell, found)])
    return table(["points", *(f"{budget:g}" for budget in budgets)], rows)


def _difference_cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
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
        rows.append(["chance", *(f"{100 * split['chance'][kind]:.0f}" for kind in kinds), ""])
    return table(["right, %", *kinds, "all"], rows)


def _percent(score: Mapping[str, Any]) -> str:
    return f"{100 * score['right'] / score['asked']:.0f}"


def _floor_table(split: Mapping[str, Any]) -> str:
    floors = split["floors"]
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
