"""Batches made ahead of time in another process, in an order that a resumed run repeats."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType
from typing import Self

from vllm_dpp.quality.batches import Batch, BatchSize, Videos, training_batch

AHEAD = 3
"""Batches ordered before they are needed. Their questions follow the accuracies of that time."""

Weights = dict[str, float]


class Feed:
    """Gives the batch of each step in turn.

    Args:
        run_seed: of the run.
        size: of a batch.
        videos: what those of a step are like.
    """

    def __init__(
        self,
        run_seed: int,
        size: BatchSize,
        videos: Callable[[int], Videos],
    ) -> None:
        self.run_seed, self.size, self.videos = run_seed, size, videos
        self.ordered: list[Weights] = []
        self._pending: deque[Future[Batch]] = deque()
        self._to_order: list[Weights] = []
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def reorder(self, ordered: list[Weights]) -> None:
        """Takes over the weights with which an interrupted run had ordered ahead."""
        self._to_order = list(ordered)

    def take(self, step: int, weights: Mapping[str, float]) -> Batch:
        """Returns the batch of `step` and orders further ones.

        Args:
            step: one more than the last time.
            weights: odds of the kinds of questions, for batches ordered from now on.
        """
        while len(self._pending) <= AHEAD:
            chosen = self._to_order.pop(0) if self._to_order else dict(weights)
            self._order(step + len(self._pending), chosen)
        self.ordered.pop(0)
        return self._pending.popleft().result()

    def _order(self, step: int, weights: Weights) -> None:
        if self._pool is None:
            # Not forked: a fork of a process with threads may hang.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=context)
        self.ordered.append(weights)
        videos = self.videos(step)
        batch = self._pool.submit(training_batch, self.run_seed, step, videos, self.size, weights)
        self._pending.append(batch)
