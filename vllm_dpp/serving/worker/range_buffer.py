"""Where the rows of a range wait that is read over several steps, until it is decided."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from vllm.utils.torch_utils import async_tensor_h2d

RangeKey = tuple[str, int]
"""Request id and first position of a range."""


class RangeBuffer(nn.Module):
    """Storage on the device, a row for each token, and which request has which rows.

    It is built with the model, so that vLLM's memory profile counts it. The scheduler sees to it
    that no more rows are asked for than there are (``engine.deferred_rows``).

    Attributes:
        hidden: [R, D], the residual stream that enters layer K.
        embeddings: [R, D], what entered the decoder; [R, 0] if tokens are not compared by it.
        keys: [R, Hkv, d], rotated keys of the relevance layer; none where no question is read.
        relevance: [R] float32, the attention that the question has paid so far.
        positions: [..., R] int64, RoPE positions.
        is_own: [R] bool, which rows are a video's own tokens, so far as the device alone knows.
    """

    hidden: torch.Tensor
    embeddings: torch.Tensor
    keys: torch.Tensor
    relevance: torch.Tensor
    positions: torch.Tensor
    is_own: torch.Tensor

    def __init__(
        self,
        num_rows: int,
        like: torch.Tensor,
        *,
        key_shape: Sequence[int],
        position_shape: Sequence[int],
        compares_embeddings: bool,
    ) -> None:
        """Args:
        num_rows: R.
        like: [D] of the dtype and on the device of the residual stream.
        key_shape: (Hkv, d) of this rank, or (0,).
        position_shape: What comes before the rows in RoPE positions: (3,) or ().
        compares_embeddings: Whether tokens are compared by what entered the decoder.
        """
        super().__init__()
        for name, buffer in (
            ("hidden", like.new_empty(num_rows, len(like))),
            ("embeddings", like.new_empty(num_rows, len(like) * compares_embeddings)),
            ("keys", like.new_empty(num_rows, *key_shape)),
            ("relevance", like.new_empty(num_rows, dtype=torch.float32)),
            ("positions", like.new_empty(*position_shape, num_rows, dtype=torch.int64)),
            ("is_own", like.new_zeros(num_rows, dtype=torch.bool)),
        ):
            self.register_buffer(name, buffer, persistent=False)
        self._free = np.arange(num_rows)
        self._taken: dict[RangeKey, tuple[np.ndarray, torch.Tensor]] = {}

    @property
    def num_taken(self) -> int:
        return len(self.relevance) - len(self._free)

    def take(self, key: RangeKey, num_rows: int) -> None:
        """Give a range its rows.

        Raises:
            RuntimeError: There are not so many: the scheduler broke its promise.
        """
        if num_rows > len(self._free):
            raise RuntimeError(
                f"{num_rows} rows of the range buffer are wanted, {len(self._free)} are free"
            )
        rows, self._free = self._free[:num_rows], self._free[num_rows:]
        self._taken[key] = rows, async_tensor_h2d(rows, device=self.hidden.device)

    def rows_of(self, key: RangeKey) -> torch.Tensor:
        """[num_rows] int64 on the device: the rows of a range, in order."""
        return self._taken[key][1]

    def store(
        self, key: RangeKey, first: int, hidden: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Write the rows of a range from offset ``first`` on.

        Args:
            key: Which range.
            first: Offset of the first row.
            hidden: [n, D] residual stream.
            positions: [..., n] RoPE positions.
        """
        rows = self.rows_of(key)[first : first + len(hidden)]
        self.hidden[rows] = hidden
        self.positions[..., rows] = positions

    def store_embeddings(self, key: RangeKey, first: int, embeddings: torch.Tensor) -> None:
        """Write [n, D], what entered the decoder of a range from offset ``first`` on."""
        self.embeddings[self.rows_of(key)[first : first + len(embeddings)]] = embeddings

    def store_own(self, key: RangeKey, first: int, is_own: torch.Tensor) -> None:
        """Write [n] bool, which rows of a range from offset ``first`` on are a video's own."""
        self.is_own[self.rows_of(key)[first : first + len(is_own)]] = is_own

    def release(self, key: RangeKey) -> None:
        """Take the rows of a range back."""
        rows, _ = self._taken.pop(key)
        self._free = np.concatenate([self._free, rows])

    def release_request(self, request_id: str) -> None:
        """Take back all rows of a request, if it has any."""
        for key in [key for key in self._taken if key[0] == request_id]:
            self.release(key)
