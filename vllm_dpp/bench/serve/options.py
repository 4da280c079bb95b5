"""The command line of the serving benchmark."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2

from vllm_dpp.batch.rows import videos_in
from vllm_dpp.bench.chat.arms import EVS_WORKER
from vllm_dpp.bench.help import HelpFormatter
from vllm_dpp.bench.throughput.arms import GRAMMAR, Arm

MODULE = "vllm_dpp.bench.serve"
ARMS = ("stock", "evs@0.6", "two-stages@0.4")
PROFILES = {
    "cpu": {
        "model": "toy:mid",
        "seconds": 8.0,
        "side": 168,
        "output_tokens": 32,
        "max_model_len": 4096,
        "kv_cache_gib": 0.25,
    },
    "gpu": {
        "model": "Qwen/Qwen2.5-VL-7B-Instruct",
        "seconds": 16.0,
        "side": 448,
        "output_tokens": 128,
        "max_model_len": 8192,
        "kv_cache_gib": 4.0,
    },
}
"""What holds where nothing else is said. Either has KV memory for some of 32 requests at once."""
FRAMES_PER_SECOND = 30
"""Of the videos that `vllm bench serve` makes; a server reads two of them a second."""
QUESTIONS = (
    "What happens in this video?",
    "Who or what can be seen, and where?",
    "What is different at the end?",
    "Which moment matters most, and why?",
)
"""About the videos of a folder."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments; wrong ones end the program with status 2."""
    parser = argparse.ArgumentParser(
        prog="vllm-dpp bench serve",
        description="Stock vLLM, EVS and this plugin in turn under vLLM's own `vllm bench serve`: "
        "one video a request, random or of a folder, so many requests at once. All servers stay "
        "up, one is asked at a time. Other flags go to every server.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--profile", choices=PROFILES, default="cpu", help=f"defaults of others: {_profiles()}")
    add("--model", help="a checkpoint, or toy:mid or toy:tiny (random weights)")
    add("--arms", nargs="+", default=list(ARMS), metavar="ARM", help=GRAMMAR)
    add("--concurrency", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="at once")
    add("--rounds", type=int, default=2, help="of each arm and concurrency, each of other videos")
    add("--waves", type=int, default=2, help="requests of a round: so many times the concurrency")
    add("--videos", type=Path, metavar="FOLDER", help="ask about these instead, again and again")
    add("--seconds", type=float, help="of a random video")
    add("--side", type=int, help="height and width of a random video, in pixels")
    add("--output-tokens", type=int, help="of a request")
    add(
        "--goodput", nargs="+", default=[], metavar="METRIC:MS", help="as `vllm bench serve` has it"
    )
    add("--max-model-len", type=int, help="limit of tokens in a request")
    add("--kv-cache-gib", type=float, help="KV memory of each server")
    add("--gpu-memory-utilization", type=float, help="of each; left out: 0.9 shared by all")
    add("--output", type=Path, metavar="FILE.json", help="all numbers with provenance; FILE.md too")
    add("--plot", type=Path, metavar="FILE.png", help="draw them, with matplotlib")
    parser.set_defaults(**PROFILES[parser.parse_known_args(argv)[0].profile])
    options, flags = parser.parse_known_args(argv)
    options.flags = flags
    if "stock" not in options.arms or len(set(options.arms)) < len(options.arms):
        parser.error("--arms needs stock, and each arm once: every ratio is one to stock's")
    if options.videos is not None:
        try:
            _check_videos(options.videos)
        except ValueError as error:
            parser.error(f"--videos: {error}")
    if min(*options.concurrency, options.rounds, options.waves) < 1:
        parser.error("--concurrency, --rounds and --waves must be at least 1")
    return options


def _profiles() -> str:
    """Of each what it sets, for the help."""
    return "; ".join(
        f"{name}: " + ", ".join(f"--{key.replace('_', '-')} {value}" for key, value in own.items())
        for name, own in PROFILES.items()
    )


def _check_videos(folder: Path) -> None:
    """The client keeps a server's refusal, but not of which video."""
    for video in videos_in(folder):
        if not cv2.VideoCapture(str(video)).grab():
            raise ValueError(f"{video} cannot be read: mend it or take it out of the folder")


def server_flags(arm: Arm, options: argparse.Namespace, *, on_cpu: bool) -> list[str]:
    """What `vllm serve` is started with for an arm."""
    flags = [
        *("--max-model-len", str(options.max_model_len)),
        *("--kv-cache-memory-bytes", str(int(options.kv_cache_gib * 2**30))),
        *("--limit-mm-per-prompt", json.dumps({"image": 0, "video": 1})),
    ]
    if options.videos is not None:
        flags += ["--allowed-local-media-path", str(options.videos.resolve())]
    for name, value in arm.engine_args.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        flags += [f"--{name.replace('_', '-')}", text]
    if arm.name.startswith("evs"):  # warm and cold answers of stock EVS differ
        flags += ["--no-enable-prefix-caching"]
        flags += ["--worker-cls", EVS_WORKER] if on_cpu else []
    if options.model.startswith("toy:"):
        flags += ["--dtype", "float32"]
    if on_cpu:
        flags += ["--enforce-eager"]
    else:
        share = options.gpu_memory_utilization or round(0.9 / len(options.arms), 3)
        flags += ["--gpu-memory-utilization", str(share)]
    return flags + options.flags


def client_flags(
    options: argparse.Namespace, concurrency: int, seed: int, folder: Path
) -> list[str]:
    """What `vllm bench serve` is asked for, beside the server and where its result goes.

    Args:
        options: of the command line.
        concurrency: requests at once.
        seed: other requests for another.
        folder: for files that the client reads.
    """
    count = concurrency * options.waves
    return [
        *("--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
        *("--seed", str(seed), "--num-warmups", "0"),
        *("--num-prompts", str(count), "--max-concurrency", str(concurrency)),
        *_dataset(options, count, seed, folder),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,99"),
        *("--ignore-eos", "--temperature", "0", "--disable-tqdm"),
        *(["--goodput", *options.goodput] if options.goodput else []),
    ]


def _dataset(options: argparse.Namespace, count: int, seed: int, folder: Path) -> list[str]:
    if options.videos is None:
        frames = round(options.seconds * FRAMES_PER_SECOND)
        return [
            *("--dataset-name", "random-mm"),
            *("--random-input-len", "16", "--random-output-len", str(options.output_tokens)),
            *("--random-mm-base-items-per-request", "1"),
            *("--random-mm-limit-mm-per-prompt", json.dumps({"image": 0, "video": 1})),
            *("--random-mm-bucket-config", str({(options.side, options.side, frames): 1.0})),
        ]
    file = folder / "requests.json"
    file.write_text(json.dumps(requests_about(videos_in(options.videos), count, seed)))
    length = str(options.output_tokens)
    return [
        *("--dataset-name", "sharegpt", "--dataset-path", str(file)),
        *("--sharegpt-output-len", length),
    ]


def requests_about(videos: Sequence[Path], count: int, seed: int) -> list[dict[str, Any]]:
    """Entries of a dataset in ShareGPT's format: videos and questions in turn, no request twice.

    The client puts a question before its video, so that a number in front of it is enough.
    """
    entries = []
    for index in range(count):
        question = QUESTIONS[(index // len(videos)) % len(QUESTIONS)]
        text = f"{seed}.{index}: {question}"
        turns = [{"from": "human", "value": text}, {"from": "gpt", "value": ""}]
        video = videos[(index + seed) % len(videos)]
        entries.append({"video": str(video.resolve()), "conversations": turns})
    return entries
