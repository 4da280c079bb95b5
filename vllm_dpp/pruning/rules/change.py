"""Change and diversity, without a question: what was not there before, and unlike what is kept.

For the stage before the decoder, which sees no question. With u the unit rows and P(i) all tokens
of the slice before that of token i:

    d = sqrt(1 - max u_i . u_p over p in P(i))      change; the first slice gets the largest
    q = f + (1 - f) (d - min d) / (max d - min d)   quality
    L = diag(q) (0.9 S + 0.1 S⁴) diag(q)            greedy MAP in every segment

A camera that moves makes nothing new of what it has shown: it is found where it was. With the same
cell alone for P(i), and q to decide alone, this would be the order of EVS (arXiv 2510.14624). Where
everything is as new, or nothing is, q is flat and it is the DPP. S⁴, elementwise and positive
semidefinite (Schur), keeps gains meaningful where S runs out of rank.

Where nothing adds more than a 200th of what the first token of a segment did, all that is new is
kept, and what is left differs by noise. The rest of the budget goes to the first tokens in time
then: slices seen whole, against which the changes are read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_dpp.pruning.config import PruningConfig
from vllm_dpp.pruning.dpp.objective import Objective
from vllm_dpp.pruning.rows import rows_per_cast, unit_rows
from vllm_dpp.pruning.rules.dpp import segmented, select_in
from vllm_dpp.pruning.rules.rule import Means
from vllm_dpp.pruning.video import VideoTokens

FLOOR = 0.2
OBJECTIVE = Objective(quartic=0.1, least_gain=0.005, rest_in_order=True)
ROUNDING = 1e-5
"""A distance 1 - cos up to this is none: rows that are equal differ by as much once rounded."""
LEAST_RANGE = 0.05
"""Changes that differ by less than this are not stretched to the whole range of q."""


def keep(videos: Sequence[VideoTokens], config: PruningConfig, means: Means) -> list[Tensor]:
    """The rule, see `Rule`. Of the settings, those of segments and budgets count."""
    problems = [segmented(v, quality(change(v)), config, OBJECTIVE) for v in videos]
    return select_in(problems, videos, config, means)


def change(video: VideoTokens) -> Tensor:
    """How far each token is from the most alike of the slice before.

    Returns:
        [N] float32 in [0, sqrt 2]. The first slice, which has nothing before it, gets the largest
        of the others; a video of one slice, a picture, gets 1.
    """
    features, cells = video.features, video.tokens_per_slice
    num_tokens, dim = features.shape
    if num_tokens <= cells:
        return features.new_ones(num_tokens, dtype=torch.float32)
    whole = num_tokens // cells
    at_once = slices_at_once(cells, dim)
    likeness = []
    for first in range(1, whole, at_once):
        last = min(first + at_once, whole)
        slices = unit_rows(features[(first - 1) * cells : last * cells]).view(-1, cells, dim)
        likeness.append(_most_alike(slices[1:], slices[:-1]))
    if num_tokens > whole * cells:  # the rest of the last slice is a tail
        rows = unit_rows(features[(whole - 1) * cells :])
        likeness.append(_most_alike(rows[None, cells:], rows[None, :cells]))
    distance = (1 - ROUNDING - torch.cat(likeness)).clamp(min=0).sqrt()
    return torch.cat([distance.amax().expand(cells), distance])


def slices_at_once(cells: int, dim: int) -> int:
    """Slices of so many tokens of D features that are compared in one product, at least 1."""
    return max(1, rows_per_cast(max(dim, cells)) // cells)


def quality(change: Tensor) -> Tensor:
    """[N] float32 in [FLOOR, 1] from [N] change."""
    low, high = change.aminmax()
    return FLOOR + (1 - FLOOR) * (change - low) / (high - low).clamp(min=LEAST_RANGE)


def _most_alike(rows: Tensor, before: Tensor) -> Tensor:
    """[s m] float32, the largest product of each of the unit rows [s, m, D] with `before`'s.

    Args:
        rows: of s slices.
        before: [s, c, D], unit rows of the slices before these.
    """
    at_once = max(1, rows_per_cast(before.shape[1]) // len(rows))
    parts = [
        (rows[:, first : first + at_once] @ before.mT).amax(-1)
        for first in range(0, rows.shape[1], at_once)
    ]
    return torch.cat(parts, dim=1).flatten()
