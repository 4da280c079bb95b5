"""The front end's part of the metrics: its own, and those of schedulers and workers."""

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from prometheus_client import REGISTRY, Counter, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from vllm_dpp.serving.metrics import FOLDER, PREFIX, values_are_shared

Reason = Literal[
    "argument",
    "beam_search",
    "entry_only",
    "max_deferred_tokens",
    "min_retention_ratio",
    "prompt_logprobs",
    "record_dir",
    "streaming_input",
]
"""What a refusal is about: a setting, a feature, or an argument that is unknown or bad."""

_REFUSED = Counter(
    PREFIX + "refused_requests",
    "Requests that got HTTP 400 for what they asked of video pruning",
    ["reason"],
)
for _reason in get_args(Reason):
    _REFUSED.labels(reason=_reason)


def refused(reason: Reason) -> None:
    """A request has been refused."""
    _REFUSED.labels(reason=reason).inc()


@functools.cache
def show() -> None:
    """Show the metrics of the processes that this one will start, from now on; once is enough."""
    if values_are_shared():
        return
    folder = tempfile.mkdtemp(prefix="vllm-dpp-metrics-")
    atexit.register(_remove, folder, os.getpid())
    os.environ[FOLDER] = folder
    REGISTRY.register(OfProcesses(Path(folder)))


class OfProcesses(Collector):
    """What other processes have written last.

    Args:
        folder: Where; a file each.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def describe(self) -> Iterable[Metric]:
        """Nothing: there is none yet."""
        return ()

    def collect(self) -> Iterable[Metric]:
        found: dict[str, Metric] = {}
        for path in sorted(self._folder.glob("*.prom")):
            for family in text_string_to_metric_families(path.read_text()):
                if family.name.endswith("_created"):
                    continue
                if (known := found.setdefault(family.name, family)) is not family:
                    known.samples += family.samples
        return found.values()


def _remove(folder: str, creator: int) -> None:
    if os.getpid() == creator:
        shutil.rmtree(folder, ignore_errors=True)
