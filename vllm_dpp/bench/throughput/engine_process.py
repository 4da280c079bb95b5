"""One arm in a process of its own: an in-process engine behind a pipe.

The engine lives in the same process as the loop that drives it, so the scheduler can be read; each
arm has its own process, so plugins, caches and patches of one cannot reach another.
"""

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vllm_dpp.bench.evs_on_cpu import mend_evs_on_cpu
from vllm_dpp.bench.throughput.arms import Arm
from vllm_dpp.bench.throughput.capacity import EngineFacts
from vllm_dpp.bench.throughput.drive import Round
from vllm_dpp.bench.throughput.workload import Workload

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}
LOG_LINES = 30
STOP, TURN = "stop", b"turn"


class EngineError(RuntimeError):
    """An arm's process failed; the message says how."""


class EngineProcess:
    """The parent's handle of one arm.

    Args:
        arm: What to start.
        engine_args: vLLM's engine arguments that all arms share.
    """

    def __init__(self, arm: Arm, engine_args: dict[str, Any]) -> None:
        self.arm, self._engine_args = arm, engine_args
        self._process: multiprocessing.process.BaseProcess | None = None

    def start(self) -> EngineFacts:
        """Start the engine and wait until it is ready."""
        context = multiprocessing.get_context("spawn")
        self._log = Path(tempfile.mkstemp(prefix="vllm-dpp-bench-", suffix=".log")[1])
        self._pipe, remote = context.Pipe()
        arguments = {**self._engine_args, **self.arm.engine_args}
        self._process = context.Process(
            target=_serve, args=(remote, arguments, self.arm, str(self._log))
        )
        self._process.start()
        remote.close()
        return self._receive()

    def run(self, workload: Workload) -> Round:
        """Do one workload; returns when it is done."""
        self._pipe.send(workload)
        return self._receive()

    def begin(self, workload: Workload) -> None:
        """Submit one workload; each of its steps then waits for a ``turn``."""
        self.submit(workload)
        self.submitted()

    def submit(self, workload: Workload) -> None:
        """``begin``, without waiting: its videos are processed meanwhile."""
        self._pipe.send((workload,))

    def submitted(self) -> None:
        """Wait until what ``submit`` began is done."""
        self._receive()

    def turn(self) -> Round | None:
        """Do one step; returns the round after the last."""
        self._pipe.send(TURN)
        answer = self._receive()
        return None if answer == TURN else answer

    def stop(self) -> None:
        """End the process. Idempotent."""
        if self._process is None:
            return
        try:
            self._pipe.send(STOP)
        except OSError:
            pass  # it is gone already
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()
        self._log.unlink(missing_ok=True)
        self._process = None

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            tail = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            answer = "\n".join(["the process ended", *tail])
        if isinstance(answer, str):
            raise EngineError(f"arm {self.arm.name!r}: {answer}")
        return answer


def _serve(pipe: Connection, engine_args: dict[str, Any], arm: Arm, log: str) -> None:
    """The child: build the engine, then run what comes until told to stop."""
    _redirect(log)
    os.environ.update(ENVIRONMENT)
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_memory_bytes
    try:
        start = time.perf_counter()
        driver = _build(engine_args, arm)
        pipe.send(_facts(driver.engine, time.perf_counter() - start))
        while (order := pipe.recv()) != STOP:
            if isinstance(order, tuple):
                pipe.send(driver.run(*order, wait=partial(_wait_for_turn, pipe)))
            else:
                pipe.send(driver.run(order))
    except EOFError:
        return  # the parent is gone
    except Exception:
        pipe.send(traceback.format_exc())


def _wait_for_turn(pipe: Connection) -> None:
    pipe.send(TURN)
    pipe.recv()


def _redirect(log: str) -> None:
    """Send this process's output, and its children's, to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)


def _build(engine_args: dict[str, Any], arm: Arm) -> Any:
    """The engine and its driver."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    from vllm_dpp.bench.throughput.drive import Driver

    engine = LLMEngine.from_engine_args(EngineArgs(**engine_args))
    worker = engine.model_executor.driver_worker.worker
    mend_evs_on_cpu(worker)
    timer = None
    if arm.prune_layer is not None:
        from vllm_dpp.bench.throughput.selection_timer import SelectionTimer

        timer = SelectionTimer(worker.get_model())
    return Driver(engine, arm.extra_args, timer)


def _facts(engine: Any, seconds: float) -> EngineFacts:
    config = engine.vllm_config
    cache = engine.engine_core.engine_core.scheduler.kv_cache_config
    spec = cache.kv_cache_groups[0].kv_cache_spec
    return EngineFacts(
        num_blocks=cache.num_blocks,
        block_size=spec.block_size,
        group_layers=tuple(len(group.layer_names) for group in cache.kv_cache_groups),
        page_bytes=spec.page_size_bytes,
        prefix_caching=config.cache_config.enable_prefix_caching,
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        device=config.device_config.device_type,
        enforce_eager=config.model_config.enforce_eager,
        load_seconds=seconds,
    )
