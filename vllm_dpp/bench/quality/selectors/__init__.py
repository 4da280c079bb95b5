"""Rules that choose which tokens of a video are kept: one small file each.

To try another rule, write a function of type `Selector` in a file of its own and name it in
`SELECTORS`. All but the DPP live here and not in the product.
"""

from collections.abc import Callable

from torch import Tensor

from vllm_dpp.bench.quality.selectors import attention, dpp, rand, uniform, vidcom2
from vllm_dpp.pruning.pruner import VideoTokens

Selector = Callable[[VideoTokens], Tensor]
"""From the tokens of a video to those it keeps, [num_kept] int64, ascending.

`features` are the tokens' hidden states before layer K, for K = 0 what the vision encoder gave;
`raw_relevance` is the attention of the question in layer K - 1, for K = 0 in layer 0.
"""

SELECTORS: dict[str, Selector] = {
    "attention": attention.select,
    "random": rand.select,
    "uniform": uniform.select,
    "vidcom2": vidcom2.select,
    **dpp.SELECTORS,
}
