"""Accuracy against budget, one line per method."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_dpp.bench.quality.arms import FULL

# Of the Okabe-Ito palette, which most colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":")


def require_matplotlib() -> None:
    """Raises `ValueError` where it is not installed."""
    try:
        import matplotlib  # noqa: F401  (asked for before minutes of answering)
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'vllm-dpp[bench]'") from error


def draw(document: Mapping[str, Any], methods: Sequence[str], path: Path) -> None:
    """Writes a picture with one panel per split.

    Args:
        document: what the JSON file holds.
        methods: those to draw, of the ones that ran.
        path: of the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    splits = document["splits"]
    figure, panels = pyplot.subplots(
        1, len(splits), figsize=(6.4 * len(splits), 5), sharey=True, squeeze=False
    )
    for panel, split in zip(panels[0], splits, strict=True):
        _draw_split(panel, split, methods)
    panels[0][0].set_ylabel("right answers, %")
    panels[0][-1].legend(fontsize="small", loc="lower left", bbox_to_anchor=(1.01, 0))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_split(panel: Any, split: Mapping[str, Any], methods: Sequence[str]) -> None:
    for i, method in enumerate(methods):
        arms = sorted(
            (arm for arm in split["arms"] if arm["method"] == method),
            key=lambda arm: float(arm["share"]),
        )
        if not arms:
            continue
        accuracies = [100 * arm["accuracy"] for arm in arms]
        if method == FULL:
            panel.axhline(accuracies[0], color="#777777", linewidth=1, label=method)
            continue
        errors = [
            [100 * (arm["accuracy"] - arm["low"]) for arm in arms],
            [100 * (arm["high"] - arm["accuracy"]) for arm in arms],
        ]
        panel.errorbar(
            [arm["share"] for arm in arms],
            accuracies,
            yerr=errors,
            label=method,
            color=_COLOURS[i % len(_COLOURS)],
            linestyle=_STYLES[i // len(_COLOURS) % len(_STYLES)],
            marker="o",
            markersize=3,
            capsize=2,
        )
    panel.set_title(f"{split['split']} videos")
    panel.set_xlabel("share of the video's LM prefill and KV")
    panel.grid(alpha=0.3)
