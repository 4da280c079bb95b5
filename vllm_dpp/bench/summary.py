"""Numbers over repeats, and tables of them. Shared by all benchmarks."""

from collections.abc import Sequence
from statistics import median

Spread = tuple[float, float, float]
"""Median, smallest and largest."""


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the nearest ranks.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def spread(values: Sequence[float]) -> Spread:
    return median(values), min(values), max(values)


def spread_text(values: Spread, digits: int = 3) -> str:
    """``median (smallest..largest)``."""
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low}..{high})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows)])
