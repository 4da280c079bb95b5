"""Run lmms-eval on a pruned server and on its two controls, and compare them question by question.

    python examples/lmms_eval.py Qwen/Qwen2.5-VL-7B-Instruct --output results          # prints only
    python examples/lmms_eval.py Qwen/Qwen2.5-VL-7B-Instruct --output results --run
    python examples/lmms_eval.py Qwen/Qwen2.5-VL-7B-Instruct --output results --compare

The arms are `unpruned` (stock vLLM), `downsampled` (stock vLLM, with so many fewer frames that as
much is left of a video's KV and prefill as after pruning, K/L + (1 - K/L) r) and `pruned`. Flags
that --help does not list go to every server.

lmms-eval (0.7.3) wants an environment of its own, and some care, which the commands take:

- Only with `pass_video_url=True` does it send videos, else images, which are not pruned.
- `max_frames_num` then travels with every request and takes the place of the `fps` of the server's
  --media-io-kwargs. vLLM 0.32 answers 400 to it without --trust-request-mm-kwargs, and its loader
  for Qwen2.5-VL ignores it: two frames a second in every arm. The loader "opencv" obeys.
- Videos are file:// URLs under $HF_HOME. The server must be allowed to read there, and without
  HF_HOME some tasks look elsewhere.
- For a model with "o1", "o3" or "o4" in its name or path it drops temperature and length: hence the
  served name.
- It scores a failed request as a wrong answer, and ends with status 0 after most errors; here both
  are errors. An answer without a letter becomes a random one in LongVideoBench.
- `mvbench_episodic_reasoning` is made of images: nothing is pruned there, in no arm.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from vllm_dpp.bench.quality.statistics import mcnemar
from vllm_dpp.bench.summary import table
from vllm_dpp.serving.cost_model import kv_share
from vllm_dpp.serving.layer_groups import default_prune_layer

TASKS = ["videomme", "mvbench", "longvideobench_val_v", "mlvu_dev"]
SERVED_NAME = "served"
CONTROL = "unpruned"
ARMS = (CONTROL, "downsampled", "pruned")
TEXT_TOKENS = 4096  # room for the question and the answer
PIXELS_PER_TOKEN = 28 * 28  # of each of the two frames that share a token
FAILED = "[LMMS_EVAL_"  # how lmms-eval's answer to a failed request begins
START_TIMEOUT_S = 1800

Samples = dict[tuple[str, int], dict[str, Any]]  # by task and question


@dataclass(frozen=True)
class Arm:
    """One way to answer all questions: the server, and how many frames it takes of a video."""

    name: str
    server: tuple[str, ...]
    num_frames: int


def main(argv: Sequence[str] | None = None) -> int:
    """Print the commands, run them, or compare what they left; 1 if that is impossible."""
    args = parse_arguments(argv)
    try:
        if not args.compare:
            arms = build_arms(args, count_layers(args.model))
            (run if args.run else show)(arms, args)
        if args.compare or args.run:
            print(compare({name: read_samples(args.output / name) for name in ARMS}))
    except (ValueError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"lmms_eval.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s MODEL --output FOLDER [options] [any flag of `vllm serve`]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", help="name or path of a Qwen2.5-VL")
    parser.add_argument("--output", type=Path, required=True, help="folder; a new one for --run")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--run", action="store_true", help="run the commands, then compare")
    mode.add_argument("--compare", action="store_true", help="compare the logs in --output")
    parser.add_argument("--prune-layer", type=int, help="K; default: as `vllm-dpp serve`")
    parser.add_argument("--retention-ratio", type=float, default=0.25, help="r (%(default)s)")
    parser.add_argument("--num-frames", type=int, default=64, help="of a video (%(default)s)")
    parser.add_argument("--frame-tokens", type=int, default=256, help="most of two frames (256)")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help=" ".join(TASKS))
    parser.add_argument("--include-path", help="folder with tasks of your own")
    parser.add_argument("--limit", type=int, help="questions of a task, for a try")
    parser.add_argument("--num-concurrent", type=int, default=16, help="requests (%(default)s)")
    parser.add_argument("--lmms-eval", default="lmms-eval", help="the program, by name or path")
    parser.add_argument("--port", type=int, default=8000)
    args, server_flags = parser.parse_known_args(argv)
    return argparse.Namespace(**vars(args), server_flags=server_flags)


def count_layers(model: str) -> int:
    """L, of the decoder."""
    from transformers import AutoConfig  # takes seconds to import

    return int(AutoConfig.from_pretrained(model).get_text_config().num_hidden_layers)


def build_arms(args: argparse.Namespace, num_layers: int) -> list[Arm]:
    """The arms in the order in which they run; neighbours may have the same server.

    Raises:
        ValueError: K, r or the number of frames is out of range.
    """
    prune_layer = args.prune_layer
    if prune_layer is None:
        prune_layer = default_prune_layer(num_layers)
    if not 0 <= prune_layer < num_layers:
        raise ValueError(f"--prune-layer must be in [0, {num_layers}), got {prune_layer}")
    ratio = args.retention_ratio
    if not 0 < ratio <= 1:
        raise ValueError(f"--retention-ratio must be in (0, 1], got {ratio}")
    if args.num_frames < 2:
        raise ValueError(f"--num-frames must be at least 2, got {args.num_frames}")
    share = kv_share(prune_layer, num_layers, ratio)
    fewer = 2 * max(1, round(share * args.num_frames / 2))  # whole slices of two frames
    common = (args.model, *server_flags(args))
    settings = ("--prune-layer", f"{prune_layer}", "--retention-ratio", f"{ratio}")
    stock, pruned = ("vllm", "serve", *common), ("vllm-dpp", "serve", *common, *settings)
    servers, frames = (stock, stock, pruned), (args.num_frames, fewer, args.num_frames)
    return [Arm(*arm) for arm in zip(ARMS, servers, frames, strict=True)]


def server_flags(args: argparse.Namespace) -> list[str]:
    """What all servers share: the limits too, so that no arm schedules otherwise than another."""
    tokens = -(-args.num_frames // 2) * args.frame_tokens + TEXT_TOKENS
    size = {
        "shortest_edge": 4 * PIXELS_PER_TOKEN,
        "longest_edge": args.frame_tokens * PIXELS_PER_TOKEN,
    }
    flags = ["--served-model-name", SERVED_NAME, "--host", "127.0.0.1", "--port", f"{args.port}"]
    flags += ["--max-model-len", f"{tokens}"]
    flags += ["--media-io-kwargs", json.dumps({"video": {"video_backend": "opencv"}})]
    flags += ["--mm-processor-kwargs", json.dumps({"videos_kwargs": {"size": size}})]
    flags += ["--allowed-local-media-path", hf_home(), "--trust-request-mm-kwargs"]
    return flags + args.server_flags


def hf_home() -> str:
    """Where lmms-eval's tasks keep their videos."""
    return os.path.abspath(os.path.expanduser(os.getenv("HF_HOME", "~/.cache/huggingface")))


