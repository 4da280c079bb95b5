"""Tokens drawn at random, each set of equal probability."""

import hashlib

import torch
from torch import Tensor

from vllm_dpp.pruning.pruner import VideoTokens


def select(video: VideoTokens) -> Tensor:
    """Seeded by the relevance, so that video and question give the same tokens again."""
    seen = video.features if video.raw_relevance is None else video.raw_relevance
    digest = hashlib.blake2b(seen.float().cpu().numpy().tobytes(), digest_size=7).digest()
    rng = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    order = torch.randperm(len(video.features), generator=rng)
    return order[: video.num_kept].sort().values.to(video.features.device)
