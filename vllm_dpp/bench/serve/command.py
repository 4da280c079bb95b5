"""Servers in turn under vLLM's own benchmark client."""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from vllm_dpp.bench.chat.plot import require_matplotlib
from vllm_dpp.bench.chat.server import HOST, Server, ServerError, serve, wait_until_ready
from vllm_dpp.bench.provenance import one_line, provenance
from vllm_dpp.bench.serve import options as opt
from vllm_dpp.bench.serve.report import draw, render
from vllm_dpp.bench.throughput.arms import Arm, parse_arm
from vllm_dpp.bench.throughput.options import model_name, resolve_model

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
CLIENT_TIMEOUT_S = 3600
SAMPLE_S = 0.25

Rounds = dict[str, dict[str, list[dict[str, float]]]]
"""By concurrency and arm."""


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0; 1 where a server or a request failed, with nothing reported; 2 where an argument is
        wrong.
    """
    arguments = sys.argv[1:] if argv is None else argv
    options = opt.parse(arguments)
    try:
        path, model = resolve_model(options.model)
        arms = [parse_arm(x, model, retention_ratio=0.25, prune_layer=None) for x in options.arms]
        if options.plot is not None:
            require_matplotlib()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        with started(arms, path, options) as servers:
            rounds = measure(servers, options)
    except ServerError as error:
        print(f"error: {error}; nothing is reported", file=sys.stderr)
        return 1
    document = {
        "provenance": provenance(opt.MODULE, arguments),
        "model": model_name(options.model),
        "options": {
            k: v for k, v in vars(options).items() if k not in ("output", "plot", "videos")
        },
        "rounds": rounds,
        "results": {
            number: {arm: medians(found) for arm, found in by_arm.items()}
            for number, by_arm in rounds.items()
        },
    }
    _publish(document, options)
    return 0


@contextmanager
def started(arms: Sequence[Arm], model: str, options: Any) -> Iterator[dict[str, Server]]:
    """All servers, by arm."""
    on_cpu = not torch.cuda.is_available()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-dpp-serve-")))
        servers = {}
        for number, arm in enumerate(arms):
            command = [*VLLM, "serve", model, *opt.server_flags(arm, options, on_cpu=on_cpu)]
            plugins = {} if arm.prune_layer is not None else {"VLLM_PLUGINS": ""}
            log = folder / f"{number}.log"
            servers[arm.name] = stack.enter_context(serve(arm.name, command, model, log, plugins))
            if not on_cpu:  # each measures what memory is free
                wait_until_ready(servers[arm.name])
        for server in servers.values():
            wait_until_ready(server)
        yield servers


def measure(servers: Mapping[str, Server], options: Any) -> Rounds:
    """A round of each arm that does not count, then the others, everybody first in turn.

    Raises:
        ServerError: A request failed.
    """
    names, rounds = list(servers), {}
    total = len(names) * (1 + options.rounds * len(options.concurrency))
    with tqdm(total=total, unit="round", desc="serve", file=sys.stderr) as progress:
        for name in names:
            ask(servers[name], options, concurrency=options.concurrency[0], seed=0)
            progress.update()
        for number in options.concurrency:
            found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
            for index in range(options.rounds):
                for name in names[index % len(names) :] + names[: index % len(names)]:
                    seed = 1000 * number + index + 1
                    result = ask(servers[name], options, concurrency=number, seed=seed)
                    found[name].append(result)
                    progress.update()
            rounds[str(number)] = found
    return rounds


def ask(server: Server, options: Any, *, concurrency: int, seed: int) -> dict[str, float]:
    """One round of `vllm bench serve`: the numbers of its result, and what the server says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(*VLLM, "bench", "serve", "--model", server.model),
            *("--base-url", f"http://{HOST}:{server.port}"),
            *opt.client_flags(options, concurrency, seed, Path(folder)),
            *("--save-result", "--save-detailed"),
            *("--result-dir", folder, "--result-filename", "result.json"),
        ]
        before = server.metrics()
        with peak_of(server, "vllm:kv_cache_usage_perc") as peak:
            done = subprocess.run(command, capture_output=True, text=True, timeout=CLIENT_TIMEOUT_S)
        file = Path(folder) / "result.json"
        if done.returncode or not file.exists():
            raise ServerError(f"{server.name}: `vllm bench serve` failed:\n{done.stderr[-2000:]}")
        result = json.loads(file.read_text())
    asked = concurrency * options.waves
    if result["completed"] != asked:
        why = next(filter(None, result["errors"]), "").strip()
        raise ServerError(
            f"{server.name} answered {result['completed']} of {asked} requests; {why[-500:]}"
        )
    after = server.metrics()
    numbers = {k: v for k, v in result.items() if isinstance(v, int | float)}
    return numbers | {
        "kv_usage_peak": max(peak, default=0.0),
        "preemptions": after["vllm:num_preemptions_total"] - before["vllm:num_preemptions_total"],
    }


@contextmanager
def peak_of(server: Server, name: str) -> Iterator[list[float]]:
    """Values of a metric while the block runs."""
    values: list[float] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_S):
            with suppress(OSError):  # a busy server may not answer in time: the next one counts
                values.append(server.metrics()[name])

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield values
    finally:
        over.set()
        thread.join()


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each number over the rounds."""
    return {name: median(one[name] for one in rounds) for name in rounds[0]}


def _publish(document: dict[str, Any], options: Any) -> None:
    text = render(document)
    print(f"{one_line(document['provenance'])}\n\n{text}")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=1) + "\n")
        command = document["provenance"]["command"]
        page = f"`{command}`\n\n{one_line(document['provenance'])}\n\n```\n{text}\n```\n"
        options.output.with_suffix(".md").write_text(page)
    if options.plot is not None:
        draw(document, options.plot)
