"""Tokens spread evenly over time and, in each slice, over the picture. For comparison.

Slices start their strides at different cells: one stride for the whole video would keep the same
columns in every slice whenever it divides the width.
"""

from torch import Tensor

from vllm_dpp.pruning.segments import to_device
from vllm_dpp.pruning.video import VideoTokens

_GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, are spread evenly for any number of slices."""


def keep(video: VideoTokens) -> Tensor:
    """As many tokens of every slice, to within one, as far as a tail leaves it whole."""
    chosen: list[int] = []
    for step in range(video.num_slices):
        first = step * video.tokens_per_slice
        cells = min(video.tokens_per_slice, len(video.features) - first)
        count = _share(first + cells, video) - _share(first, video)
        shift = step * _GOLDEN % 1
        chosen += [first + int((shift + i) * cells / count) for i in range(count)]
    return to_device(chosen, video.features.device)


def _share(num_tokens: int, video: VideoTokens) -> int:
    """Tokens kept of the first ones."""
    return num_tokens * video.num_kept // len(video.features)
