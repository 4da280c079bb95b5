"""Tokens spread evenly over time and, in each slice, over the picture.

Slices start their strides at different cells: one stride for the whole video would keep the same
columns in every slice whenever it divides the width.
"""

import torch
from torch import Tensor

from vllm_dpp.pruning.pruner import VideoTokens

_GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, are spread evenly for any number of slices."""


def select(video: VideoTokens) -> Tensor:
    """As many tokens of every slice, to within one."""
    cells, chosen = video.tokens_per_slice, []
    for step in range(video.num_slices):
        count = _share(step + 1, video) - _share(step, video)
        first = step * _GOLDEN % 1
        chosen += [step * cells + int((first + i) * cells / count) for i in range(count)]
    return torch.tensor(chosen, device=video.features.device)


def _share(num_slices: int, video: VideoTokens) -> int:
    """Tokens that the first slices keep."""
    return num_slices * video.num_kept // video.num_slices