def evaluation(arm: Arm, args: argparse.Namespace) -> list[str]:
    """The command that asks the server of `arm` all questions."""
    model = f"model={SERVED_NAME},base_url=http://127.0.0.1:{args.port}/v1,api_key=none"
    model += f",pass_video_url=True,max_frames_num={arm.num_frames}"
    model += f",num_concurrent={args.num_concurrent}"
    command = ["env", f"HF_HOME={hf_home()}", args.lmms_eval, "--model", "openai"]
    command += ["--model_args", model, "--tasks", ",".join(args.tasks)]
    command += ["--log_samples", "--output_path", str(args.output / arm.name)]
    if args.include_path:
        command += ["--include_path", args.include_path]
    return command + (["--limit", f"{args.limit}"] if args.limit else [])


def show(arms: Sequence[Arm], args: argparse.Namespace) -> None:
    """Print the commands for a shell; a server runs while its evaluations do."""
    for server, group in groupby(arms, key=lambda arm: arm.server):
        print(f"\n# a server, to be stopped before the next one\n{shlex.join(server)}")
        for arm in group:
            print(f"\n# {arm.name}: {arm.num_frames} frames\n{shlex.join(evaluation(arm, args))}")


def run(arms: Sequence[Arm], args: argparse.Namespace) -> None:
    """Start each server once, and ask it the questions of its arms."""
    args.output.mkdir(parents=True)  # logs of other settings must not be mixed with these
    for number, (server, group) in enumerate(groupby(arms, key=lambda arm: arm.server)):
        with serving(server, args.port, args.output / f"server{number}.log"):
            for arm in group:
                command = evaluation(arm, args)
                print(f"+ {shlex.join(command)}", flush=True)
                subprocess.run(command, check=True)
                read_samples(args.output / arm.name)


