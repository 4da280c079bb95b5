"""How much of a decoder's forward pass the selection takes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vllm_dpp.serving.worker.clock import Mark, mark, seconds


class SelectionTimer:
    """Times the selection of one model and the decoder passes that contain one.

    Selection is the question's attention, greedy MAP and the gathering of kept rows. A CPU is timed
    by the wall clock; a GPU by events, which are read after the round, so that nothing waits.

    Args:
        model: A model with a split decoder.
    """

    def __init__(self, model: Any) -> None:
        decoder = model.language_model.model
        self._mark = partial(mark, on_gpu=next(model.parameters()).is_cuda)
        self._selections: list[tuple[Mark, Mark]] = []
        self._decoders: list[tuple[Mark, Mark]] = []
        self._selected = 0
        selector = decoder.selector
        selector.read = self._timed(selector.read)
        decoder._select = self._timed(decoder._select)
        decoder.register_forward_pre_hook(self._enter)
        decoder.register_forward_hook(self._leave)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = self._mark()
            result = function(*args, **kwargs)
            self._selections.append((start, self._mark()))
            return result

        return timed

    def _enter(self, *_: Any) -> None:
        self._selected = len(self._selections)
        self._start = self._mark()

    def _leave(self, *_: Any) -> None:
        if len(self._selections) > self._selected:
            self._decoders.append((self._start, self._mark()))

    @property
    def num_passes(self) -> int:
        """Decoder passes with a selection since the last ``take``."""
        return len(self._decoders)

    def take(self) -> dict[str, float]:
        """Seconds since the last call: of selection, and of the decoder passes around it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken = {
            "passes": self.num_passes,
            "selection_seconds": sum(seconds(*span) for span in self._selections),
            "decoder_seconds": sum(seconds(*span) for span in self._decoders),
        }
        self._selections.clear()
        self._decoders.clear()
        return taken
