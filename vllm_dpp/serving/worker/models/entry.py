"""Which tokens of a video enter the decoder: a selection without a question, before layer 0.

The vision encoder's output is selected from as soon as it is there, once for all who ask about the
video, and cached by vLLM like any encoder output. Where a token stood travels with it, as further
columns, since the host does not know: positions in a prompt's own list (``prompt_positions``) have
every token of such a video at the video's start, and each step adds where its rows really are.
Nothing is written back, so a prompt whose beginning is cached has the positions of one that is not.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_dpp.pruning.pruner import keep_indices
from vllm_dpp.pruning.video import VideoTokens
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.serving.worker.context import Grid
from vllm_dpp.serving.worker.models.agreement import agree

_AXES = 3
_COORDINATES = _AXES + 1
"""Time, row and column, as M-RoPE counts them, and the slice, which records want."""
_BASE = 256
"""A coordinate travels as two digits, which any 16-bit float holds exactly."""
_COLUMNS = 2 * _COORDINATES


@dataclass(frozen=True, slots=True)
class EncodedVideo:
    """What the vision encoder made of one video.

    Args:
        tokens: [N, D], slice by slice, row by row.
        grid: Slices, rows and columns of the tokens.
        num_entering: How many of them enter the decoder.
        step: Positions from a slice to the next.
    """

    tokens: torch.Tensor
    grid: Grid
    num_entering: int
    step: float


class EntryStage:
    """Selects what enters, and puts it at its place.

    Args:
        settings: The server's.
        width: D of the decoder.
    """

    def __init__(self, settings: ServingSettings, width: int) -> None:
        self._config = settings.entry_config
        self._width = width
        self._places: torch.Tensor | None = None

    def select(self, videos: Sequence[EncodedVideo]) -> tuple[torch.Tensor, ...]:
        """For each video [num_entering, D + `_COLUMNS`], or its tokens where all enter.

        One selection for all videos that are encoded together, without a host synchronisation.
        """
        chosen = iter(
            keep_indices(
                [
                    VideoTokens(video.tokens, None, video.num_entering, video.grid[0])
                    for video in videos
                    if video.num_entering < len(video.tokens)
                ],
                self._config,
            )
        )
        return tuple(
            _with_place(video, agree(next(chosen)))
            if video.num_entering < len(video.tokens)
            else video.tokens
            for video in videos
        )

    def unpack(
        self, embeddings: Iterable[torch.Tensor], is_multimodal: torch.Tensor
    ) -> list[torch.Tensor]:
        """Take the places off the embeddings of a step, and remember them for its forward pass.

        Args:
            embeddings: Of each image and video of the step [n, D], with or without places.
            is_multimodal: [num_rows] bool, which rows of the step they are.

        Returns:
            [n, D] each.
        """
        embeddings = list(embeddings)
        self._places = None
        if any(item.shape[1] > self._width for item in embeddings):
            places = torch.cat([self._places_of(item) for item in embeddings])
            mask = is_multimodal.to(places.device, non_blocking=True)
            by_row = places.new_zeros(len(mask), _COORDINATES)
            self._places = by_row.masked_scatter_(mask[:, None], places)
        return [item[:, : self._width] for item in embeddings]

    def place(self, positions: torch.Tensor) -> torch.Tensor | None:
        """Put the rows of the step at their places, once.

        Args:
            positions: [3, num_rows] int64 or more rows, of the prompts' lists; they are changed.

        Returns:
            [num_rows, 4] int64, time, row, column and slice of each row in its video, where that
            enters in part; ``None`` where no video of the step does.
        """
        places, self._places = self._places, None
        if places is not None:
            positions[:, : len(places)] += places[:, :_AXES].T
        return places

    def _places_of(self, item: torch.Tensor) -> torch.Tensor:
        """[n, 4] int64; zero where positions are in the prompt's list."""
        if item.shape[1] == self._width:
            return item.new_zeros(len(item), _COORDINATES, dtype=torch.int64)
        digits = item[:, self._width :].long().unflatten(1, (_COORDINATES, 2))
        return digits[:, :, 0] * _BASE + digits[:, :, 1]


def prompt_positions(
    num_tokens: int, media: Iterable[tuple[int, int, Grid, float]]
) -> tuple[torch.Tensor, int]:
    """M-RoPE positions of a prompt, some of whose videos enter in part.

    As vLLM's own for the whole video, so that text stands where it would stand; the tokens of a
    video that enters in part are all at its start.

    Args:
        num_tokens: Of the prompt.
        media: First token, number of tokens, grid and positions between slices of each item, in
            order.

    Returns:
        [3, num_tokens] int64, and what a generated token's position is more than its index.
    """
    positions = np.empty((3, num_tokens), np.int64)
    token = at = 0
    for start, length, grid, step in media:
        positions[:, token:start] = np.arange(start - token) + at
        at += start - token
        indices = np.indices(grid).reshape(3, -1)
        indices[0] = (indices[0] * step).astype(np.int64)
        whole = indices.shape[1] == length
        positions[:, start : start + length] = at + (indices if whole else 0)
        at += int(indices.max()) + 1
        token = start + length
    positions[:, token:] = np.arange(num_tokens - token) + at
    return torch.from_numpy(positions), at - token


def _with_place(video: EncodedVideo, chosen: torch.Tensor) -> torch.Tensor:
    """[k, D + `_COLUMNS`]: the chosen tokens and where they stand."""
    slices, rows, columns = video.grid
    times = (np.arange(slices) * video.step).astype(np.int64)
    on_device = async_tensor_h2d(times, device=chosen.device)
    which, cell = chosen // (rows * columns), chosen % (rows * columns)
    place = torch.stack([on_device[which], cell // columns, cell % columns, which], dim=1)
    digits = torch.stack([place // _BASE, place % _BASE], dim=2).flatten(1)
    return torch.cat([video.tokens[chosen], digits.to(video.tokens.dtype)], dim=1)
