"""What the plugin's bookkeeping costs on the host, as requests and prompts grow.

``vllm-dpp bench growth`` times an engine's own steps with N requests that decode after a pruned
video, in stock vLLM and with the plugin: scheduling, taking in the results, and laying out the step
on the worker. Then what a prompt costs once, when its request arrives: vLLM's hashing of its
blocks, and the plan and the names of the compact blocks.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from vllm_dpp.bench.provenance import one_line, provenance
from vllm_dpp.bench.summary import table

MODULE = "vllm_dpp.bench.growth"
ARMS = ("stock", "dpp")
HOST_PARTS = ("schedule", "update")
WARM_UP, OUTPUT_TOKENS, MOST_STEPS = 5, 512, 400
QUESTION, PAD, BLOCK_SIZE, NUM_VIDEOS = 1, 2, 16, 4

Steps = list[dict[str, float]]
"""Seconds of each part of each step."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0. An engine that fails raises EOFError, behind its own error."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parse(arguments)
    document = {
        "provenance": provenance(MODULE, arguments),
        "steps": steps_in_turn(options.running, options.steps),
        "prompts": {str(size): prompt_seconds(size) for size in options.prompts},
    }
    print(f"{one_line(document['provenance'])}\n\n{render(document)}")
    if options.json is not None:
        options.json.write_text(json.dumps(document) + "\n")
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vllm-dpp bench growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    running, prompts = [1, 8, 64, 256], [1_000, 10_000, 100_000]
    add("--running", type=int, nargs="+", default=running, metavar="N", help="(%(default)s)")
    add("--prompts", type=int, nargs="+", default=prompts, metavar="TOKENS", help="(%(default)s)")
    add("--steps", type=int, default=100, metavar="N", help="of each engine, in turn (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all numbers, with provenance")
    options = parser.parse_args(arguments)
    if min(options.steps, *options.running) < 1:
        parser.error("--steps and --running must be at least 1")
    if options.steps > MOST_STEPS:
        parser.error(f"--steps must be at most {MOST_STEPS}: then the first requests end")
    return options


