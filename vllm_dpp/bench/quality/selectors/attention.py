"""The tokens to which the question pays most attention, as FastV keeps them.

Chen et al., ECCV 2024, https://arxiv.org/abs/2403.06764. FastV reads the attention of the last
token; `raw_relevance` is the mean over the question, or its last token where the arm says so.
"""

from torch import Tensor

from vllm_dpp.pruning.pruner import VideoTokens


def select(video: VideoTokens) -> Tensor:
    """The `num_kept` largest of `raw_relevance`; among equals the earlier."""
    relevance = video.raw_relevance
    assert relevance is not None
    order = relevance.argsort(descending=True, stable=True)
    return order[: video.num_kept].sort().values
