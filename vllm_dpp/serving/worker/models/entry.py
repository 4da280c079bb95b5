"""Which tokens of a video enter the decoder: a selection without a question, before layer 0.

The vision encoder's output is selected from as soon as it is there, once for all who ask about the
video, and cached by vLLM like any encoder output. Where a token stood travels with it, as further
columns, since the host does not know: positions in a prompt's own list (``prompt_positions``) have
every token of such a video at the video's start, and each step adds where its rows really are. It
does so in memory that never moves, so that a CUDA graph of a whole step, which a chunk of one token
may replay like a decode, adds it as well. Nothing is written back, so a prompt whose beginning is
cached has the positions of one that is not. Text between slices travels likewise, since the host
does not know where among the tokens it stands.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_dpp.pruning.pruner import keep_indices
from vllm_dpp.pruning.video import VideoTokens
from vllm_dpp.serving.plan import Grid
from vllm_dpp.serving.settings import ServingSettings
from vllm_dpp.serving.worker.models.agreement import agree

_AXES = 3
_COORDINATES = _AXES + 1
"""Positions on M-RoPE's axes, counted from the video's start, and 1 + the token's index in the
video, 0 for text between its slices."""
_BASE, _DIGITS = 256, 3
"""A coordinate travels as three digits, which any 16-bit float holds exactly."""
_COLUMNS = _COORDINATES * _DIGITS


@dataclass(frozen=True, slots=True)
class TextBetween:
    """Text between the slices of a video.

    Args:
        embeddings: [x, W].
        positions: [x] int64, counted from the video's start, alike on all axes.
        tokens_before: [x] int64, how many of the whole video's tokens stand before each, ascending.
    """

    embeddings: torch.Tensor
    positions: np.ndarray
    tokens_before: np.ndarray


@dataclass(frozen=True, slots=True)
class EncodedVideo:
    """What the vision encoder made of one video.

    Args:
        tokens: [N, W], slice by slice, row by row; the first D columns are what layer 0 gets.
        grid: Slices, rows and columns of the tokens.
        num_entering: How many of them enter the decoder.
        origins: [slices, 3] int64, the position of each slice's first token, counted from the
            video's start: rows and columns go on from there.
        text: What stands between the slices, if anything.
    """

    tokens: torch.Tensor
    grid: Grid
    num_entering: int
    origins: np.ndarray
    text: TextBetween | None = None


class EntryStage(torch.nn.Module):
    """Selects what enters, and puts it at its place.

    Args:
        settings: The server's.
        width: D of the decoder.
        encoder_width: W of what the encoder returns; more than D with DeepStack.
        max_rows: Most rows of a step of a model whose positions have axes; 0 where they count
            tokens, and stay as of a shorter video.
    """

    offsets: torch.Tensor
    positions: torch.Tensor

    def __init__(
        self, settings: ServingSettings, width: int, encoder_width: int, max_rows: int
    ) -> None:
        super().__init__()
        self._config = settings.entry_config
        self.width, self._encoder_width = width, encoder_width
        self._places: torch.Tensor | None = None
        self._has_offsets = False
        for name in ("offsets", "positions"):
            # One more than any step takes, as vLLM has it: torch.compile would take the whole of a
            # tensor for something else than a part of it.
            values = torch.zeros(_AXES, max_rows and max_rows + 1, dtype=torch.int64)
            self.register_buffer(name, values, persistent=False)

    def select(self, videos: Sequence[EncodedVideo]) -> tuple[torch.Tensor, ...]:
        """For each video its tokens where all enter, else [num_entering + x, W + `_COLUMNS`].

        One selection for all videos that are encoded together, without a host synchronisation.
        """
        chosen = iter(
            keep_indices(
                [
                    VideoTokens(
                        video.tokens[:, : self.width], None, video.num_entering, video.grid[0]
                    )
                    for video in videos
                    if video.num_entering < len(video.tokens)
                ],
                self._config,
            )
        )
        return tuple(
            _with_places(video, agree(next(chosen)))
            if video.num_entering < len(video.tokens)
            else video.tokens
            for video in videos
        )

    def unpack(
        self, embeddings: Iterable[torch.Tensor], is_multimodal: torch.Tensor
    ) -> list[torch.Tensor]:
        """Take the places off the embeddings of a step, and remember them for its forward pass.

        Args:
            embeddings: Of each item of the step [n, W], or less, with or without places.
            is_multimodal: [num_rows] bool, which rows of the step they are.

        Returns:
            [n, W] each.
        """
        embeddings = list(embeddings)
        if any(item.shape[1] > self._encoder_width for item in embeddings):
            places = torch.cat([self._places_of(item) for item in embeddings])
            mask = is_multimodal.to(places.device, non_blocking=True)
            by_row = places.new_zeros(len(mask), _COORDINATES)
            self._places = by_row.masked_scatter_(mask[:, None], places)
            if self.offsets.shape[1]:
                self.offsets[:, : len(mask)] = self._places[:, :_AXES].T
                self._has_offsets = True
        return self.without_places(embeddings)

    def without_places(self, embeddings: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """[n, W] each, of embeddings with or without places."""
        return [item[:, : self._encoder_width] for item in embeddings]

    def forget(self) -> None:
        """A step begins: where the rows of another one stood is of no use."""
        self._places = None
        if self._has_offsets:
            self.offsets.zero_()
            self._has_offsets = False

    def place(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions of the rows of a step, or of its padding, where they really stand.

        Args:
            positions: [3, num_rows] int64, of the prompts' lists, or [num_rows] in a model that
                counts tokens, where they stay.

        Returns:
            Those of the step, at an address that never changes.
        """
        if not self.offsets.shape[1]:
            return positions
        num_rows = positions.shape[1]
        placed = self.positions[:, :num_rows]
        return torch.add(positions, self.offsets[:, :num_rows], out=placed)

    def take_places(self) -> torch.Tensor | None:
        """[num_rows, 4] int64, the `_COORDINATES` of each row of a video that enters in part, 0 for
        others; ``None`` where no video of the step does, or they have been taken.
        """
        places, self._places = self._places, None
        return places

    def _places_of(self, item: torch.Tensor) -> torch.Tensor:
        """[n, 4] int64; zero where positions are in the prompt's list."""
        if item.shape[1] <= self._encoder_width:  # sound has no levels of DeepStack
            return item.new_zeros(len(item), _COORDINATES, dtype=torch.int64)
        digits = item[:, self._encoder_width :].long().unflatten(1, (_COORDINATES, _DIGITS))
        high, middle, low = digits.unbind(dim=2)
        return (high * _BASE + middle) * _BASE + low


