"""The test's side: start an engine process, call it, stop it."""

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.engines.traffic import Arrival, Traffic

START_METHOD = "spawn"  # a forked child would inherit an imported vLLM, with its runner chosen


class EngineError(Exception):
    """What the engine process raised, as text."""


class EngineHost:
    """One engine process on one model runner, reused for several engines."""

    def __init__(self, runner: str) -> None:
        from tests.engines.worker import serve

        self.runner = runner
        context = multiprocessing.get_context(START_METHOD)
        self._pipe, theirs = context.Pipe()
        # Not a daemon, which could not start workers; it ends when this side of the pipe closes.
        self._process = context.Process(target=serve, args=(theirs, runner))
        self._process.start()
        theirs.close()

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of ``EngineWorker``.

        Raises:
            EngineError: The method raised, or the process died.
        """
        self._pipe.send((name, args, kwargs))
        try:
            status, value = self._pipe.recv()
        except EOFError:
            raise EngineError("the engine process died") from None
        if status == "error":
            raise EngineError(value)
        return value

    def load(self, checkpoint: Path, dpp: dict[str, Any] | None, **engine_args: Any) -> None:
        self.call("load", str(checkpoint), dpp, **engine_args)

    def run(self, arrivals: Sequence[Arrival]) -> Traffic:
        return self.call("run", arrivals)

    def stop(self) -> None:
        if self._process.is_alive():
            self._pipe.send(("stop", (), {}))
            self._process.join(30)
        if self._process.is_alive():
            self._process.kill()


@contextmanager
def engine_host(runner: str) -> Iterator[EngineHost]:
    host = EngineHost(runner)
    try:
        yield host
    finally:
        host.stop()
