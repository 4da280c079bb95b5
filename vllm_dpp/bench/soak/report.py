"""The counts of a soak, in Markdown that a terminal shows as well."""

from collections.abc import Mapping
from typing import Any


def render(document: Mapping[str, Any]) -> str:
    """Args: document: what the JSON file holds."""
    options, memory = document["options"], document["memory_mib"]
    after = memory["after"]
    rows = {
        **document["counts"],
        **{f"server: {name}": f"{value:.0f}" for name, value in document["server"].items()},
        "seconds to rest, no block held": document["seconds_to_rest"],
        **{
            f"memory of {role} before, after, MiB": f"{size:.0f}, {after.get(role, 0):.0f}"
            for role, size in memory["before"].items()
        },
        "memory, last quarter above the one before": f"{100 * memory['growth']:.1f} %",
        "memory is flat": "yes" if document["memory_is_flat"] else "no",
        "wrong": document["wrong"],
    }
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(document["kinds"].items()))
    lines = [
        f"{options['clients']} clients for {options['minutes']:g} minutes, "
        f"{_served(options)}, {document['model']}, "
        f"{options['kv_cache_mib']} MiB of KV, steps of {options['max_num_batched_tokens']} "
        f"tokens, videos of up to {options['long_tokens']} and {options['side']} pixels a side",
        "",
        "| what | count |",
        "| --- | --: |",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        f"By kind: {kinds}.",
    ]
    lines += [f"\n- {fault}" for fault in document["faults"][:10]]
    return "\n".join(lines)


def _served(options: Mapping[str, Any]) -> str:
    if options["stock"]:
        return "stock vLLM"
    return "pruned before the decoder alone" if options["entry_only"] else "pruned"
