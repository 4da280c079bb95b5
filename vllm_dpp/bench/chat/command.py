"""Chats about videos on real servers: `vllm-dpp bench chat --help` lists the options.

All servers stay up and are asked in turn, one request at a time, so that they meet the same
machine. Before any timing, pruned servers that are asked to keep everything must answer as stock.
"""

import json
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_dpp.bench.chat import options as opt
from vllm_dpp.bench.chat import plot, report, tables
from vllm_dpp.bench.chat.arms import Arm, make_arm
from vllm_dpp.bench.chat.client import Reply
from vllm_dpp.bench.chat.kv import layer_bytes, read_record, recorded_bytes, stock_bytes
from vllm_dpp.bench.chat.server import (
    KV_SPACE,
    Server,
    ServerError,
    info_label,
    serve,
    wait_until_ready,
)
from vllm_dpp.bench.chat.streams import Arrival, arrive
from vllm_dpp.bench.chat.talk import OTHER_QUESTIONS, as_json, clip, rotated, talk
from vllm_dpp.bench.provenance import one_line, provenance, without_folders
from vllm_dpp.bench.throughput.options import model_name, resolve_model
from vllm_dpp.serving.layer_groups import default_prune_layer

KV_GIB = {KV_SPACE: "1"}
NEW, KNOWN = "new", "known, its encoding cached"

