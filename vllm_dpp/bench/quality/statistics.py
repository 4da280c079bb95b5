"""Differences between two arms that answered the same questions."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959964


@dataclass(frozen=True)
class Difference:
    """One arm's accuracy less another's.

    Args:
        points: in percent points.
        low: lower end of the 95 % interval.
        high: its upper end.
        p: two-sided, of the normal approximation that the interval is of.
        p_signs: of the exact sign test on clusters: in how many either arm answers more.
    """

    points: float
    low: float
    high: float
    p: float
    p_signs: float


def paired_difference(
    ours: Sequence[bool], theirs: Sequence[bool], groups: Sequence[int]
) -> Difference:
    """Compares right answers question by question.

    The interval is that of a mean of clusters: questions about one video stand or fall together.

    Args:
        ours: right or wrong, by question.
        theirs: the same of the other arm.
        groups: the cluster of each question, at least two different ones.
    """
    sums: dict[int, int] = defaultdict(int)
    for own, other, group in zip(ours, theirs, groups, strict=True):
        sums[group] += int(own) - int(other)
    sizes: dict[int, int] = defaultdict(int)
    for group in groups:
        sizes[group] += 1
    mean = sum(sums.values()) / len(groups)
    residuals = [sums[group] - mean * sizes[group] for group in sizes]
    clusters = len(sizes)
    variance = sum(x * x for x in residuals) * clusters / (clusters - 1) / len(groups) ** 2
    error = math.sqrt(variance)
    low, high = 100 * (mean - _Z * error), 100 * (mean + _Z * error)
    p = math.erfc(abs(mean) / error / math.sqrt(2)) if error else float(mean == 0)
    p_signs = mcnemar(sum(x > 0 for x in sums.values()), sum(x < 0 for x in sums.values()))
    return Difference(100 * mean, low, high, p, p_signs)


def holm(values: Sequence[float]) -> list[float]:
    """The p of each of many comparisons, corrected so that all of them together err at its rate.

    Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 1979.
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, most = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        most = max(most, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = most
    return corrected


def mcnemar(only_ours: int, only_theirs: int) -> float:
    """Two-sided exact p of so unequal a split, if either arm is as likely to be the right one.

    McNemar's test of questions that are independent; of clusters it is the sign test.
    """
    total, less = only_ours + only_theirs, min(only_ours, only_theirs)
    tail = sum(math.comb(total, i) for i in range(less + 1))
    return min(1.0, 2 * tail / 2**total)
