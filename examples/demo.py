"""Serve a toy model, ask it about a video twice, once pruned and once not, and compare.

Run it as `make demo` or `python examples/demo.py`. It needs no GPU and downloads nothing: the
checkpoint and the video are made on the spot, in `.cache/demo`.
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

from openai import OpenAI, OpenAIError

from vllm_dpp import show
from vllm_dpp.toy.video import as_data_url, render_frames, write_mp4

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".cache" / "demo"
CHECKPOINT, VIDEO, RECORDS = FOLDER / "checkpoint", FOLDER / "video.mp4", FOLDER / "records"
LOG, PICTURE = FOLDER / "server.log", FOLDER / "kept.png"

NUM_FRAMES, HEIGHT, WIDTH, FPS = 96, 252, 448, 8
PRUNE_LAYER, RETENTION_RATIO = 2, 0.25
QUESTION = "What moves through the picture?"
PATIENCE = 600  # seconds for the server's start, on a slow and busy machine
BYTES_PER_VALUE = 2  # of --dtype bfloat16
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def main() -> int:
    """Run the demo; 1 if the server does not start or a request fails."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    started = time.monotonic()
    say(f"a toy Qwen2.5-VL with random weights and a video of {NUM_FRAMES // FPS} s")
    make_inputs()
    port = free_port()
    with running_server(serve_command(port)) as server:
        if not wait_until_healthy(server, port):
            return 1
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        say(f"the same video and question twice: {QUESTION!r}")
        try:
            pruned, unpruned = (ask(client, ratio) for ratio in (None, 1.0))
        except OpenAIError as error:
            print(f"{log_tail(40)}\n\n{error}; above is the end of {LOG}", file=sys.stderr)
            return 1
    report(unpruned, pruned)
    draw(pruned["request_id"])
    say(f"done in {time.monotonic() - started:.0f} s")
    return 0


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


def make_inputs() -> None:
    """The checkpoint and the video, unless they are there from the last time."""
    from vllm_dpp.toy.checkpoint import make_checkpoint  # takes seconds to import

    FOLDER.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(RECORDS, ignore_errors=True)
    make_checkpoint(CHECKPOINT)
    if not VIDEO.exists():
        write_mp4(VIDEO, render_frames(0, NUM_FRAMES, HEIGHT, WIDTH), FPS)


def serve_command(port: int) -> list[str]:
    """`vllm-dpp serve`, with what makes a start on a small CPU quick."""
    program = Path(sys.executable).with_name("vllm-dpp")
    ours = ["--prune-layer", f"{PRUNE_LAYER}", "--retention-ratio", f"{RETENTION_RATIO}"]
    ours += ["--record-dir", os.path.relpath(RECORDS)]
    vllm = ["--port", f"{port}", "--dtype", "bfloat16", "--max-model-len", "8192"]
    # A turn loses whole KV blocks, so small ones keep close to the ratio.
    vllm += ["--block-size", "32", "--max-num-seqs", "4", "--enforce-eager"]
    return [os.path.relpath(program), "serve", os.path.relpath(CHECKPOINT), *ours, *vllm]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The server in a process group of its own, which is gone afterwards whatever happens."""
    say(shlex.join(command))
    import torch

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


def ask(client: OpenAI, retention_ratio: float | None) -> dict[str, Any]:
    """Ask about the video.

    Args:
        client: Of the server.
        retention_ratio: `None` leaves it to the server, 1 keeps every token.

    Returns:
        The request's block record, its answer and its time in seconds.
    """
    extra = {"dpp_record": 1}
    if retention_ratio is not None:
        extra["dpp_retention_ratio"] = retention_ratio
    content = [
        {"type": "video_url", "video_url": {"url": as_data_url(VIDEO)}},
        {"type": "text", "text": QUESTION},
    ]
    started = time.monotonic()
    response = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": content}],
        max_tokens=16,
        temperature=0,
        extra_body={"vllm_xargs": extra},
    )
    record = json.loads(find_record(response.id, "blocks").read_text())
    answer = response.choices[0].message.content
    return record | {"answer": answer, "seconds": time.monotonic() - started}


def find_record(response_id: str, kind: str) -> Path:
    """The record of a request, which the server writes as the request ends."""
    for _ in range(50):
        if found := list(RECORDS.glob(f"{response_id}*.{kind}.json")):
            return found[0]
        time.sleep(0.1)
    raise FileNotFoundError(f"no {kind} record of {response_id} in {RECORDS}")


def report(unpruned: dict[str, Any], pruned: dict[str, Any]) -> None:
    """Both answers, and a table of what pruning saved."""
    from vllm_dpp.toy.checkpoint import TINY

    both = (unpruned, pruned)
    token_bytes = 2 * TINY.num_kv_heads * TINY.head_dim * BYTES_PER_VALUE

    def row(name: str, before: int, after: int, unit: str = "") -> None:
        change = f"{after / before - 1:+9.0%}" if after != before else f"{'same':>9}"
        print(f"    {name:38}{before:9,}{unit} {after:9,}{unit} {change}")

    def blocks(record: dict[str, Any]) -> int:
        return sum(group["blocks"] * group["layers"] for group in record["kv_groups"])

    lower, upper = f"layers 0-{PRUNE_LAYER - 1}", f"layers {PRUNE_LAYER}-{TINY.num_layers - 1}"
    print(f"\n    {'':38}{'unpruned':>9} {'pruned':>9} {'change':>9}")
    row(f"video tokens in {lower}", *(r["num_video_tokens"] for r in both))
    row(f"video tokens in {upper}", *(r["num_video_tokens"] - r["num_pruned_tokens"] for r in both))
    for number, groups in enumerate(zip(*(r["kv_groups"] for r in both), strict=True)):
        kind = "lower" if groups[0]["kind"] == "FullAttentionSpec" else "upper"
        name = f"KV blocks, group {number} ({groups[0]['layers']} {kind} layers)"
        row(name, *(group["blocks"] for group in groups))
    row("KV blocks x layers", *(blocks(r) for r in both))
    row("KV memory, KiB", *(blocks(r) * r["block_size"] * token_bytes // 1024 for r in both))
    print(f"    (a turn loses whole KV blocks of {pruned['block_size']} tokens)")
    print(f"\n    answer unpruned   {ascii(unpruned['answer'])}")
    print(f"    answer pruned     {ascii(pruned['answer'])}")
    print("    (random weights: the text is noise, the accounting is real)\n")


def draw(request_id: str) -> None:
    """Draw the kept tokens over the video."""
    kept = show.KeptVideo.load(find_record(request_id, "kept"))
    show.draw(kept, show.read_frames(VIDEO, len(kept.kept))).save(PICTURE)
    say(f"what was kept: {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
