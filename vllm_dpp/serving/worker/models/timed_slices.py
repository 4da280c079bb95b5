"""Where slices stand, and the text between them, where each is a picture behind its own time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_dpp.serving.plan import Grid


@dataclass(frozen=True, slots=True)
class TimedSlices:
    """Positions of a video by M-RoPE, counted from its start.

    Text advances by one, a slice by its height or its width, whichever is more.

    Args:
        text: [x] int64, of each token of its text, alike on all axes.
        tokens_before: [x] int64, how many of the video's tokens stand before each.
        origins: [slices, 3] int64, of each slice's first token.
        span: From the video's start to what follows it.
    """

    text: np.ndarray
    tokens_before: np.ndarray
    origins: np.ndarray
    span: int

    @classmethod
    def of(cls, text_token_ids: Sequence[int], grid: Grid, slice_end: int) -> "TimedSlices":
        """Read off the text of a video.

        Args:
            text_token_ids: Of all its slices, in order.
            grid: Slices, rows and columns of its tokens.
            slice_end: The token behind each slice.
        """
        slices, rows, columns = grid
        side = max(rows, columns)
        number = np.arange(len(text_token_ids))
        ends = np.flatnonzero(np.asarray(text_token_ids) == slice_end)
        before = np.searchsorted(ends, number, side="right")
        origins = ends + side * np.arange(slices)
        return cls(
            text=number + side * before,
            tokens_before=before * rows * columns,
            origins=np.repeat(origins[:, None], 3, axis=1),
            span=len(number) + slices * side,
        )

    def whole(self, is_own: np.ndarray, grid: Grid) -> np.ndarray:
        """[3, length] int64: positions of the whole video, [length] bool of it its own tokens."""
        positions = np.empty((3, len(is_own)), np.int64)
        positions[:, ~is_own] = self.text
        cells = np.indices((1, *grid[1:])).reshape(3, 1, -1)
        positions[:, is_own] = (self.origins.T[:, :, None] + cells).reshape(3, -1)
        return positions
