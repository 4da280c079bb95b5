"""The picture of the chat benchmark."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Of the Okabe-Ito palette, which most colour-blind readers can tell apart.
COLOURS = {
    "stock": "#000000",
    "dpp": "#0072B2",
    "dpp-none": "#56B4E9",
    "dpp-pieces": "#009E73",
    "dpp-share": "#CC79A7",
    "evs": "#E69F00",
}


def require_matplotlib() -> None:
    """Asked for before minutes of measuring. Raises ``ValueError`` where it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install 'vllm-dpp[bench]'") from error


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Write a picture: tokens computed, TTFT, and the longest gaps of streams.

    Args:
        document: What the JSON file holds.
        path: Of a PNG, or another format that matplotlib knows by its suffix.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    chat = document["chat"]["results"]
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    tokens, ttft, gaps = figure.subplots(1, 3)
    _lines(tokens, chat, lambda asked: (asked["computed_tokens"],) * 3, "prompt tokens computed")
    _lines(ttft, chat, lambda a: [1000 * s for s in a["ttft_s"]], "time to the first token, ms")
    _bars(gaps, document["streams"])
    tokens.legend(frameon=False, fontsize=9)
    machine = document["provenance"]["machine"]
    where = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cores']} cores"
    figure.suptitle(
        f"A chat about one video, and streams while a long one arrives: medians of "
        f"{document['options']['repeats']} rounds, with the smallest and the largest\n{where}",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _lines(axes: Any, chat: Mapping[str, Any], of: Any, label: str) -> None:
    """One line for each arm over the requests in their order."""
    for shift, (arm, requests) in enumerate(chat.items()):
        middle, low, high = zip(*map(of, requests.values()), strict=True)
        below = [m - lo for m, lo in zip(middle, low, strict=True)]
        above = [h - m for h, m in zip(high, middle, strict=True)]
        places = [index + 0.06 * shift for index in range(len(requests))]
        axes.errorbar(
            places, middle, yerr=(below, above), color=COLOURS[arm], label=arm,
            marker="o", markersize=4, linewidth=1, elinewidth=0.8, capsize=2,
        )  # fmt: skip
    names = list(next(iter(chat.values())))
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=8)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _bars(axes: Any, streams: Mapping[str, Any]) -> None:
    """The longest gap of each arm, for a new video and for a known one."""
    width = 0.8 / max(len(found["results"]) for found in streams.values())
    for place, found in enumerate(streams.values()):
        for number, (arm, result) in enumerate(found["results"].items()):
            middle, low, high = (1000 * s for s in result["longest_s"])
            axes.bar(
                place + number * width, middle, width, color=COLOURS[arm],
                yerr=[[middle - low], [high - middle]], capsize=2, error_kw={"elinewidth": 0.8},
            )  # fmt: skip
    axes.set_xticks([place + 0.3 for place in range(len(streams))], list(streams), fontsize=8)
    axes.set_ylabel("longest gap between tokens, ms")
    axes.grid(alpha=0.3, axis="y")
