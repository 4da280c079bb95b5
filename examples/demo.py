"""Serve a small trained model, ask it about a video, unpruned and pruned, and compare.

Run it as `make demo` or `python examples/demo.py`. It needs no GPU and downloads nothing: the model
comes with the project, and the video is made on the spot, in `.cache/demo`. The model was not
trained on this video, but the video was chosen, as one whose questions it answers right; how often
it does is what `python -m vllm_dpp.quality.evaluate` measures.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from openai import OpenAI, OpenAIError

from vllm_dpp import show
from vllm_dpp.quality.model import TRAINED
from vllm_dpp.quality.questions import Question, make_questions
from vllm_dpp.quality.render import FPS, render
from vllm_dpp.quality.scene import DENSE, make_scene
from vllm_dpp.toy.video import as_data_url, write_mp4

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".cache" / "demo"
VIDEO, RECORDS = FOLDER / "video.mp4", FOLDER / "records"
LOG, PICTURE = FOLDER / "server.log", FOLDER / "kept.png"

SEED = 200_012  # of the video
QUESTIONS = (
    "what colour is the TRIANGLE?",
    "where is the ring?",
    "which came first the moon or the arrow?",
)
PRUNE_LAYER, RETENTION_RATIO = 4, 0.25
PATIENCE = 600  # seconds for the server's start, on a slow and busy machine
BYTES_PER_VALUE = 2  # of --dtype bfloat16
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def main() -> int:
    """Run the demo; 1 if the server does not start, a request fails or an answer is wrong."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    say("a small Qwen2.5-VL that was trained on videos of shapes, and a video that is new to it")
    questions = make_inputs()
    port = free_port()
    with running_server(serve_command(port)) as server:
        if not wait_until_healthy(server, port):
            return 1
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        say(f"{len(questions)} questions about the video, each unpruned and pruned")
        try:
            replies = [[ask(client, q.text, ratio) for ratio in (1.0, None)] for q in questions]
        except OpenAIError as error:
            print(f"{log_tail(40)}\n\n{error}; above is the end of {LOG}", file=sys.stderr)
            return 1
    num_wrong = report_answers(questions, replies)
    report_savings(*replies[0])
    draw(replies[0][1]["request_id"])
    say(f"done in {time.monotonic() - started:.0f} s")
    if num_wrong:
        print(f"{num_wrong} answers are wrong", file=sys.stderr)
    return int(num_wrong > 0)


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