class Timer:
    """Seconds of each call of some methods.

    Args:
        methods: (owner, name) pairs by what they are called here; each is wrapped.
    """

    def __init__(self, methods: dict[str, tuple[Any, str]]) -> None:
        self.seconds: dict[str, list[float]] = {}
        for label, (owner, name) in methods.items():
            self.seconds[label] = []
            setattr(owner, name, self._timed(getattr(owner, name), self.seconds[label]))

    def _timed(self, method: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                seconds.append(time.perf_counter() - start)

        return timed

    def take(self) -> dict[str, float]:
        """The sum of each since the last call, to a tenth of a microsecond."""
        taken = {label: round(sum(found), 7) for label, found in self.seconds.items()}
        for found in self.seconds.values():
            found.clear()
        return taken


def steps_in_turn(running: Sequence[int], steps: int) -> dict[str, dict[str, Steps]]:
    """Times the steps of both engines, one of each in turn, so that all meet the same machine.

    Returns:
        By number of requests that run, then by arm.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pipes = {}
        for arm in ARMS:
            pipes[arm], remote = context.Pipe()
            stack.enter_context(pipes[arm])
            process = context.Process(target=_serve, args=(remote, arm, running), daemon=True)
            process.start()
            remote.close()
        found: dict[str, dict[str, Steps]] = {}
        for number in running:
            taken: dict[str, Steps] = {arm: [] for arm in ARMS}
            for pipe in pipes.values():
                pipe.send(number)
                pipe.recv()  # its requests decode
            for arm, pipe in list(pipes.items()) * steps:
                pipe.send(None)
                taken[arm].append(pipe.recv())
            found[str(number)] = taken
    return found


def _serve(pipe: Connection, arm: str, running: Sequence[int]) -> None:
    """The child: an engine that gets a number of requests to decode, or takes a step, when told."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if arm == "stock":
        os.environ["VLLM_PLUGINS"] = ""
    with tempfile.TemporaryDirectory() as folder:
        engine, timer = _engine(arm, max(running), Path(folder))
        names: list[str] = []
        try:
            while True:
                if (number := pipe.recv()) is None:
                    engine.step()
                else:
                    engine.abort_request(names)
                    engine.step()
                    names = _decode(engine, number)
                    timer.take()
                pipe.send(timer.take())
        except EOFError:
            return  # that was all


def _engine(arm: str, max_num_seqs: int, folder: Path) -> tuple[Any, Timer]:
    from vllm import LLM

    from vllm_dpp.bench.throughput.arms import Model, parse_arm
    from vllm_dpp.toy.checkpoint import make_checkpoint
    from vllm_dpp.toy.spec import TINY

    model = Model("Qwen2_5_VLForConditionalGeneration", TINY.num_layers)
    more = parse_arm(arm, model, retention_ratio=0.25, prune_layer=None).engine_args
    engine = LLM(
        str(make_checkpoint(folder / "toy")),
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=max_num_seqs,
        kv_cache_memory_bytes=3 * 2**30,
        **more,
    ).llm_engine
    core = engine.engine_core.engine_core
    methods = {
        "schedule": (core.scheduler, "schedule"),
        "update": (core.scheduler, "update_from_output"),
        "step": (engine, "step"),
    }
    if arm != "stock":
        loaded = core.model_executor.driver_worker.worker.model_runner.get_model()
        methods["layout"] = (loaded.pruning, "prepare_step")
    return engine, Timer(methods)


def _decode(engine: Any, number: int) -> list[str]:
    """Names of as many new requests, each past its prompt."""
    from vllm import SamplingParams

    from vllm_dpp.bench.throughput.workload import Workload

    work = Workload(number, 8, 112, 112, output_tokens=OUTPUT_TOKENS, seed=number)
    params = SamplingParams(max_tokens=OUTPUT_TOKENS, ignore_eos=True, detokenize=False)
    names = [f"{number}-{i}" for i in range(number)]
    for name, prompt in zip(names, work.prompts(engine.get_tokenizer()), strict=True):
        engine.add_request(name, prompt, params)
    requests = engine.engine_core.engine_core.scheduler.requests
    while any(not request.num_output_tokens for request in requests.values()):
        engine.step()
    for _ in range(WARM_UP):
        engine.step()
    return names


def prompt_seconds(size: int) -> dict[str, float]:
    """Seconds that a prompt of so many tokens, most of them of videos, costs when it arrives."""
    from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    from vllm_dpp.serving.engine.compact_hashes import CompactHashes
    from vllm_dpp.serving.request_plan import plan_request
    from vllm_dpp.serving.settings import ServingSettings

    settings = ServingSettings(turn_end_token_id=QUESTION, video_token_id=PAD)
    part = size // NUM_VIDEOS
    tokens = ([PAD] * (part - 20) + [QUESTION] * 20) * NUM_VIDEOS
    features = [
        MultiModalFeatureSpec(
            data=None,
            modality="video",
            identifier=f"video{i}",
            mm_position=PlaceholderRange(offset=i * part, length=part - 20),
        )
        for i in range(NUM_VIDEOS)
    ]
    hash_function = get_hash_fn_by_name("sha256")
    init_none_hash(hash_function)
    params, hasher = SamplingParams(), get_request_block_hasher(BLOCK_SIZE, hash_function)
    start = time.perf_counter()
    request = Request("it", tokens, params, None, mm_features=features, block_hasher=hasher)
    hashed = time.perf_counter()
    plan, _ = plan_request(tokens, features, params, settings, BLOCK_SIZE)
    planned = time.perf_counter()
    assert plan is not None
    names = len(list(CompactHashes(request, plan, BLOCK_SIZE, b"")))
    named = time.perf_counter()
    assert names < len(request.block_hashes)
    return {"hashing": hashed - start, "plan": planned - hashed, "names": named - planned}


def render(document: dict[str, Any]) -> str:
    """Both tables."""
    rows = []
    for number, taken in document["steps"].items():
        stock, ours = (taken[arm] for arm in ARMS)
        parts = [f"{_median(stock, part)} / {_median(ours, part)}" for part in HOST_PARTS]
        more = more_seconds(taken)
        step = median(one["step"] for one in stock)
        share = f"{100 * more / step:+.1f} %"
        rows.append((number, *parts, _median(ours, "layout"), _us(more), _us(step), share))
    header = ("decoding", "schedule", "update", "layout", "more", "stock's step", "of it")
    steps = table(header, rows)
    costs = [
        (size, *(_us(found[part]) for part in ("hashing", "plan", "names")))
        for size, found in document["prompts"].items()
    ]
    prompts = table(("tokens", "vLLM's hashes", "plan", "compact names"), costs)
    return (
        f"A step, us, medians: stock / with the plugin\n{steps}\n\n"
        f"A prompt of {NUM_VIDEOS} videos when it arrives, us\n{prompts}"
    )


def more_seconds(taken: dict[str, Steps]) -> float:
    """The median of what a step of the plugin's does more on the host than stock's before it."""
    stock, ours = (taken[arm] for arm in ARMS)
    return median(
        sum(mine[part] - theirs[part] for part in HOST_PARTS) + mine["layout"]
        for mine, theirs in zip(ours, stock, strict=True)
    )


def _median(steps: Steps, part: str) -> str:
    return _us(median(one[part] for one in steps))


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}"


if __name__ == "__main__":
    raise SystemExit(main())
