"""A real server in a process of its own, on the loopback interface."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0
IDLE_TIMEOUT_S = 60.0
LOG_LINES = 30
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}


KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"
"""GiB of KV memory; only a CPU reads it."""


class ServerError(RuntimeError):
    """A server did not start, or never came to rest."""


@dataclass(frozen=True, slots=True)
class Server:
    """A running server.

    Args:
        name: For people.
        port: On ``HOST``.
        model: The model name to ask for.
        pid: Of its front end, which leads the process group.
        log: Everything it prints.
    """

    name: str
    port: int
    model: str
    pid: int
    log: Path

    def get(self, path: str, timeout: float = 10.0) -> str:
        """The body of one GET request."""
        with urllib.request.urlopen(f"http://{HOST}:{self.port}{path}", timeout=timeout) as reply:
            return reply.read().decode()

    def is_healthy(self) -> bool:
        try:
            self.get("/health", timeout=5)
        except OSError:
            return False
        return True

    def metrics(self) -> dict[str, float]:
        """Every Prometheus metric, summed over its labels."""
        return summed(self.get("/metrics"))

    def is_idle(self) -> bool:
        """Whether no request runs or waits and no KV block is held."""
        found = self.metrics()
        return not any(found[f"vllm:{name}"] for name in IDLE_METRICS)

    def wait_until_idle(self, timeout: float = IDLE_TIMEOUT_S) -> float:
        """Seconds that it took.

        Raises:
            ServerError: Something is still held after ``timeout`` seconds.
        """
        start = time.monotonic()
        while not self.is_idle():
            if time.monotonic() - start > timeout:
                held = {name: self.metrics()[f"vllm:{name}"] for name in IDLE_METRICS}
                raise ServerError(f"{self.name}: not idle after {timeout:.0f} s: {held}")
            time.sleep(0.05)
        return time.monotonic() - start


IDLE_METRICS = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


def summed(exposition: str) -> dict[str, float]:
    """Metrics in Prometheus' text format, each the sum over its labels."""
    found: dict[str, float] = {}
    for line in exposition.splitlines():
        if line and not line.startswith("#"):
            labelled, _, value = line.rpartition(" ")
            name = labelled.partition("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
    return found


def info_label(exposition: str, metric: str, label: str) -> str:
    """A label of an information metric.

    Raises:
        KeyError: There is none.
    """
    for line in exposition.splitlines():
        if line.startswith(metric + "{"):
            for pair in line.partition("{")[2].rpartition("}")[0].split(","):
                key, _, value = pair.partition("=")
                if key == label:
                    return json.loads(value)
    raise KeyError(f"{metric}{{{label}}}")


@contextmanager
def serve(
    name: str, command: Sequence[str], model: str, log: Path, environment: dict[str, str]
) -> Iterator[Server]:
    """Start ``command`` on a free port, and stop it however the block ends.

    It may still be loading: ``wait_until_ready`` waits, so that several load at a time.

    Args:
        name: For people.
        command: Without ``--host`` and ``--port``.
        model: The model name to ask for.
        log: Takes its output.
        environment: What it finds beside this process's own, of which ``KV_SPACE`` is left out:
            it would go before what a command says of KV memory.
    """
    own = {name: value for name, value in os.environ.items() if name != KV_SPACE}
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", HOST, "--port", str(port)],
            stdout=output,
            stderr=output,
            env=own | ENVIRONMENT | environment,
            start_new_session=True,
        )
    try:
        yield Server(name, port, model, process.pid, log)
    finally:
        _stop(process)


def wait_until_ready(server: Server, timeout: float = START_TIMEOUT_S) -> None:
    """Raises ``ServerError``, with the end of its log, where it ends or takes too long."""
    end = time.monotonic() + timeout
    while not server.is_healthy():
        if not _runs(server.pid) or time.monotonic() > end:
            tail = "\n".join(server.log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise ServerError(f"{server.name} did not start:\n{tail}")
        time.sleep(0.5)


def _runs(pid: int) -> bool:
    """Whether our child has not ended; its exit status is left to whoever waits for it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the front end and all that it has started."""
    _signal(process, signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        pass
    _signal(process, signal.SIGKILL)
    process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass  # all of it has ended