def make_inputs() -> list[Question]:
    """Write the video; return `QUESTIONS` with their right answers."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(RECORDS, ignore_errors=True)
    scene = make_scene(SEED, DENSE)
    write_mp4(VIDEO, render(scene), FPS)
    return [question for question in make_questions(scene) if question.text in QUESTIONS]


def serve_command(port: int) -> list[str]:
    """`vllm-dpp serve`, with what makes a start on a small CPU quick."""
    program = Path(sys.executable).with_name("vllm-dpp")
    ours = ["--prune-layer", f"{PRUNE_LAYER}", "--retention-ratio", f"{RETENTION_RATIO}"]
    ours += ["--record-dir", os.path.relpath(RECORDS)]
    vllm = ["--port", f"{port}", "--dtype", "bfloat16", "--max-model-len", "1024"]
    # A turn loses whole KV blocks, so small ones keep close to the ratio.
    vllm += ["--block-size", "32", "--max-num-seqs", "4", "--enforce-eager"]
    return [os.path.relpath(program), "serve", os.path.relpath(TRAINED), *ours, *vllm]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The server in a process group of its own, which is gone afterwards whatever happens."""
    say(shlex.join(command))
    env = os.environ | OFFLINE
    if not torch.cuda.is_available():
        env = ON_CPU | env
    with LOG.open("wb") as log:
        server = subprocess.Popen(
            command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield server
    finally:
        stop(server)


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the whole group: politely first, then for certain."""
    for number, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
        try:
            os.killpg(server.pid, number)
            server.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def wait_until_healthy(server: subprocess.Popen[bytes], port: int) -> bool:
    """Wait for /health, saying how long and what the server does; on failure show its log."""
    started, said = time.monotonic(), 0.0
    in_place = sys.stdout.isatty()
    while (elapsed := time.monotonic() - started) < PATIENCE and server.poll() is None:
        if is_healthy(port):
            print("\r\033[K" if in_place else "", end="")
            say(f"server up after {elapsed:.0f} s")
            return True
        if in_place or elapsed - said >= 10:
            said = elapsed
            line = f"    {elapsed:3.0f} s  {last_log_line()}"[
                : shutil.get_terminal_size().columns - 1
            ]
            print(f"\r\033[K{line}" if in_place else line, end="" if in_place else "\n", flush=True)
        time.sleep(0.5)
    why = "took too long to start" if server.poll() is None else f"ended with {server.returncode}"
    print(f"\n{log_tail(40)}\n\nThe server {why}; above is the end of {LOG}", file=sys.stderr)
    return False


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def log_tail(num_lines: int) -> str:
    return "\n".join(LOG.read_text(errors="replace").splitlines()[-num_lines:])


def last_log_line() -> str:
    """The last line without the prefix of process, level and time."""
    line = log_tail(1).rpartition("\r")[2]
    return line.partition("] ")[2].strip() or line.strip() or "starting Python"


def ask(client: OpenAI, question: str, retention_ratio: float | None) -> dict[str, Any]:
    """Ask about the video; `None` leaves the ratio to the server, 1 keeps every token.

    Returns:
        The request's block record, and its answer.
    """
    extra: dict[str, float] = {"dpp_record": 1}
    if retention_ratio is not None:
        extra["dpp_retention_ratio"] = retention_ratio
    content: list[Any] = [
        {"type": "video_url", "video_url": {"url": as_data_url(VIDEO)}},
        {"type": "text", "text": question},
    ]
    response = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": content}],
        max_tokens=16,
        temperature=0,
        extra_body={"vllm_xargs": extra},
    )
    record = json.loads(find_record(response.id, "blocks").read_text())
    return record | {"answer": (response.choices[0].message.content or "").strip()}


def find_record(response_id: str, kind: str) -> Path:
    """The record of a request, which the server writes as the request ends."""
    for _ in range(50):
        if found := list(RECORDS.glob(f"{response_id}*.{kind}.json")):
            return found[0]
        time.sleep(0.1)
    raise FileNotFoundError(f"no {kind} record of {response_id} in {RECORDS}")


def report_answers(questions: list[Question], replies: list[list[dict[str, Any]]]) -> int:
    """Print what is right and what was answered; return how many answers are wrong."""
    print(f"\n    {'question':44}{'right':12}{'unpruned':20}pruned")
    num_wrong = 0
    for question, both in zip(questions, replies, strict=True):
        given = [reply["answer"] for reply in both]
        num_wrong += sum(answer != question.answer for answer in given)
        marked = [f"{a!a} {'right' if a == question.answer else 'WRONG'}" for a in given]
        print(f"    {question.text:44}{question.answer:12}{marked[0]:20}{marked[1]}")
    return num_wrong


def report_savings(unpruned: dict[str, Any], pruned: dict[str, Any]) -> None:
    """Print a table of what pruning saved on the first question."""
    both = (unpruned, pruned)
    config = json.loads((TRAINED / "config.json").read_text())["text_config"]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    token_bytes = 2 * config["num_key_value_heads"] * head_dim * BYTES_PER_VALUE

    def row(name: str, before: int, after: int) -> None:
        change = f"{after / before - 1:+9.0%}" if after != before else f"{'same':>9}"
        print(f"    {name:38}{before:9,} {after:9,} {change}")

    def memory(record: dict[str, Any]) -> int:
        """In KiB. Every block has room for as many layers as the largest group has."""
        num_layers = max(group["layers"] for group in record["kv_groups"])
        blocks = sum(group["blocks"] for group in record["kv_groups"])
        return blocks * num_layers * record["block_size"] * token_bytes // 1024

    last_layer = config["num_hidden_layers"] - 1
    lower, upper = f"layers 0-{PRUNE_LAYER - 1}", f"layers {PRUNE_LAYER}-{last_layer}"
    print(f"\n    {'of the first question':38}{'unpruned':>9} {'pruned':>9} {'change':>9}")
    row(f"video tokens in {lower}", *(r["num_video_tokens"] for r in both))
    row(f"video tokens in {upper}", *(r["num_video_tokens"] - r["num_pruned_tokens"] for r in both))
    for number, groups in enumerate(zip(*(r["kv_groups"] for r in both), strict=True)):
        kind = "lower" if groups[0]["kind"] == "FullAttentionSpec" else "upper"
        name = f"KV blocks, group {number} ({groups[0]['layers']} {kind} layers)"
        row(name, *(group["blocks"] for group in groups))
    row("KV memory, KiB", *(memory(r) for r in both))
    print(f"    (a turn loses whole KV blocks of {pruned['block_size']} tokens)\n")


def draw(request_id: str) -> None:
    """Draw the kept tokens over the video."""
    kept = show.KeptVideo.load(find_record(request_id, "kept"))
    show.draw(kept, show.read_frames(VIDEO, len(kept.kept))).save(PICTURE)
    say(f"what was kept for the first question: {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