@dataclass(frozen=True, slots=True)
class PlacedItem:
    """An image, a video or a slice of one, in a prompt's list of positions.

    Args:
        start: Its first token.
        length: Number of its tokens.
        positions: [3, length] int64, counted from its start; ``None`` where the device knows.
        span: Positions from its start to what follows it.
    """

    start: int
    length: int
    positions: np.ndarray | None
    span: int


def prompt_positions(num_tokens: int, media: Iterable[PlacedItem]) -> tuple[torch.Tensor, int]:
    """M-RoPE positions of a prompt, some of whose videos enter in part.

    As vLLM's own for the whole video, so that text stands where it would stand; what is there of a
    video that enters in part is all at its start.

    Args:
        num_tokens: Of the prompt.
        media: In order.

    Returns:
        [3, num_tokens] int64, and what a generated token's position is more than its index.
    """
    positions = np.empty((3, num_tokens), np.int64)
    token = at = 0
    for item in media:
        positions[:, token : item.start] = np.arange(item.start - token) + at
        at += item.start - token
        token = item.start + item.length
        positions[:, item.start : token] = at if item.positions is None else at + item.positions
        at += item.span
    positions[:, token:] = np.arange(num_tokens - token) + at
    return torch.from_numpy(positions), at - token


def _with_places(video: EncodedVideo, chosen: torch.Tensor) -> torch.Tensor:
    """[k + x, W + `_COLUMNS`]: chosen tokens and text, in their true order, and their places."""
    _, rows, columns = video.grid
    which, cell = chosen // (rows * columns), chosen % (rows * columns)
    time, row, column = async_tensor_h2d(video.origins, device=chosen.device)[which].unbind(dim=1)
    places = torch.stack([time, row + cell // columns, column + cell % columns, chosen + 1], dim=1)
    tokens = video.tokens[chosen]
    if video.text is not None:
        tokens, places = _among_text(tokens, places, chosen, video.text)
    digits = torch.stack(
        [places // _BASE**2, places // _BASE % _BASE, places % _BASE], dim=2
    ).flatten(1)
    return torch.cat([tokens, digits.to(tokens.dtype)], dim=1)


def _among_text(
    tokens: torch.Tensor, places: torch.Tensor, chosen: torch.Tensor, text: TextBetween
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen tokens [k, W] and places [k, 4], merged with the text between the slices."""
    positions, before = (
        async_tensor_h2d(values, device=chosen.device)
        for values in (text.positions, text.tokens_before)
    )
    of_text = torch.stack([positions, positions, positions, torch.zeros_like(positions)], dim=1)
    order = torch.cat([2 * chosen + 1, 2 * before]).argsort(stable=True)
    return torch.cat([tokens, text.embeddings])[order], torch.cat([places, of_text])[order]
