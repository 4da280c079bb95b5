"""Pruning of video tokens by greedy MAP inference of a conditional DPP. Needs torch alone."""

from vllm_dpp.pruning.budget import num_kept, share_by_length, share_by_weight
from vllm_dpp.pruning.config import PruningConfig
from vllm_dpp.pruning.dpp.low_rank import project
from vllm_dpp.pruning.dpp.mass import relevance_mass, spectral_mass
from vllm_dpp.pruning.naive import naive_greedy_map, naive_keep_indices
from vllm_dpp.pruning.pruner import keep_indices
from vllm_dpp.pruning.relevance import normalize_relevance, question_attention
from vllm_dpp.pruning.segments import Segments, scene_offsets, segment_offsets, segment_order
from vllm_dpp.pruning.video import VideoTokens
from vllm_dpp.pruning.workspace import workspace_bytes

__all__ = [
    "PruningConfig",
    "Segments",
    "VideoTokens",
    "keep_indices",
    "naive_greedy_map",
    "naive_keep_indices",
    "normalize_relevance",
    "num_kept",
    "project",
    "question_attention",
    "relevance_mass",
    "scene_offsets",
    "segment_offsets",
    "segment_order",
    "share_by_length",
    "share_by_weight",
    "spectral_mass",
    "workspace_bytes",
]