Servers = Mapping[Arm, Server]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0; 1 where a server failed, or answered unlike stock where it must not, with nothing
        reported; 2 where an argument is wrong.
    """
    arguments = sys.argv[1:] if argv is None else argv
    options = opt.parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers are stopped on the way out
    try:
        if options.plot is not None:
            plot.require_matplotlib()
        path, model = model_of(options)
        arms = arms_of(options, model.num_layers)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        with started(arms, path, options) as (servers, folder):
            document = measure(servers, folder, options, path)
    except (ServerError, OSError) as error:
        print(f"error: {error}; nothing is reported", file=sys.stderr)
        return 1
    publish({"provenance": provenance(opt.MODULE, arguments), **document}, options)
    return 0


def model_of(options: Any) -> tuple[str, Any]:
    """The checkpoint, made first if it is a toy, and its shape; settles K."""
    path, model = resolve_model(options.model)
    if options.prune_layer is None:
        options.prune_layer = default_prune_layer(model.num_layers)
    return path, model


def arms_of(options: Any, num_layers: int) -> list[Arm]:
    return [
        make_arm(
            name,
            num_layers=num_layers,
            prune_layer=options.prune_layer,
            retention_ratio=options.retention_ratio,
            decide_every=options.decide_every,
            video_share=options.video_share,
            on_cpu=not torch.cuda.is_available(),
        )
        for name in options.arms
    ]


@contextmanager
def started(
    arms: Sequence[Arm], model: str, options: Any
) -> Iterator[tuple[dict[Arm, Server], Path]]:
    """All servers, and a folder for videos and records that ends with them."""
    flags = opt.flags_of(options, on_cpu=not torch.cuda.is_available())
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-dpp-chat-")))
        servers = {}
        for arm in arms:
            mine = [*flags, "--record-dir", str(folder / arm.name)] if arm.is_pruned else flags
            command, log = arm.command(model, mine), folder / f"{arm.name}.log"
            environment = KV_GIB | dict(arm.environment)
            servers[arm] = stack.enter_context(serve(arm.name, command, model, log, environment))
            if torch.cuda.is_available():  # each measures what memory is free
                wait_until_ready(servers[arm])
        for server in servers.values():
            wait_until_ready(server)
        yield servers, folder


def measure(servers: Servers, folder: Path, options: Any, model: str) -> dict[str, Any]:
    """Check, then measure.

    Raises:
        ServerError: Answers differ that must not.
        OSError: A request failed.
    """
    total = 2 + options.repeats * (1 + 2 * len(servers))
    with tqdm(total=total, unit="part", desc="chat", file=sys.stderr) as progress:
        check(servers, clip(folder, 0, options.chat_frames, options.side))
        progress.update()
        url = clip(folder, 1, options.chat_frames, options.side)
        block_sizes, kv_bytes = kv_held(servers, folder, url, model)
        progress.update()
        talks, arrivals = [], {NEW: [], KNOWN: []}  # type: ignore[var-annotated]  # lists of rounds
        for index in range(options.repeats):
            url = clip(folder, 100 + index, options.chat_frames, options.side)
            talks.append(talk(servers, url, first=index))
            progress.update()
            url = clip(folder, 200 + index, options.long_frames, options.side)
            for variant, found in arrive_everywhere(servers, url, index, options, progress).items():
                arrivals[variant].append(found)
    streams: dict[str, dict[str, Any]] = {
        variant: {"results": report.stream_results(rounds), "rounds": report.raw(rounds)}
        for variant, rounds in arrivals.items()
    }
    return {
        "model": model_name(options.model),
        "options": {k: v for k, v in vars(options).items() if k not in ("output", "plot")},
        "servers": {
            arm.name: {
                "command": [without_folders(word) for word in arm.command(model, [])[1:]],
                "shared_flags": opt.flags_of(options, on_cpu=not torch.cuda.is_available()),
                "block_size": block_sizes[arm.name],
                "prefix_caching": arm.has_prefix_caching,
            }
            for arm in servers
        },
        "chat": {
            "results": report.chat_results(talks, kv_bytes),
            "rounds": [as_json(done) for done in talks],
        },
        "streams": streams,
        "goal": {
            "longest gap to stock's, at most": report.GOAL,
            "met": {name: report.meets_goal(s["results"]) for name, s in streams.items()},
        },
    }


def check(servers: Servers, url: str) -> None:
    """Pruned servers that keep everything answer as stock does; this also warms all of them up.

    Raises:
        ServerError: One does not.
    """
    done = talk(servers, url, first=0, extra=lambda arm: arm.unpruned)
    wrong = report.differing(done, [arm.name for arm in servers if arm.is_pruned])
    if wrong:
        raise ServerError(f"at ratio 1 answers differ from stock's: {', '.join(wrong)}")


def kv_held(
    servers: Servers, folder: Path, url: str, model: str
) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Block sizes by arm, and KV bytes by arm and request, in a round of its own."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    sizes = {}
    for arm, server in servers.items():
        label = info_label(server.get("/metrics"), "vllm:cache_config_info", "block_size")
        sizes[arm.name] = int(label)
    width = 4 if "toy-" in Path(model).name else 2  # float32, else 16-bit types
    token_bytes, layers = layer_bytes(config, width), config.num_hidden_layers
    found: dict[str, dict[str, int]] = {arm.name: {} for arm in servers}

    def note(arm: Arm, name: str, reply: Reply) -> None:
        if arm.is_pruned:
            record = read_record(folder / arm.name, reply.request_id)
            found[arm.name][name] = recorded_bytes(record, token_bytes)
        else:
            held = stock_bytes(reply, layers, sizes[arm.name], token_bytes)
            found[arm.name][name] = held

    recording = {"vllm_xargs": {"dpp_record": 1}}
    talk(servers, url, first=0, extra=lambda arm: recording if arm.is_pruned else {}, seen=note)
    return sizes, found


def arrive_everywhere(
    servers: Servers, url: str, index: int, options: Any, progress: tqdm
) -> dict[str, dict[str, Arrival]]:
    """One video at every server, twice: the second time its encoding is cached, not its prefix."""
    found: dict[str, dict[str, Arrival]] = {NEW: {}, KNOWN: {}}
    for variant, salt in ((NEW, None), (KNOWN, "again")):
        for arm in rotated(list(servers), index):
            found[variant][arm.name] = arrive(
                servers[arm],
                url,
                num_streams=options.streams,
                question=OTHER_QUESTIONS[0],
                max_model_len=options.max_model_len,
                salt=salt if arm.has_prefix_caching else None,
            )
            progress.update()
    return {v: {arm.name: by[arm.name] for arm in servers} for v, by in found.items()}


def publish(document: dict[str, Any], options: Any) -> None:
    """Print the tables; write JSON, Markdown and the picture where they are asked for."""
    where = one_line(document["provenance"])
    found = list(tables.tables(document))
    print(where, document["provenance"]["command"], sep="\n")
    for parts in found:
        print("\n" + tables.text(*parts))
    print(f"\nLongest gap within {report.GOAL} x stock's: {document['goal']['met']}")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=1) + "\n")
        heading = f"`{document['provenance']['command']}`\n\n{where}\n\n"
        body = "\n\n".join(tables.markdown(*parts) for parts in found)
        options.output.with_suffix(".md").write_text(heading + body + "\n")
    if options.plot is not None:
        plot.draw(document, options.plot)
