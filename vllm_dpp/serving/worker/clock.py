"""Times work on a device without waiting for it."""

import time

import torch

Mark = float | torch.cuda.Event
"""A moment on the host's clock, or in the device's stream."""


def mark(*, on_gpu: bool) -> Mark:
    """Now, or when the device gets here."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def is_past(moment: Mark) -> bool:
    return isinstance(moment, float) or moment.query()


def seconds(start: Mark, end: Mark) -> float:
    """Between two moments that are past."""
    if isinstance(start, float) or isinstance(end, float):
        return float(end) - float(start)  # type: ignore[arg-type]
    return start.elapsed_time(end) / 1000
