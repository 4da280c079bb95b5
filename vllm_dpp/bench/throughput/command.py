"""Offline throughput: stock vLLM, EVS and mid-decoder pruning, alternating on the same videos.

``python -m vllm_dpp.bench.throughput --help`` lists the options. Every arm is an engine in a
process of its own with the same KV bytes and scheduler limits; the arms take turns, round by round,
and never run at once. Before any timing, arms that prune nothing must answer as stock vLLM does.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import count
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm

from vllm_dpp.bench.provenance import one_line, provenance
from vllm_dpp.bench.throughput import options as opt
from vllm_dpp.bench.throughput import report
from vllm_dpp.bench.throughput.arms import Arm
from vllm_dpp.bench.throughput.capacity import EngineFacts, predict
from vllm_dpp.bench.throughput.drive import Round
from vllm_dpp.bench.throughput.engine_process import EngineError, EngineProcess
from vllm_dpp.bench.throughput.tables import render
from vllm_dpp.bench.throughput.workload import Workload

CHECKED_REQUESTS = 4


class Arms:
    """The engines of a comparison, started when first needed.

    Args:
        arms: In the order of their turns.
        engine_args: What all engines share.
        reload: Stop each engine after its turn.
        progress: Counts turns.
    """

    def __init__(
        self, arms: Sequence[Arm], engine_args: dict[str, Any], *, reload: bool, progress: tqdm
    ) -> None:
        self.processes = {arm.name: EngineProcess(arm, engine_args) for arm in arms}
        self.facts: dict[str, EngineFacts] = {}
        self._reload, self._progress = reload, progress
        self._running: set[str] = set()

    def run(self, name: str, workload: Workload, what: str) -> Round:
        """One turn of one arm."""
        process = self.processes[name]
        if name not in self._running:
            self._progress.set_postfix_str(f"{name}: loading")
            self.facts[name] = process.start()
            self._running.add(name)
            if self._reload:  # a fresh engine is slower at first
                process.run(replace(workload, num_requests=1))
        self._progress.set_postfix_str(f"{name}: {what}")
        done = process.run(workload)
        self._progress.update()
        if self._reload:
            process.stop()
            self._running.discard(name)
        return done

    def run_alternating(self, workload: Workload, what: str) -> dict[str, Round]:
        """One turn of every arm, of which all are running, step by step."""
        self._progress.set_postfix_str(f"all arms: {what}")
        done: dict[str, Round] = {}
        for process in self.processes.values():
            process.begin(workload)
        for step in count():
            waiting = [name for name in self.processes if name not in done]
            if not waiting:
                break
            first = step % len(waiting)  # nobody is always the first
            for name in waiting[first:] + waiting[:first]:
                if (ended := self.processes[name].turn()) is not None:
                    done[name] = ended
                    self._progress.update()
        return done

    def stop(self) -> None:
        for process in self.processes.values():
            process.stop()


@contextmanager
def started(
    arms: Sequence[Arm], engine_args: dict[str, Any], *, reload: bool, turns: int
) -> Iterator[Arms]:
    with tqdm(total=turns, unit="turn", desc="throughput", file=sys.stderr) as progress:
        running = Arms(arms, engine_args, reload=reload, progress=progress)
        try:
            yield running
        finally:
            running.stop()


def check_outputs(arms: Arms, workload: Workload) -> dict[str, float]:
    """Share of tokens equal to stock's in each arm that prunes nothing; also warms every arm up."""
    small = replace(workload, num_requests=min(CHECKED_REQUESTS, workload.num_requests))
    outputs = {name: arms.run(name, small, "checking").outputs for name in arms.processes}
    return {
        name: report.equal_share(outputs[name], outputs["stock"])
        for name, process in arms.processes.items()
        if process.arm.is_lossless
    }


def measure(
    arms: Arms, workload: Workload, repeats: int, *, alternate_steps: bool
) -> dict[str, list[Round]]:
    """``repeats`` rounds of every arm, taking turns; each round has videos of its own."""
    rounds: dict[str, list[Round]] = {name: [] for name in arms.processes}
    for index in range(repeats):
        work, what = workload.of_round(index), f"round {index + 1} of {repeats}"
        if alternate_steps:
            done = arms.run_alternating(work, what)
        else:
            done = {name: arms.run(name, work, what) for name in rounds}
        for name, ended in done.items():
            rounds[name].append(ended)
    return rounds


