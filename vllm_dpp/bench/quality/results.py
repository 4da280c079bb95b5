"""From answers to accuracies and differences, as the JSON file holds them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm_dpp.bench.quality.arms import FULL
from vllm_dpp.bench.quality.statistics import holm, paired_difference
from vllm_dpp.quality.evaluate import Score, Scores, overall

SMALL_POINTS = 4.0
"""A smaller difference is called one only if models of several training seeds agree on it."""

LEVEL = 0.05
"""Of a table of differences as a whole: all that are compared with one method, at all budgets."""

LEAST_UNPRUNED = 0.9
"""Kinds that the model answers less often without pruning say nothing about pruning."""


@dataclass(frozen=True)
class Pool:
    """The answers of all models to one test set.

    Args:
        split: of the test set.
        kinds: of each question, model after model.
        groups: its cluster, the video: what is hard in it may be so for every model.
        num_models: how many.
        arms: by method and budget: kept, share, right as a string of 0 and 1, and the commits of
            the code that gave the answers.
    """

    split: str
    kinds: list[str]
    groups: list[int]
    num_models: int
    arms: dict[tuple[str, float], dict[str, Any]]

    def rights(self, key: tuple[str, float]) -> list[str]:
        """The answers of an arm, by model."""
        right, size = self.arms[key]["right"], len(self.kinds) // self.num_models
        return [right[i * size : (i + 1) * size] for i in range(self.num_models)]


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
        list(groups) * len(answers),
        len(answers),
        {
            key: {
                "kept": answers[0][key]["kept"],
                "share": answers[0][key]["share"],
                "right": "".join(own[key]["right"] for own in answers),
                "commits": sorted({own[key]["commit"] for own in answers}),
            }
            for key in shared
        },
    )


def without_unlearned(pooled: Pool) -> tuple[Pool, dict[str, float]]:
    """Leaves out the kinds that an unpruned model does not answer, if it was asked.

    Returns:
        The others' answers; and the accuracy of the kinds that are left out, unpruned, of the
        model that knows them least.
    """
    if (FULL, 1.0) not in pooled.arms:
        return pooled, {}
    size = len(pooled.kinds) // pooled.num_models
    models = [score_kinds(pooled.kinds[:size], right) for right in pooled.rights((FULL, 1.0))]
    least = {kind: min(own[kind].accuracy for own in models) for kind in models[0]}
    left_out = {kind: round(x, 4) for kind, x in least.items() if x < LEAST_UNPRUNED}
    chosen = [i for i, kind in enumerate(pooled.kinds) if kind not in left_out]
    arms = {
        key: {**arm, "right": "".join(arm["right"][i] for i in chosen)}
        for key, arm in pooled.arms.items()
    }
    kinds = [pooled.kinds[i] for i in chosen]
    groups = [pooled.groups[i] for i in chosen]
    return replace(pooled, kinds=kinds, groups=groups, arms=arms), left_out


def summarise(pooled: Pool, against: Sequence[str]) -> dict[str, Any]:
    """Everything about a split, for JSON.

    Args:
        pooled: the answers.
        against: methods to which the others are compared, at their own budget if they have one.
    """
    pooled, left_out = without_unlearned(pooled)
    arms = [_summarise_arm(pooled, key, against) for key in pooled.arms]
    for name in against:
        _call([arm["points_to"][name] for arm in arms if name in arm["points_to"]])
    return {
        "split": pooled.split,
        "left_out": left_out,
        "num_models": pooled.num_models,
        "num_questions": len(pooled.kinds) // pooled.num_models,
        "against": list(against),
        "arms": arms,
    }


def _summarise_arm(pooled: Pool, key: tuple[str, float], against: Sequence[str]) -> dict[str, Any]:
    arm = pooled.arms[key]
    scores = score_kinds(pooled.kinds, arm["right"])
    total = overall(scores)
    low, high = total.interval()
    others = {name: (name, 1.0 if name == FULL else key[1]) for name in against}
    return {
        "method": key[0],
        "budget": key[1],
        "kept": arm["kept"],
        "share": round(arm["share"], 4),
        "commits": arm["commits"],
        "accuracy": round(total.accuracy, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "by_model": [round(_share_right(right), 4) for right in pooled.rights(key)],
        "kinds": {
            kind: {**asdict(own), "interval": [round(x, 4) for x in own.interval()]}
            for kind, own in scores.items()
        },
        "points_to": {
            name: _difference(pooled, key, other)
            for name, other in others.items()
            if other in pooled.arms and other != key
        },
    }


def _difference(pooled: Pool, key: tuple[str, float], other: tuple[str, float]) -> dict[str, Any]:
    ours, theirs = ([bit == "1" for bit in pooled.arms[one]["right"]] for one in (key, other))
    difference = paired_difference(ours, theirs, pooled.groups)
    by_model = [
        100 * (_share_right(own) - _share_right(theirs))
        for own, theirs in zip(pooled.rights(key), pooled.rights(other), strict=True)
    ]
    return {
        **{name: float(f"{value:.6g}") for name, value in asdict(difference).items()},
        "by_model": [round(points, 4) for points in by_model],
    }


def _call(differences: Sequence[dict[str, Any]]) -> None:
    """Adds to each of a table of them its corrected p and whether it is called a difference."""
    corrected = holm([difference["p"] for difference in differences])
    for difference, p in zip(differences, corrected, strict=True):
        difference["p_holm"] = float(f"{p:.6g}")
        difference["is_called"] = is_called(difference["points"], p, difference["by_model"])


def is_called(points: float, p: float, by_model: Sequence[float]) -> bool:
    """Whether it is called a difference: it is clear, and all models have its sign.

    Args:
        points: of all answers.
        p: corrected for the number of comparisons.
        by_model: points of each model alone. If there is only one, they must be many.
    """
    is_shared = all(own * points > 0 for own in by_model)
    is_enough = len(by_model) > 1 or abs(points) >= SMALL_POINTS
    return p < LEVEL and is_shared and is_enough


def _share_right(right: str) -> float:
    return right.count("1") / len(right)


def score_kinds(kinds: Sequence[str], right: str) -> Scores:
    """Scores by kind, from a string of 0 and 1."""
    scores: Scores = {}
    for kind, bit in zip(kinds, right, strict=True):
        scores[kind] = scores.get(kind, Score(0, 0)) + Score(int(bit), 1)
    return scores
