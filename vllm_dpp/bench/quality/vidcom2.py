"""VidCom2: per slice, the tokens least like the mean of the slice and of the video.

Liu et al., EMNLP 2025, https://arxiv.org/abs/2505.14454. The rule is vLLM's own implementation.
vLLM offers it for Qwen3-VL alone, so here it chooses what enters layer K = 0.
"""

from torch import Tensor
from vllm.multimodal.video_prune.vidcom2 import compute_retention_mask

from vllm_dpp.pruning.rules import RULES, each
from vllm_dpp.pruning.video import VideoTokens


def keep(video: VideoTokens) -> Tensor:
    """What vLLM's mask keeps.

    Raises:
        ValueError: fewer tokens than slices are to be kept, which the rule does not know.
    """
    if video.num_kept < video.num_slices:
        raise ValueError(f"VidCom2 keeps a token of each of {video.num_slices} slices, or more")
    rate = 1 - (video.num_kept + 0.5) / len(video.features)  # it rounds what is kept down
    grid = (video.num_slices, 1, video.tokens_per_slice)
    mask = compute_retention_mask(video.features, grid, 1, rate)
    return mask.nonzero().flatten()


def register() -> None:
    """Make it a rule of this process, as the plugin of another package would."""
    RULES["vidcom2"] = each(keep)
