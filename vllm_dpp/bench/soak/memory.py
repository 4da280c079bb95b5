"""Memory of a group of processes over time."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from statistics import median

PERIOD_S = 2.0
MIB = 2**20
GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": str(2**18),
    "MALLOC_TRIM_THRESHOLD_": str(2**18),
    "MALLOC_ARENA_MAX": "2",
}
"""Environment of a process in which glibc gives freed memory back at once: what is resident is then
what is held. By its defaults it keeps ever larger pieces, in which tensors of all sizes leave gaps.
"""
MAX_GROWTH = 0.02
"""Of ``growth``, for memory to count as flat; minutes are needed to see it."""


def resident_by_role(group: int) -> dict[str, float]:
    """Resident memory of each process of a group in MiB, by the name it gives itself."""
    found: dict[str, float] = {}
    page = os.sysconf("SC_PAGE_SIZE")
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            start, _, rest = path.read_text().rpartition(")")
        except OSError:  # it has just ended
            continue
        fields, name = rest.split(), start.partition("(")[2]
        if int(fields[2]) == group:
            found[name] = round(found.get(name, 0.0) + int(fields[21]) * page / MIB, 1)
    return found


def resident(group: int) -> float:
    """Resident memory of all processes of a group in MiB, 0 where there is no /proc."""
    return round(sum(resident_by_role(group).values()), 1)


class Sampler:
    """Notes the resident memory of a process group, in MiB, every ``PERIOD_S`` seconds.

    Args:
        group: Its id.
    """

    def __init__(self, group: int) -> None:
        self.samples: list[float] = []
        self._group, self._over = group, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            self.samples.append(resident(self._group))
            self._over.wait(PERIOD_S)


def growth(samples: Sequence[float]) -> float:
    """Share by which the last quarter lies above the one before; the first half fills caches.

    Args:
        samples: In their order. 0 where they are fewer than eight.
    """
    quarter = len(samples) // 4
    if quarter < 2:
        return 0.0
    before, after = median(samples[-2 * quarter : -quarter]), median(samples[-quarter:])
    return (after - before) / before if before else 0.0