def results_of(
    arms: Arms, rounds: Mapping[str, list[Round]], num_layers: int, max_num_seqs: int
) -> dict[str, dict[str, Any]]:
    """Everything that is reported, by arm."""
    stock = rounds["stock"]
    sent, count = sum(stock[0].prompt_tokens), len(stock[0].outputs)
    results = {}
    for name, process in arms.processes.items():
        facts, mine = arms.facts[name], rounds[name]
        prediction = predict(
            process.arm,
            facts,
            num_layers=num_layers,
            prompt_tokens=max(stock[0].prompt_tokens),
            video_tokens=round(fmean(stock[0].video_tokens)),
            video_end=stock[0].video_ends[0],
            max_requests=min(count, max_num_seqs),
        )
        measured = report.metrics(mine, facts, sent)
        results[name] = {
            **report.arm_as_json(process.arm, facts, mine),
            "metrics": measured,
            "against_stock": report.against_stock(mine, stock),
            "capacity": report.capacity_rows(measured, prediction),
            "selection": report.selection_shares(mine),
            "tokens_equal_to_stock": fmean(
                report.equal_share(a.outputs, b.outputs) for a, b in zip(mine, stock, strict=True)
            ),
        }
    return results


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark.

    Returns:
        0; 1 where an arm failed or gave other answers than stock vLLM, with nothing reported; 2
        where an argument is wrong.
    """
    arguments = sys.argv[1:] if argv is None else argv
    options = opt.parse(arguments)
    try:
        path, model = opt.resolve_model(options.model)
        chosen = opt.arms_of(options, model)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    workload = opt.workload_of(options)
    engine_args = opt.engine_args_of(options, path, on_cpu=not torch.cuda.is_available())
    turns = len(chosen) * (options.repeats + 1)
    try:
        with started(chosen, engine_args, reload=options.reload, turns=turns) as arms:
            equal = check_outputs(arms, workload)
            if problem := _wrong_outputs(equal, arms.facts["stock"].dtype):
                print(f"error: {problem}; nothing is reported", file=sys.stderr)
                return 1
            rounds = measure(
                arms, workload, options.repeats, alternate_steps=options.alternate_steps
            )
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    results = results_of(arms, rounds, model.num_layers, options.max_num_seqs)
    document = {
        "provenance": provenance(opt.MODULE, arguments),
        "model": {"name": opt.model_name(options.model), **asdict(model)},
        "workload": asdict(workload),
        "kv_cache_bytes": engine_args["kv_cache_memory_bytes"],
        "checked_tokens_equal_to_stock": equal,
        "arms": results,
    }
    _publish(document, options)
    return 0


def _wrong_outputs(equal: Mapping[str, float], dtype: str) -> str | None:
    """Why the outputs forbid a report; only float32 must be exact, as other types round more."""
    wrong = [f"{name} {100 * share:.1f} %" for name, share in equal.items() if share < 1]
    if not wrong or dtype != "float32":
        return None
    return f"tokens equal to stock's: {', '.join(wrong)}, and all of them must be"


def _setting(document: dict[str, Any]) -> str:
    """One line: the model, a request and the memory."""
    model, work = document["model"], document["workload"]
    engine, first = (document["arms"]["stock"][key] for key in ("engine", "rounds"))
    return (
        f"{model['name']}, {model['num_layers']} layers, {engine['dtype']}, {engine['device']}, "
        f"{'eager' if engine['enforce_eager'] else 'compiled'} | {work['num_requests']} requests, "
        f"each {fmean(first[0]['prompt_tokens']):.0f} prompt tokens "
        f"({fmean(first[0]['video_tokens']):.0f} of the video) and {work['output_tokens']} output "
        f"tokens | {document['kv_cache_bytes'] >> 20} MiB of KV in blocks of "
        f"{engine['block_size']} tokens"
    )


def _publish(document: dict[str, Any], options: Any) -> None:
    print(one_line(document["provenance"]))
    print(document["provenance"]["command"])
    print(_setting(document))
    for title, text in render(document["arms"]):
        print(f"\n{title}\n{text}")
    equal = document["checked_tokens_equal_to_stock"].items()
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in equal if name != "stock")
    print(f"\nTokens equal to stock's before timing: {shares or 'no arm to compare'}")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(document, indent=1) + "\n")
