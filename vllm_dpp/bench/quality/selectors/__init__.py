"""What the arms keep: rules of `vllm_dpp.pruning.rules`, settings of the DPP, and a peer's rule."""

from collections.abc import Callable

from torch import Tensor

from vllm_dpp.bench.quality.selectors import dpp, vidcom2
from vllm_dpp.pruning.rules import attention, random_draw, uniform
from vllm_dpp.pruning.video import VideoTokens

Selector = Callable[[VideoTokens], Tensor]
"""From the tokens of a video to those it keeps, [num_kept] int64, ascending.

`features` are the tokens' hidden states before layer K, for K = 0 what the vision encoder gave;
`raw_relevance` is the attention of the question in layer K - 1, for K = 0 in layer 0.
"""

SELECTORS: dict[str, Selector] = {
    "attention": attention.keep,
    "random": random_draw.keep,
    "uniform": uniform.keep,
    "vidcom2": vidcom2.select,
    **dpp.SELECTORS,
}
