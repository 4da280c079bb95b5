"""The curves of a training run as a picture."""

import json
from pathlib import Path
from typing import Any


def draw_curves(log: Path, picture: Path) -> None:
    """Draws the losses and the held-out accuracies of `log`, a log.jsonl, to `picture`, a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in log.read_text().splitlines()]
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 8), sharex=True)
    _draw(above, [r for r in records if "losses" in r], "losses")
    above.set(ylabel="loss", yscale="log")
    _draw(below, [r for r in records if "held_out" in r], "held_out")
    below.set(ylabel="right answers, held-out videos", xlabel="step", ylim=(0, 1.02))
    for axes in (above, below):
        for index, line in enumerate(axes.get_lines()):
            line.set_color("black" if line.get_label() == "all" else f"C{index % 10}")
            line.set_linestyle("-" if index < 10 else "--")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", ncols=4)
    figure.tight_layout()
    figure.savefig(picture, dpi=100)
    pyplot.close(figure)


def _draw(axes: Any, records: list[dict[str, Any]], field: str) -> None:
    names = sorted({name for record in records for name in record[field]})
    for name in names:
        points = [(r["step"], r[field][name]) for r in records if name in r[field]]
        axes.plot(*zip(*points, strict=True), label=name, linewidth=2 if name == "all" else 1)
