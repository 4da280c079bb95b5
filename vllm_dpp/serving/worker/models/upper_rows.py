"""The rows that enter layer K: gathered from the batch and the range buffer, and put back after."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_dpp.pruning.rows import joined_rows
from vllm_dpp.serving.plan import PrunedVideo
from vllm_dpp.serving.step import RangeRows, StepLayout
from vllm_dpp.serving.worker.models.selection import States, merged
from vllm_dpp.serving.worker.own_tokens import OwnTokens, going_up
from vllm_dpp.serving.worker.range_buffer import RangeBuffer

OF_HIDDEN_STATES = 0.1
"""How much of the similarity is that of hidden states, where tokens are compared by both kinds.

Embeddings tell things apart, which counting them needs; hidden states hold what the layers below K
have found out about each, as for how long it is seen. Chosen on other videos than are reported
(``vllm-dpp bench quality``): more of it answers better what appeared briefly, and counts worse.
"""


class RangeReader:
    """Where the rows of a decided range are: in the batch, or all of them in the buffer.

    Args:
        part: The last of the range, or all of it.
        positions: [..., num_rows] RoPE positions of the batch.
        states: [num_rows, D] of the batch, the input of layer K.
        buffer: This worker's.
        embeddings: [length, D], what entered the decoder of a range that is all in the batch, if
            tokens are compared by that.
        compares_both: Whether they are compared by the input of layer K as well.
    """

    def __init__(
        self,
        part: RangeRows,
        positions: torch.Tensor,
        states: States,
        buffer: RangeBuffer,
        embeddings: torch.Tensor | None,
        *,
        compares_both: bool,
    ) -> None:
        self._stored = None if part.is_whole else buffer.rows_of(part.key)
        if self._stored is None:
            rows = slice(part.row, part.row + part.num_rows)
            self._hidden, self._positions = merged(states, rows), positions[..., rows]
        else:
            self._hidden, self._positions = buffer.hidden, buffer.positions
            embeddings = buffer.embeddings if buffer.embeddings.shape[1] else None
        self._compared = self._hidden if embeddings is None else embeddings
        self._compares_both = compares_both

    def compared(self, offsets: OwnTokens) -> torch.Tensor:
        """[n, D] or, of both kinds, [n, 2 D]: by what the tokens at these offsets are compared."""
        rows = offsets if self._stored is None else self._stored[offsets]
        if self._compares_both:
            return joined_rows(self._compared, self._hidden, OF_HIDDEN_STATES, rows)
        return self._compared[rows]

    def gather(self, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, D] residual stream and [..., n] positions at [n] int64 offsets."""
        rows = offsets if self._stored is None else self._stored[offsets]
        return self._hidden[rows], self._positions[..., rows]


@dataclass(frozen=True, slots=True)
class UpperRows:
    """The input of layer K.

    Args:
        positions: [..., num_compact_rows] RoPE positions, the original ones.
        states: [num_compact_rows, D].
    """

    positions: torch.Tensor
    states: States

    def take(self, rows: torch.Tensor | slice) -> tuple[torch.Tensor, States]:
        """Positions and states of some of the rows."""
        hidden, residual = self.states
        states = hidden[rows], None if residual is None else residual[rows]
        return self.positions[..., rows], states


def gather(
    layout: StepLayout,
    positions: torch.Tensor,
    states: States,
    readers: Sequence[RangeReader],
    own: Sequence[Mapping[PrunedVideo, OwnTokens]],
    kept: Sequence[Sequence[torch.Tensor]],
) -> UpperRows:
    """Everything that goes up in this step.

    Rows of a range enter layer K as one sum, with nothing in the residual, whether they were
    stored or not: a video that is read in one step and one that is read in many then agree.

    Args:
        layout: The step's.
        positions: [..., num_rows] RoPE positions of the batch.
        states: [num_rows, D] of the batch, the input of layer K.
        readers: One for each decided range.
        own: For each of them the tokens of each video that were up for selection.
        kept: For each of them and each of its videos [num_kept] int64.
    """
    hidden, residual = states
    upper = hidden.new_empty(layout.num_compact_rows, hidden.shape[1])
    upper_residual = None if residual is None else torch.zeros_like(upper)
    upper_positions = positions.new_empty(*positions.shape[:-1], layout.num_compact_rows)

    from_rows, to_rows = (async_tensor_h2d(rows, device=hidden.device) for rows in layout.plain)
    upper[to_rows] = hidden[from_rows]
    upper_positions[..., to_rows] = positions[..., from_rows]
    if upper_residual is not None and residual is not None:
        upper_residual[to_rows] = residual[from_rows]

    for part, reader, mine, indices in zip(layout.decided, readers, own, kept, strict=True):
        offsets = _offsets(part, mine, indices)
        rows = slice(part.compact_row, part.compact_row + len(offsets))
        upper[rows], upper_positions[..., rows] = reader.gather(offsets)
    return UpperRows(upper_positions, (upper, upper_residual))


def _offsets(
    part: RangeRows, own: Mapping[PrunedVideo, OwnTokens], kept: Sequence[torch.Tensor]
) -> torch.Tensor:
    """[n] int64 offsets of what goes up of a range, in order."""
    device, chosen = kept[0].device, iter(kept)
    offsets = []
    for _, piece in part.pieces():
        if isinstance(piece, PrunedVideo):
            offsets.append(going_up(part, piece, own[piece], next(chosen)))
        else:
            offsets.append(torch.arange(*piece, device=device))
    return torch.cat(offsets)


def scatter(layout: StepLayout, upper: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Put the last layer's rows where the batch has them; the other rows of ``out`` stay.

    Rows of pruned videos stay, too, whether kept or not: nobody reads them.
    """
    rows, compact_rows = (np.concatenate(p) for p in zip(*_readable(layout), strict=True))
    to_rows, from_rows = (async_tensor_h2d(r, device=out.device) for r in (rows, compact_rows))
    return out.index_copy_(0, to_rows, upper[from_rows])


def _readable(layout: StepLayout) -> list[tuple[np.ndarray, np.ndarray]]:
    """Batch rows and compact rows of every token that may be sampled from."""
    found = [(layout.plain[0], layout.plain[1])]
    for part in layout.decided:
        for compact_row, piece in part.pieces():
            if not isinstance(piece, PrunedVideo):
                offsets = np.arange(max(piece[0], part.first), piece[1])
                found.append((offsets - part.first + part.row, offsets - piece[0] + compact_row))
    return found
