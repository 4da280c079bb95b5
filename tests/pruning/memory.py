"""What a call holds on the CPU, as PyTorch's own allocator sees it."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes that `run` holds at once beyond what was there before.

    The profiler hears of every allocation, those that operators make for themselves included, but
    not of what other libraries (BLAS, numba) allocate.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    held = peak = 0
    events = recorded.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
