"""How what schedulers and workers count gets onto the server's ``/metrics``.

There vLLM shows what its front end counts. A scheduler and a worker live in other processes: each
keeps a registry of its own and writes it to a text file, once a second, in a folder that the front
end made before it started them. A scrape reads the files (:mod:`vllm_dpp.serving.front.metrics`).
Where vLLM runs several front ends, ``prometheus_client`` shares all values among processes by
itself, and nothing is written.
"""

import functools
import os
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, write_to_textfile

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PREFIX = "vllm_dpp_"
FOLDER = "DPP_METRICS_DIR"
"""Environment variable: the folder. A process on another machine has none, and is not shown."""
SECONDS = 1.0


def values_are_shared() -> bool:
    """Whether ``prometheus_client`` shares values among processes."""
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ


class ProcessMetrics:
    """The metrics of one scheduler or worker.

    From here on they may be written at any time, so a subclass first makes what ``refresh`` reads.

    Args:
        process: What it is, for the name of its file.
        vllm_config: The engine's configuration.
        is_shown: Whether they go anywhere.
    """

    def __init__(self, process: str, vllm_config: "VllmConfig", *, is_shown: bool = True) -> None:
        engine = vllm_config.parallel_config.data_parallel_index
        self._registry = CollectorRegistry()
        self._labels = {
            "model_name": vllm_config.model_config.served_model_name,
            "engine": str(engine),
        }
        folder = os.environ.get(FOLDER)
        self._path = None
        if folder and not values_are_shared():
            self._path = Path(folder) / f"{process}-{engine}.prom"
        if is_shown:
            with _lock:
                _shown.add(self)
            _start_writing(os.getpid())

    def add(self, kind: Any, name: str, text: str, **options: Any) -> Any:
        """A metric.

        Args:
            kind: Counter, Gauge or Histogram.
            name: Without our prefix.
            text: What it is.
            options: Of ``kind``.
        """
        metric = kind(PREFIX + name, text, list(self._labels), registry=self._registry, **options)
        return metric.labels(**self._labels)

    def add_each(
        self, kind: Any, name: str, text: str, label: str, values: Sequence[str], **options: Any
    ) -> dict[str, Any]:
        """A metric for each value of a further label, all there from the start."""
        names = [*self._labels, label]
        metric = kind(PREFIX + name, text, names, registry=self._registry, **options)
        return {value: metric.labels(**self._labels, **{label: value}) for value in values}

    def refresh(self) -> None:
        """Take in what has become known meanwhile; before each write, on the thread that writes."""

    def write(self) -> None:
        self.refresh()
        if self._path is not None:
            write_to_textfile(str(self._path), self._registry)


_shown: "weakref.WeakSet[ProcessMetrics]" = weakref.WeakSet()
_lock = threading.Lock()


@functools.cache
def _start_writing(process: int) -> None:
    """Once in a process: a fork has the threads of its parent no more."""
    threading.Thread(target=_write_again_and_again, name="dpp-metrics", daemon=True).start()


def _write_again_and_again() -> None:
    while True:
        _write_all()
        time.sleep(SECONDS)


def _write_all() -> None:
    with _lock:
        shown = list(_shown)
    for metrics in shown:
        try:
            metrics.write()
        except OSError:  # the front end has gone, and its folder with it
            with _lock:
                _shown.discard(metrics)
