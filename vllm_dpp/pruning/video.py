"""The tokens of one video, as a rule sees them."""

from dataclasses import dataclass

from torch import Tensor

from vllm_dpp.pruning.checks import require_integer


@dataclass(frozen=True, eq=False)
class VideoTokens:
    """The tokens of one video, slice by slice in order of time.

    Args:
        features: [N, D] float of any dtype, hidden states of the tokens.
        raw_relevance: [N] float on the same device, attention of the question; None selects by
            diversity alone.
        num_kept: tokens to keep of these N, in [0, N].
        num_slices: temporal slices of the whole video, >= 1, a divisor of N + `num_tail`.
        num_tail: tokens at the end of the video that the caller keeps in any case and that are
            not in `features`, >= 0. Segments are those of the whole video as far as N.
        num_last: how many of the N, the last ones, are of the last slice, in [0, N]; None where a
            slice of the video is a slice as above, and they follow.

    Raises:
        ValueError: an argument does not fit. Values are not looked at; see `check_finite`.
    """

    features: Tensor
    raw_relevance: Tensor | None
    num_kept: int
    num_slices: int
    num_tail: int = 0
    num_last: int | None = None

    def __post_init__(self) -> None:
        if self.features.dim() != 2 or not self.features.is_floating_point():
            raise ValueError(f"features must be [N, D] float, got {_describe(self.features)}")
        num_tokens = self.features.shape[0]
        require_integer("num_kept", self.num_kept, minimum=0)
        if self.num_kept > num_tokens:
            raise ValueError(f"num_kept must be <= N = {num_tokens}, got {self.num_kept}")
        require_integer("num_slices", self.num_slices, minimum=1)
        require_integer("num_tail", self.num_tail, minimum=0)
        if self.num_last is not None:
            require_integer("num_last", self.num_last, minimum=0)
            if self.num_last > num_tokens:
                raise ValueError(f"num_last must be <= N = {num_tokens}, got {self.num_last}")
        if (num_tokens + self.num_tail) % self.num_slices:
            whole = f"N + num_tail = {num_tokens} + {self.num_tail}"
            raise ValueError(f"num_slices must divide {whole}, got {self.num_slices}")
        raw = self.raw_relevance
        if raw is not None and not (raw.shape == (num_tokens,) and raw.is_floating_point()):
            raise ValueError(f"raw_relevance must be [{num_tokens}] float, got {_describe(raw)}")
        if raw is not None and raw.device != self.features.device:
            raise ValueError(f"raw_relevance must be on {self.features.device}, got {raw.device}")

    @property
    def tokens_per_slice(self) -> int:
        """Tokens of one temporal slice."""
        return (self.features.shape[0] + self.num_tail) // self.num_slices

    @property
    def num_of_last_slice(self) -> int:
        """How many of the tokens, the last ones, are of the last slice."""
        if self.num_last is not None:
            return self.num_last
        return max(0, self.tokens_per_slice - self.num_tail)

    def check_finite(self) -> None:
        """Raise `ValueError` on NaN or infinity. Waits for the device."""
        for name in ("features", "raw_relevance"):
            values = getattr(self, name)
            if values is not None and not bool(values.isfinite().all()):
                raise ValueError(f"{name} must be finite, got NaN or inf in {_describe(values)}")


def _describe(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)} of {tensor.dtype}"
