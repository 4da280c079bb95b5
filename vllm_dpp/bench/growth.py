"""What the plugin's bookkeeping costs on the host, as requests and prompts grow.

``vllm-dpp bench growth`` times an engine's own steps with N requests that decode after a pruned
video, in stock vLLM and with the plugin: scheduling, taking in the results, and laying out the step
on the worker. Then what a prompt costs once, when its request arrives: vLLM's hashing of its
blocks, and the plan and the names of the compact blocks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from vllm_dpp.bench.provenance import one_line, provenance
from vllm_dpp.bench.summary import table

MODULE = "vllm_dpp.bench.growth"
ARMS = ("stock", "dpp")
STEPS, WARM_UP = 30, 5
QUESTION, PAD, BLOCK_SIZE, NUM_VIDEOS = 1, 2, 16, 4

Steps = dict[str, dict[str, float]]
"""Median seconds of a step's parts, by requests that run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 0, or the status of an engine that failed."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parse(arguments)
    if options.only is not None:
        options.json.write_text(json.dumps(steps_of(options.only, options.running)))
        return 0
    rounds: dict[str, list[Steps]] = {arm: [] for arm in ARMS}
    for arm in ARMS * options.rounds:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "steps.json"
            asked = ["--only", arm, "--running", *map(str, options.running), "--json", str(file)]
            environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            environment |= {"VLLM_PLUGINS": ""} if arm == "stock" else {}
            command = [sys.executable, "-m", MODULE, *asked]
            if status := subprocess.run(command, env=os.environ | environment).returncode:
                return status
            rounds[arm].append(json.loads(file.read_text()))
    document = {
        "provenance": provenance(MODULE, arguments),
        "steps": {arm: median_of(found) for arm, found in rounds.items()},
        "rounds": rounds,
        "prompts": {str(size): prompt_seconds(size) for size in options.prompts},
    }
    print(f"{one_line(document['provenance'])}\n\n{render(document)}")
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
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
    add("--rounds", type=int, default=3, metavar="N", help="of both engines in turn (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write all numbers, with provenance")
    add("--only", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.rounds, *options.running) < 1:
        parser.error("--rounds and --running must be at least 1")
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
        """The median of each since the last call."""
        taken = {label: median(found) for label, found in self.seconds.items() if found}
        for found in self.seconds.values():
            found.clear()
        return taken


def median_of(rounds: Sequence[Steps]) -> Steps:
    """The medians of what several rounds found."""
    return {
        number: {part: median(one[number][part] for one in rounds) for part in parts}
        for number, parts in rounds[0].items()
    }


def steps_of(arm: str, running: Sequence[int]) -> Steps:
    """Times an engine's steps."""
    from vllm import LLM, SamplingParams

    from vllm_dpp.bench.throughput.arms import Model, parse_arm
    from vllm_dpp.bench.throughput.workload import Workload
    from vllm_dpp.toy.checkpoint import make_checkpoint
    from vllm_dpp.toy.spec import TINY

    model = Model("Qwen2_5_VLForConditionalGeneration", TINY.num_layers)
    more = parse_arm(arm, model, retention_ratio=0.25, prune_layer=None).engine_args
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(
            str(make_checkpoint(Path(folder) / "toy")),
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            max_num_seqs=max(running),
            kv_cache_memory_bytes=3 * 2**30,
            **more,
        )
        engine = llm.llm_engine
        core = engine.engine_core.engine_core
        methods = {
            "schedule": (core.scheduler, "schedule"),
            "update": (core.scheduler, "update_from_output"),
            "step": (engine, "step"),
        }
        if arm != "stock":
            loaded = core.model_executor.driver_worker.worker.model_runner.get_model()
            methods["layout"] = (loaded.pruning, "prepare_step")
        timer = Timer(methods)
        found = {}
        for number in running:
            work = Workload(number, 8, 112, 112, output_tokens=512, seed=number)
            params = SamplingParams(max_tokens=512, ignore_eos=True, detokenize=False)
            names = [f"{number}-{i}" for i in range(number)]
            for name, prompt in zip(names, work.prompts(llm.get_tokenizer()), strict=True):
                engine.add_request(name, prompt, params)
            while any(not request.num_output_tokens for request in _live(core, number)):
                engine.step()
            for _ in range(WARM_UP):
                engine.step()
            timer.take()
            for _ in range(STEPS):
                engine.step()
            found[str(number)] = timer.take()
            engine.abort_request(names)
            engine.step()
    return found


def _live(core: Any, number: int) -> list[Any]:
    requests = list(core.scheduler.requests.values())
    assert len(requests) == number, "some ended before they were timed"
    return requests


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
    stock, ours = (document["steps"][arm] for arm in ARMS)
    rows = []
    for number, mine in ours.items():
        theirs = stock[number]
        more = sum(mine[part] - theirs[part] for part in ("schedule", "update")) + mine["layout"]
        parts = [f"{_us(theirs[part])} / {_us(mine[part])}" for part in ("schedule", "update")]
        share = f"{100 * more / theirs['step']:+.1f} %"
        rows.append(
            (number, *parts, _us(mine["layout"]), _us(more), f"{_us(theirs['step'])}", share)
        )
    header = ("decoding", "schedule", "update", "layout", "more", "stock's step", "of it")
    steps = table(header, rows)
    costs = [
        (size, *(_us(found[part]) for part in ("hashing", "plan", "names")))
        for size, found in document["prompts"].items()
    ]
    prompts = table(("tokens", "vLLM's hashes", "plan", "compact names"), costs)
    return (
        f"A step, us: stock / with the plugin\n{steps}\n\n"
        f"A prompt of {NUM_VIDEOS} videos when it arrives, us\n{prompts}"
    )


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}"


if __name__ == "__main__":
    raise SystemExit(main())
