"""What this worker tells people about the videos that it decides; see ``records``."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from vllm.distributed import get_tp_group

from vllm_dpp.serving.plan import Grid, PrunedTurn, PrunePlan
from vllm_dpp.serving.records import (
    Record,
    RecordWriter,
    cached_entry,
    entered_entry,
    kept_entry,
    kept_record,
)
from vllm_dpp.serving.settings import ServingSettings

Grids = Mapping[int, Sequence[int]]


@dataclass(frozen=True, slots=True)
class EnteringVideo:
    """A video that enters in part, of a request that wants a record.

    Args:
        start: First prompt position.
        end: Past its last.
        number: How many of its tokens enter; the other positions hold text.
        grid: Of all of its tokens.
    """

    start: int
    end: int
    number: int
    grid: Grid


class KeptRecords:
    """Records of kept tokens; the first tensor-parallel rank writes for all.

    Args:
        settings: The engine's.
    """

    def __init__(self, settings: ServingSettings) -> None:
        self._writer = None
        if settings.record_path is not None and get_tp_group().rank_in_group == 0:
            self._writer = RecordWriter.of(settings, "kept")

    def decided(
        self, request_id: str, grids: Grids, turn: PrunedTurn, kept: Sequence[torch.Tensor]
    ) -> None:
        """A turn has been decided.

        Args:
            request_id: vLLM's internal request id.
            grids: The token grid of each of its media, by first prompt position.
            turn: The turn.
            kept: For each of its videos [num_kept] int64, counted from the first token.
        """
        if self._writer is None:
            return
        read = [_copy_to_host(indices) for indices in kept]

        def record() -> Record:
            return kept_record(request_id, _entries(grids, turn, [one() for one in read]))

        self._writer.write(request_id, record)

    def entered(self, request_id: str, video: EnteringVideo, indices: torch.Tensor) -> None:
        """Tokens of a video enter the decoder.

        Args:
            request_id: vLLM's internal request id.
            video: The video.
            indices: [n] int64 of some or all of its rows: where in its grid, -1 for text.
        """
        if self._writer is None:
            return
        read = _copy_to_host(indices)

        def record() -> Record:
            entered = [index for index in read() if index >= 0]
            entry = entered_entry(video.start, video.grid, video.number, entered)
            return kept_record(request_id, [entry])

        self._writer.write(request_id, record)

    def cached(self, request_id: str, grids: Grids, plan: PrunePlan, num_cached: int) -> None:
        """A request starts with ``num_cached`` tokens from the prefix cache."""
        turns = [turn for turn in plan.turns if turn.decided <= num_cached]
        if self._writer is None or not turns:
            return
        starts = dict.fromkeys(video.media_start for turn in turns for video in turn.videos)
        record = kept_record(request_id, [cached_entry(s, grids[s]) for s in starts])
        self._writer.write(request_id, lambda: record)

    def flush(self) -> None:
        """Wait until all have been written."""
        if self._writer is not None:
            self._writer.flush()


def _entries(grids: Grids, turn: PrunedTurn, kept: Iterable[list[int]]) -> list[Record]:
    """An entry for each video of the turn, counted from the first token of the whole video."""
    entries = []
    for video, indices in zip(turn.videos, kept, strict=True):
        shift = video.start - video.media_start
        keep = [index + shift for index in (*indices, *range(video.length, video.length_with_tail))]
        entries.append(kept_entry(video.media_start, grids[video.media_start], keep))
    return entries


def _copy_to_host(tensor: torch.Tensor) -> Callable[[], list[int]]:
    """Start to copy; the result waits for the copy, and is for another thread to call."""
    if not tensor.is_cuda:
        copy = tensor.clone()
        return copy.tolist
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> list[int]:
        event.synchronize()
        return copy.tolist()

    return read
