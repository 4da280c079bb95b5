"""Tables and the picture of the serving benchmark."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_dpp.bench.summary import spread, spread_text, table

COLOURS = ("#000000", "#E69F00", "#0072B2", "#CC79A7", "#009E73", "#56B4E9")
LATENCIES = ("ttft", "tpot", "itl", "e2el")


def render(document: Mapping[str, Any]) -> str:
    """A table for each concurrency: medians of the rounds, and throughput against stock's."""
    parts = []
    for number, rounds in document["rounds"].items():
        rows = []
        for arm, found in document["results"][number].items():
            pairs = zip(rounds[arm], rounds["stock"], strict=True)
            ratios = [a["request_throughput"] / b["request_throughput"] for a, b in pairs]
            row = [arm, f"{found['request_throughput']:.3f}", spread_text(spread(ratios), 2)]
            row += [f"{found['request_goodput']:.3f}"] if "request_goodput" in found else []
            for name in LATENCIES:
                row.append(f"{found[f'p50_{name}_ms']:.0f} / {found[f'p99_{name}_ms']:.0f}")
            row += [f"{100 * found['kv_usage_peak']:.0f} %", f"{found['preemptions']:.0f}"]
            rows.append(row)
        header = ["arm", "requests/s", "of stock's"]
        header += ["goodput/s"] if len(rows[0]) == 10 else []
        header += [f"{name.upper()} p50 / p99, ms" for name in LATENCIES]
        parts.append(f"{number} at once\n{table([*header, 'KV', 'preempted'], rows)}")
    return "\n\n".join(parts)


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Requests a second, TTFT and time between tokens, over the concurrency."""
    from matplotlib.figure import Figure

    results = document["results"]
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = {
        "request_throughput": "requests/s",
        "p50_ttft_ms": "time to the first token, median, ms",
        "p50_tpot_ms": "time for a token after it, median, ms",
    }
    for axes, (name, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for colour, arm in zip(COLOURS, document["options"]["arms"], strict=False):
            values = [results[number][arm][name] for number in results]
            axes.plot(list(map(int, results)), values, marker="o", color=colour, label=arm)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(map(int, results)), list(results))
        axes.set_xlabel("requests at once")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
