"""The tokens to which the question pays most attention, as FastV keeps them. For comparison.

Chen et al., ECCV 2024, arXiv 2403.06764. FastV reads the attention of the last token; this is the
mean over the question.
"""

from torch import Tensor

from vllm_dpp.pruning.video import VideoTokens


def keep(video: VideoTokens) -> Tensor:
    """The `num_kept` largest of `raw_relevance`; among equals the earlier.

    Raises:
        ValueError: there is no relevance.
    """
    if video.raw_relevance is None:
        raise ValueError("rule 'attention' needs relevance 'question'")
    order = video.raw_relevance.argsort(descending=True, stable=True)
    return order[: video.num_kept].sort().values
