"""Time against N, drawn from the document of the pruner benchmark."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vllm_dpp.bench.pruner.arms import ARMS, CHANGE, GRAM, NAMES
from vllm_dpp.bench.pruner.report import arms_of, exponent, points_of

# The Okabe-Ito palette and one of Tol's, which most colour-blind readers can tell apart.
COLOURS = {
    "original": "#000000",
    "per-segment": "#E69F00",
    "cdpruner": "#CC79A7",
    "torch": "#56B4E9",
    "compiled": "#0072B2",
    "fused": "#009E73",
    NAMES: "#F0E442",
    CHANGE: "#882255",
    "torch.compile": "#D55E00",
    GRAM: "#777777",
}


def drawable(series: Iterable[str | None]) -> list[str]:
    """The series that make a line: those of two cases or more, given the series of each case.

    Raises:
        ValueError: there is none, or matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401  (asked for before minutes of measuring)
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'vllm-dpp[bench]'") from error
    names = [name for name, count in Counter(series).items() if name and count > 1]
    if not names:
        raise ValueError("--plot needs two --sizes or more")
    return names


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Write a picture with one panel per series of sizes, one line per arm.

    Args:
        document: what the JSON file holds.
        path: of a PNG, or another format that matplotlib knows by its suffix.

    Raises:
        ValueError: there is nothing to draw, or nothing to draw with.
    """
    cases = document["cases"]
    series = drawable(case["series"] for case in cases)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5 * len(series), 5.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(series), squeeze=False)[0], series, strict=True):
        _panel(axes, cases, name)
    figure.suptitle(
        f"One selection: median of {document['repeats']} rounds, with the fastest and the slowest\n"
        f"{_where(document)}, {document['dtype']} features",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _where(document: Mapping[str, Any]) -> str:
    machine = document["provenance"]["machine"]
    if document["device"] == "cuda":
        return ", ".join(machine["gpus"])
    return f"{machine['cpu']}, {document['threads']} threads"


def _panel(axes: Any, cases: list[Mapping[str, Any]], series: str) -> None:
    lines = {name: arms for name in ARMS if (arms := arms_of(cases, series, name))}
    for name in sorted(lines, key=lambda name: _at_end(lines[name]), reverse=True):
        points = points_of(cases, series, name)
        sizes, medians = zip(*points, strict=True)
        rounds = [arm["seconds"] for arm in lines[name]]
        below = [1000 * (m - min(seconds)) for m, seconds in zip(medians, rounds, strict=True)]
        above = [1000 * (max(seconds) - m) for m, seconds in zip(medians, rounds, strict=True)]
        axes.errorbar(
            sizes,
            [1000 * seconds for seconds in medians],
            yerr=(below, above),
            color=COLOURS[name],
            label=f"{name}  $N^{{{exponent(points):.2f}}}$" if len(points) > 1 else name,
            linestyle="--" if name == GRAM else "-",
            marker=None if name == GRAM else "o",
            markersize=4,
            elinewidth=0.8,
            capsize=2,
        )
    _axes_of(axes, sorted({arm["num_tokens"] for arms in lines.values() for arm in arms}))
    axes.set_title(series, fontsize=10)


def _at_end(arms: list[dict[str, Any]]) -> float:
    """Seconds a token at the largest size, by which the legend is ordered."""
    return arms[-1]["median_seconds"] / arms[-1]["num_tokens"]


def _axes_of(axes: Any, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(
        sizes, [f"{size // 1024}k" if size % 1024 == 0 else str(size) for size in sizes]
    )
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("tokens of the video, N")
    axes.set_ylabel("milliseconds")
    axes.grid(alpha=0.3, which="major")
    axes.legend(frameon=False, fontsize=9, title="arm, and growth of its time")
