"""Which tokens of each video are kept: the entry point of the pruner."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from vllm_dpp.pruning.config import PruningConfig
from vllm_dpp.pruning.dpp.select import Backend
from vllm_dpp.pruning.rules import RULES, Means
from vllm_dpp.pruning.video import VideoTokens


@torch.no_grad()
def keep_indices(
    videos: Sequence[VideoTokens],
    config: PruningConfig,
    *,
    validate: bool = False,
    backend: Backend | None = None,
    group: ProcessGroup | None = None,
) -> list[Tensor]:
    """Choose the tokens of each video that are kept, by the rule that `config` names.

    Every video keeps exactly its `num_kept` tokens, and what it keeps depends on nothing but
    itself and `config`. On a GPU nothing is read on the host, so nothing waits for the device.

    Args:
        videos: the videos, each with its `num_kept`.
        config: the rule, and how segments, relevance and budgets are formed.
        validate: also check that all values are finite, which waits for the device. Without it
            NaN or infinity still gives `num_kept` distinct tokens, but not meaningful ones.
        backend: how a DPP selects, see `dpp.select`; None takes the fastest that the device has.
        group: ranks that hold the same videos and share the work; all get the same indices.

    Returns:
        Per video [num_kept] int64 token indices, ascending, on the device of its features.

    Raises:
        ValueError: `validate` is set and a value is NaN or infinite, the device has no such
            `backend`, or the rule needs a relevance that a video does not have.
    """
    if validate:
        for video in videos:
            video.check_finite()
    kept = [torch.arange(video.num_kept, device=video.features.device) for video in videos]
    undecided = [i for i, video in enumerate(videos) if 0 < video.num_kept < len(video.features)]
    if undecided:
        rule, means = RULES[config.rule], Means(backend, group)
        chosen = rule([videos[i] for i in undecided], config, means)
        for i, indices in zip(undecided, chosen, strict=True):
            kept[i] = indices
    return kept