@contextmanager
def serving(command: Sequence[str], port: int, log: Path) -> Iterator[None]:
    """A server, from its first healthy moment on, in a process group that ends with the block.

    Raises:
        RuntimeError: It does not start.
    """
    if is_healthy(port):
        raise RuntimeError(f"another server answers on port {port}: stop it, or give a --port")
    print(f"+ {shlex.join(command)}", flush=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with log.open("wb") as out:
        server = subprocess.Popen(
            command, env=os.environ | {"PATH": path}, stdout=out, stderr=out, start_new_session=True
        )
    try:
        end = time.monotonic() + START_TIMEOUT_S
        while not is_healthy(port):
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start, see {log}")
            time.sleep(1)
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(server.pid, number)
                server.wait(30)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def read_samples(folder: Path) -> Samples:
    """What lmms-eval logged in the newest run of every task.

    Raises:
        ValueError: There is nothing, or a request had failed.
    """
    newest = {path.name.split("_samples_")[1]: path for path in sorted(folder.glob("*/*.jsonl"))}
    samples: Samples = {}
    for name, path in newest.items():
        with path.open(encoding="utf-8") as lines:  # splitlines() would split inside answers, too
            for sample in map(json.loads, lines):
                if FAILED in str(sample["filtered_resps"]):
                    raise ValueError(f"{path}: request failed: {sample['filtered_resps']}")
                samples[name.removesuffix(".jsonl"), sample["doc_id"]] = sample
    if not samples:
        raise ValueError(f"no samples in {folder}: lmms-eval failed")
    return samples


def compare(arms: dict[str, Samples]) -> str:
    """A table: how each arm did in every task and in all, beside the unpruned arm.

    Every question counts once, where some tasks' own score is a mean over kinds of question.
    `lost` and `won` are the questions that the unpruned arm alone and this arm alone answered
    rightly; `p` is of McNemar's exact test on them. It takes questions for independent: several
    about one video are less so, and make p too small. Prompt tokens are counted before pruning.

    Raises:
        ValueError: The arms did not answer the same questions.
    """
    control = arms[CONTROL]
    for name, samples in arms.items():
        if questions(samples) != questions(control):
            raise ValueError(f"{name} and {CONTROL} did not answer the same questions")
    rows = []
    for task in [*dict.fromkeys(task for task, _ in control), "all"]:
        keys = [key for key in control if task in (key[0], "all")]
        right = [is_right(control[key]) for key in keys]
        for name, samples in arms.items():
            here = [is_right(samples[key]) for key in keys]
            tokens = sum(prompt_tokens(samples[key]) for key in keys) / len(keys)
            paired = ["", "", ""] if name == CONTROL else paired_test(right, here)
            accuracy = f"{100 * sum(here) / len(keys):.1f} %"
            rows.append([f"{task} {name}", f"{len(keys)}", accuracy, *paired, f"{tokens:.0f}"])
    return table(["", "questions", "right", "lost", "won", "p", "prompt tokens"], rows)


def questions(samples: Samples) -> dict[tuple[str, int], tuple[str, str]]:
    """Texts and right answers; `doc_hash` is the same for all questions of a chat model."""
    return {key: (sample["input"], sample["target"]) for key, sample in samples.items()}


def is_right(sample: dict[str, Any]) -> bool:
    """Whether an answer was right, by the score or the parsed answer that its task logged."""
    for value in sample.values():
        if isinstance(value, dict) and value.get("score") in (0, 1):
            return bool(value["score"])
        for parsed in ("pred_answer", "parsed_pred"):
            if isinstance(value, dict) and parsed in value and "answer" in value:
                return bool(value[parsed] == value["answer"])
    raise ValueError(f"no right or wrong in {sorted(sample)}: such a task cannot be compared")


def prompt_tokens(sample: dict[str, Any]) -> int:
    return int(sample["token_counts"][0]["input_tokens"])


def paired_test(control: Sequence[bool], here: Sequence[bool]) -> list[str]:
    """`lost`, `won` and `p`, as texts."""
    lost = sum(a > b for a, b in zip(control, here, strict=True))
    won = sum(a < b for a, b in zip(control, here, strict=True))
    return [f"{lost}", f"{won}", f"{mcnemar(lost, won):.3g}"]


if __name__ == "__main__":
    sys.exit(main())
