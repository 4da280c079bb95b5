"""What vLLM itself can prune a video by, as rules: its own implementations, chosen by name.

EVS (arXiv 2510.14624): what is least like the same cell one slice earlier, and the first slice
whole. VidCom2 (Liu et al., EMNLP 2025, arXiv 2505.14454): per slice, what is least like the mean of
the slice and of the video; vLLM offers it for Qwen3-VL alone.
"""

from torch import Tensor
from vllm.multimodal.video_prune import evs, vidcom2

from vllm_dpp.pruning.rules import RULES, each
from vllm_dpp.pruning.video import VideoTokens


def keep_evs(video: VideoTokens) -> Tensor:
    """What vLLM's mask keeps.

    Raises:
        ValueError: less than the first slice is to be kept.
    """
    if video.num_kept < video.tokens_per_slice:
        raise ValueError(f"EVS keeps the {video.tokens_per_slice} tokens of the first slice")
    mask = evs.compute_retention_mask(video.features, *_grid_and_rate(video))
    return mask.nonzero().flatten()


def keep_vidcom2(video: VideoTokens) -> Tensor:
    """What vLLM's mask keeps.

    Raises:
        ValueError: fewer tokens than slices are to be kept, which the rule does not know.
    """
    if video.num_kept < video.num_slices:
        raise ValueError(f"VidCom2 keeps a token of each of {video.num_slices} slices, or more")
    mask = vidcom2.compute_retention_mask(video.features, *_grid_and_rate(video))
    return mask.nonzero().flatten()


def _grid_and_rate(video: VideoTokens) -> tuple[tuple[int, int, int], int, float]:
    """What the masks are asked with: (slices, rows, columns), merge size, share to be left out."""
    rate = 1 - (video.num_kept + 0.5) / len(video.features)  # they round what is kept down
    return (video.num_slices, 1, video.tokens_per_slice), 1, rate


def register() -> None:
    """Make them rules of this process, as the plugin of another package would."""
    RULES["evs"] = each(keep_evs)
    RULES["vidcom2"] = each(keep_vidcom2)
