"""A soak: `vllm-dpp bench soak --help` lists the options.

First every request is asked alone: those are the answers to be given. Then all clients ask at
once, for minutes. When they have stopped, the server must come to rest, hold no block, answer
everything as at first, the longest video included, which needs the whole buffer, and not have
grown.
"""

import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vllm_dpp.bench.chat.server import Server, ServerError, serve, wait_until_ready
from vllm_dpp.bench.provenance import one_line, provenance
from vllm_dpp.bench.soak import memory
from vllm_dpp.bench.soak import options as opt
from vllm_dpp.bench.soak.cases import Case, Maker
from vllm_dpp.bench.soak.clients import (
    ASKED_AGAIN,
    Tally,
    answered,
    send,
    serial_answers,
    soak,
)
from vllm_dpp.bench.soak.report import render
from vllm_dpp.bench.throughput.options import model_name, resolve_model
from vllm_dpp.cli import NO_LABORATORY

IDLE_TIMEOUT_S = 120.0
DRIFT = "Multi-modal cache miss for request"
"""What the server logs where it answers 500 since the ends of its media cache drifted apart."""
COUNTERS = {
    "preemptions": "vllm:num_preemptions_total",
    "prompt tokens": "vllm:prompt_tokens_total",
    "generated tokens": "vllm:generation_tokens_total",
    "prompt tokens asked of the prefix cache": "vllm:prefix_cache_queries_total",
    "prompt tokens found in it": "vllm:prefix_cache_hits_total",
    "media found in their cache": "vllm:mm_cache_hits_total",
}


def main(argv: list[str] | None = None) -> int:
    """Run the soak.

    Returns:
        0 where nothing was wrong and memory flat; 1 otherwise, or where the server failed; 2 where
        an argument is wrong.
    """
    arguments = sys.argv[1:] if argv is None else argv
    options = opt.parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the server is stopped on the way out
    try:
        model = resolve(options.model)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="vllm-dpp-soak-") as name:
        folder = Path(name)
        try:
            document = run(folder, model, options)
        except (ServerError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            keep_log(folder, options)
            return 1
        if document["wrong"]:
            keep_log(folder, options)
    publish({"provenance": provenance(opt.MODULE, arguments), **document}, options)
    return 0 if document["wrong"] == 0 and document["memory_is_flat"] else 1


def keep_log(folder: Path, options: Any) -> None:
    """Put what the server printed beside the result."""
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "server.log", options.output.with_suffix(".log"))


def resolve(model: str) -> str:
    """Where vLLM finds the checkpoint."""
    if model == opt.TRAINED:
        try:
            from vllm_dpp.quality.model import TRAINED
        except ModuleNotFoundError as error:
            raise ValueError(NO_LABORATORY.format(f"--model {model}")) from error
        return str(TRAINED)
    return resolve_model(model)[0]


def run(folder: Path, model: str, options: Any) -> dict[str, Any]:
    """Raises ``ServerError`` or ``OSError`` where the server does not live to the end."""
    command = opt.command_of(options, model, on_cpu=not torch.cuda.is_available())
    sizes = options.long_tokens, options.side
    maker, tally = Maker(folder, options.seed, *sizes, entry_only=options.entry_only), Tally()
    good, bad = [maker.longest(), *maker.good(options.cases)], list(maker.bad())
    if options.stock:
        good, bad = [case.for_stock() for case in good], [c for c in bad if not c.is_ours]
    environment = memory.GIVE_BACK | ({"VLLM_PLUGINS": ""} if options.stock else {})
    with serve("the server", command, model, folder / "server.log", environment) as server:
        wait_until_ready(server)
        say(f"{len(good)} good and {len(bad)} bad requests, one at a time")
        expected = serial_answers(server, [*good, *bad], tally)
        before, alone = server.metrics(), memory.resident_by_role(server.pid)
        say(f"{options.clients} clients for {options.minutes:g} minutes")
        with memory.Sampler(server.pid) as sampler:
            soak(
                server,
                good,
                bad,
                expected,
                tally,
                num_clients=options.clients,
                seconds=60 * options.minutes,
                seed=options.seed,
            )
        say("the server comes to rest, and answers everything once more")
        rest = server.wait_until_idle(IDLE_TIMEOUT_S)
        after = server.metrics()
        again(server, good, expected, tally)
        server.wait_until_idle(IDLE_TIMEOUT_S)
        end = memory.resident_by_role(server.pid)
        drifts = server.log.read_text(errors="replace").count(DRIFT)
    unexplained = max(0, tally.counts[ASKED_AGAIN] - drifts)
    faults = {fault["fault"] for fault in tally.faults}
    return {
        "model": model_name(model),
        "options": {k: v for k, v in vars(options).items() if k != "output"},
        "counts": dict(tally.counts) | {"drifts of vLLM's media cache": drifts},
        "kinds": dict(tally.kinds),
        "memory_is_flat": memory.growth(sampler.samples) < memory.MAX_GROWTH,
        "wrong": sum(tally.counts[fault] for fault in faults) + unexplained,
        "faults": tally.faults,
        "server": {k: after.get(v, 0) - before.get(v, 0) for k, v in COUNTERS.items()},
        "seconds_to_rest": round(rest, 2),
        "memory_mib": {
            "before": alone,
            "after": end,
            "growth": memory.growth(sampler.samples),
            "samples": sampler.samples,
        },
    }


def again(server: Server, good: Sequence[Case], expected: Any, tally: Tally) -> None:
    """Every good request once more, alone, past the prefix cache."""
    for case in good:
        reply = send(server, case, extra={"cache_salt": "afterwards"})
        answered(reply, case, expected[case.name], tally, hung_up=False)


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def publish(document: dict[str, Any], options: Any) -> None:
    """Print the counts; write JSON and Markdown where they are asked for."""
    where, command = one_line(document["provenance"]), document["provenance"]["command"]
    body = render(document)
    print(where, command, "", body, sep="\n")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=1) + "\n")
        options.output.with_suffix(".md").write_text(f"`{command}`\n\n{where}\n\n{body}\n")
