"""A real ``vllm-dpp serve`` in a process of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 300
WRITTEN_AFTER_S = 2.0


@dataclass(frozen=True)
class Server:
    """A running server.

    Args:
        url: Its root, without a trailing slash.
        model: The model name to ask for.
        log: Everything it prints.
        entry_only: Whether its scheduler is vLLM's own, which counts nothing of ours.
    """

    url: str
    model: str
    log: Path
    entry_only: bool = False

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and JSON answer of one request."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def metrics(self) -> list[str]:
        """The lines of all Prometheus metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as reply:
            return reply.read().decode().splitlines()

    def metric(self, name: str, label: str = "") -> float:
        """Sum of one Prometheus metric over its labels, or over those that hold ``label``."""
        found = [line.split() for line in self.metrics() if line.startswith(name + "{")]
        if not found:
            raise KeyError(name)
        return sum(float(parts[-1]) for parts in found if label in parts[0])

    def counts(self) -> dict[str, float]:
        """What is on the server's ``/metrics`` of video pruning, and only counts up; all processes
        have written theirs when nothing has happened for a moment.
        """
        time.sleep(WRITTEN_AFTER_S)
        labels = {
            "video_tokens_total": [f'stage="{stage}"' for stage in ("seen", "entered", "kept")],
            "selection_seconds_count": [f'part="{x}"' for x in ("entry", "relevance", "choice")],
        }
        found = {
            label: self.metric(f"vllm_dpp_{name}", label)
            for name, several in labels.items()
            for label in several
        }
        names = ["vllm_dpp_saved_kv_bytes_total"]
        if not self.entry_only:
            names.append("vllm_dpp_cached_videos_total")
        return found | {name: self.metric(name) for name in names}

    def counted(self, before: dict[str, float], seen: int) -> dict[str, float]:
        """What was added to ``counts``, once so many tokens more have been seen."""
        end = time.monotonic() + 30
        while (now := self.counts())['stage="seen"'] < before['stage="seen"'] + seen:
            assert time.monotonic() < end, (before, now)
        return {name: value - before[name] for name, value in now.items()}


@contextmanager
def serve(model: Path, log: Path, arguments: Sequence[str]) -> Iterator[Server]:
    """Start ``vllm-dpp serve``, wait until it answers, and stop it however the block ends.

    Raises:
        RuntimeError: It did not start; the message ends with its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm_dpp", "serve", str(model), *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", str(model), log)
    try:
        _wait(server, process)
        yield server
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while not server.is_healthy():
        if process.poll() is not None or time.monotonic() > end:
            tail = "\n".join(server.log.read_text().splitlines()[-40:])
            raise RuntimeError(f"the server did not start (exit {process.poll()}):\n{tail}")
        time.sleep(1)
