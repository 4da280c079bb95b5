"""LoRA: which adapter belongs to which row, where rows are not those of the step.

vLLM tells its adapted layers once for a step which adapter each of its rows has. The upper layers
and the reading of a question run over other rows, and have to tell them again
(``patches/adapters.md``).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest

from vllm_dpp.serving.step import RangeRows, UpperPass

NO_ADAPTER = 0


def adapter_id_of(request: LoRARequest | None) -> int:
    """vLLM's number of an adapter."""
    return NO_ADAPTER if request is None else request.lora_int_id


class Adapters:
    """The adapters of live requests, and of the step about to run.

    Args:
        manager: Gives vLLM's LoRA manager of the model, which there is once one has been loaded.
    """

    def __init__(self, manager: Callable[[], Any]) -> None:
        self._manager = manager
        self._of_requests: dict[str, int] = {}
        self._of_step: NDArray[np.int64] | None = None

    def add(self, request_id: str, adapter_id: int) -> None:
        if adapter_id != NO_ADAPTER:
            self._of_requests[request_id] = adapter_id

    def remove(self, request_id: str) -> None:
        self._of_requests.pop(request_id, None)

    def begin_step(self, request_ids: Iterable[str]) -> None:
        """Hear which requests are in the step, in order of the batch."""
        self._of_step = None
        if self._of_requests:
            ids = np.array([self._of(request_id) for request_id in request_ids], np.int64)
            self._of_step = ids if ids.any() else None

    def over_range(self, part: RangeRows) -> Any:
        """Have layers run over what the step has of a range; a context manager."""
        return self._over(lambda _: np.full(part.num_rows, self._of(part.request_id)))

    def over_pass(self, one: UpperPass) -> Any:
        """Have layers run over one pass; a context manager."""
        return self._over(lambda of_step: np.repeat(of_step[one.requests], one.num_scheduled))

    @contextmanager
    def _over(self, rows: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> Iterator[None]:
        if self._of_step is None:
            yield
            return
        manager = self._manager()
        of_step = manager._last_mapping
        ids = tuple(rows(self._of_step).tolist())
        manager.set_adapter_mapping(LoRAMapping(ids, of_step.prompt_mapping, is_prefill=True))
        try:
            yield
        finally:
            manager.set_adapter_mapping(of_step)

    def _of(self, request_id: str) -> int:
        return self._of_requests.get(request_id, NO_ADAPTER)
