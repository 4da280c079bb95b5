"""Change and diversity, without a question: what is new at its place, and unlike what is kept.

For the stage before the decoder, which sees no question. With u the unit rows and p(i) the token
of the same cell one slice earlier:

    d = sqrt(1 - u_i . u_p(i))                      change; the first slice gets the largest
    q = f + (1 - f) (d - min d) / (max d - min d)   quality
    L = diag(q) (0.9 S + 0.1 S⁴) diag(q)            greedy MAP in every segment

Where q decides alone, this is the order of EVS (arXiv 2510.14624); where everything moves alike, or
nothing moves, q is flat and it is the DPP. S⁴, elementwise and positive semidefinite (Schur), keeps
gains meaningful where S runs out of rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_dpp.pruning.config import PruningConfig
from vllm_dpp.pruning.rows import NORM_EPSILON, rows_per_cast
from vllm_dpp.pruning.rules.dpp import segmented, select_in
from vllm_dpp.pruning.rules.rule import Means
from vllm_dpp.pruning.video import VideoTokens

FLOOR = 0.2
QUARTIC = 0.1
ROUNDING = 1e-5
"""A distance 1 - cos up to this is none: rows that are equal differ by as much once rounded."""
LEAST_RANGE = 0.05
"""Changes that differ by less than this are not stretched to the whole range of q."""


def keep(videos: Sequence[VideoTokens], config: PruningConfig, means: Means) -> list[Tensor]:
    """The rule, see `Rule`. Of the settings, those of segments and budgets count."""
    problems = [segmented(v, quality(change(v)), config, quartic=QUARTIC) for v in videos]
    return select_in(problems, videos, config, means)


def change(video: VideoTokens) -> Tensor:
    """How far each token is from the same cell one slice earlier.

    Returns:
        [N] float32 in [0, sqrt 2]. The first slice, which has nothing before it, gets the largest
        of the others; a video of one slice, a picture, gets 1.
    """
    features, cells = video.features, video.tokens_per_slice
    num_tokens = len(features)
    if num_tokens <= cells:
        return features.new_ones(num_tokens, dtype=torch.float32)
    later = []
    at_once = rows_per_cast(features.shape[1])
    for first in range(cells, num_tokens, at_once):
        last = min(first + at_once, num_tokens)
        later.append(_cosine(features[first:last], features[first - cells : last - cells]))
    distance = (1 - ROUNDING - torch.cat(later)).clamp(min=0).sqrt()
    return torch.cat([distance.amax().expand(cells), distance])


def quality(change: Tensor) -> Tensor:
    """[N] float32 in [FLOOR, 1] from [N] change."""
    low, high = change.aminmax()
    return FLOOR + (1 - FLOOR) * (change - low) / (high - low).clamp(min=LEAST_RANGE)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """[n] float32 from two [n, D]; 0 where a row is zero."""
    a, b = a.float(), b.float()
    norms = (torch.linalg.vector_norm(x, dim=1) + NORM_EPSILON for x in (a, b))
    product: Tensor = (a * b).sum(dim=1)
    for norm in norms:
        product = product / norm
    return product
