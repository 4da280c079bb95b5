"""The tables of the chat benchmark, for a terminal and in Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vllm_dpp.bench.summary import Spread, table

MIB = 2**20

Rows = list[tuple[str, ...]]


def tables(document: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], Rows]]:
    """Title, header and rows of each table.

    Args:
        document: What the JSON file holds.
    """
    chat = document["chat"]["results"]
    arms = tuple(chat)
    for title, cell in (
        ("Prompt tokens computed, of the prompt's", _tokens),
        ("KV held at the end of a request, MiB", _kv),
        ("Time to the first token, ms: median (smallest..largest)", _ttft),
    ):
        names = list(next(iter(chat.values())))
        yield title, ("request", *arms), [
            (name, *(cell(chat[arm][name]) for arm in arms)) for name in names
        ]  # fmt: skip
    for variant, streams in document["streams"].items():
        yield (
            f"{document['options']['streams']} streams while a long video arrives, {variant}: "
            "gaps between tokens in ms, ratio to stock",
            ("arm", "tokens", "alone", "median", "p99", "longest", "longest / stock", "video TTFT"),
            [(arm, *_gaps(result)) for arm, result in streams["results"].items()],
        )


def text(title: str, header: Sequence[str], rows: Rows) -> str:
    return f"{title}\n{table(header, rows)}"


def markdown(title: str, header: Sequence[str], rows: Rows) -> str:
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return f"**{title}**\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _tokens(asked: Mapping[str, Any]) -> str:
    return f"{asked['computed_tokens']} of {asked['prompt_tokens']}"


def _kv(asked: Mapping[str, Any]) -> str:
    return "-" if asked["kv_bytes"] is None else f"{asked['kv_bytes'] / MIB:.1f}"


def _ttft(asked: Mapping[str, Any]) -> str:
    return _ms(asked["ttft_s"])


def _gaps(result: Mapping[str, Any]) -> tuple[str, ...]:
    middle, low, high = result["longest_s_to_stock"]
    return (
        f"{result['computed_tokens']}",
        *(_ms(result[key]) for key in ("quiet_s", "median_s", "p99_s", "longest_s")),
        f"{middle:.2f} ({low:.2f}..{high:.2f})",
        _ms(result["ttft_s"]),
    )


def _ms(seconds: Spread) -> str:
    middle, low, high = (f"{1000 * value:.0f}" for value in seconds)
    return f"{middle} ({low}..{high})"
