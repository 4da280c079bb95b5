"""The tables of the throughput benchmark, printed for people."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm_dpp.bench.summary import spread_text, table

MIB = 2**20


def render(results: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Title and text of each table.

    Args:
        results: By arm name: ``metrics``, ``against_stock``, ``capacity``, ``selection`` and
            ``arm``, as in the JSON file.
    """
    yield (
        "Throughput (medians over rounds; a request is one video and one question)",
        _speed(results),
    )
    yield (
        "Cost and gain over stock, for the same work (median, min..max of rounds)",
        _ratios(results),
    )
    yield (
        "Capacity at the end of a prefill: predicted from K, L and r / counted",
        _capacity(results),
    )
    selecting = {name: r["selection"] for name, r in results.items() if r["selection"]}
    if selecting:
        yield "Selection (question attention, greedy MAP, gather)", _selection(selecting)


def _speed(results: Mapping[str, dict[str, Any]]) -> str:
    header = (
        *("arm", "video KV left", "req/s", "tok/s", "out tok/s", "TTFT p50 s", "p99 s"),
        *("steps", "step ms", "peak running", "preempted"),
    )
    rows = []
    for name, result in results.items():
        m = result["metrics"]
        rows.append(
            (
                name,
                f"{result['arm']['kv_share']:.3f}",
                f"{m['requests_per_s']:.3f}",
                f"{m['tokens_per_s']:.0f}",
                f"{m['output_tokens_per_s']:.1f}",
                f"{m['ttft_p50_s']:.2f}",
                f"{m['ttft_p99_s']:.2f}",
                f"{m['steps']:.0f}",
                f"{m['mean_step_ms']:.1f}",
                f"{m['peak_running']:.0f}",
                f"{m['preemptions']:.0f}",
            )
        )
    return table(header, rows)


def _ratios(results: Mapping[str, dict[str, Any]]) -> str:
    header = ("arm", "throughput", "time", "CPU time", "mean step", "steps", "paired steps")
    keys = ("throughput", "seconds", "cpu_seconds", "mean_step_ms", "steps")
    rows = []
    for name, result in results.items():
        against = result["against_stock"]
        paired = against["paired_steps"]
        last = "-" if paired is None else f"{paired:.3f}"
        rows.append((name, *(spread_text(against[key]) for key in keys), last))
    return table(header, rows)


def _capacity(results: Mapping[str, dict[str, Any]]) -> str:
    header = (
        "arm",
        "KV blocks/request",
        "diff",
        "KV MiB/request",
        "diff",
        "peak prefilled",
        "diff",
    )
    rows = []
    for name, result in results.items():
        c = result["capacity"]
        cells: list[str] = []
        for key, unit, digits in (
            ("kv_blocks_per_request", 1, 1),
            ("kv_bytes_per_request", MIB, 2),
            ("peak_prefilled", 1, 0),
        ):
            predicted, counted = c[key]["predicted"] / unit, c[key]["counted"] / unit
            cells += [f"{predicted:.{digits}f} / {counted:.{digits}f}"]
            cells += [f"{100 * c[key]['difference']:+.1f} %"]
        rows.append((name, *cells))
    return table(header, rows)


def _selection(selecting: Mapping[str, dict[str, float]]) -> str:
    header = ("arm", "passes", "ms/pass", "share of decoder pass", "share of engine step")
    rows: Sequence[Sequence[str]] = [
        (
            name,
            f"{s['passes']:.0f}",
            f"{1000 * s['selection_seconds'] / s['passes']:.2f}",
            f"{100 * s['share_of_decoder']:.2f} %",
            f"{100 * s['share_of_step']:.2f} %",
        )
        for name, s in selecting.items()
    ]
    return table(header, rows)
