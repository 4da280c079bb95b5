"""Greedy MAP inference of a DPP, in every segment of a video at once.

Each step takes the token of largest marginal gain and updates the gains of the others with one
new row of the incremental Cholesky factor (Chen, Zhang and Zhou 2018, arXiv 1709.05135). The
number of steps is known on the host and no tensor is read there.

Once the best gain of a segment is at or below `RANK_TOLERANCE` of its largest initial gain, the
segment stops, and what its budget lacks is filled by relevance, ties to the lowest index. So a
segment keeps exactly its budget, whatever its rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_dpp.pruning import compiled
from vllm_dpp.pruning.kernel import (
    RANK_TOLERANCE,
    conditioned_kernel,
    conditioned_rows,
    initial_gains,
)

_TAKEN = -torch.inf  # gain of what cannot be selected: taken tokens and padding


class Selection(NamedTuple):
    """The selected tokens of S segments.

    Args:
        keep: bool in the layout of the input, True on the tokens kept.
        order: [S, max_budget] int64 token taken at each greedy step, -1 where a segment idled.
        gains: [S, max_budget] float32 marginal gain of each step, 0 where a segment idled.
    """

    keep: Tensor
    order: Tensor
    gains: Tensor


def greedy_map(
    features: Tensor, relevance: Tensor, valid: Tensor, budgets: Tensor, max_budget: int
) -> Selection:
    """Select in padded segments from their features.

    Args:
        features: [S, n, D] float; padding may hold anything finite.
        relevance: [S, n] float32, >= 0.
        valid: [S, n] bool, False on padding.
        budgets: [S] int64 tokens to keep, each at most the valid tokens of its segment.
        max_budget: at least the largest budget: the number of steps.

    Returns:
        `keep` [S, n] with exactly `budgets` per segment, and the greedy steps.
    """
    kernel = conditioned_kernel(features, relevance)
    return greedy_map_of_kernel(kernel, relevance, valid, budgets, max_budget)


def greedy_keep(
    features: Tensor, relevance: Tensor, valid: Tensor, budgets: Tensor, max_budget: int
) -> Tensor:
    """The `keep` of `greedy_map`, by the fastest way that this machine has."""
    kernel = conditioned_kernel(features, relevance)
    if compiled.is_available(kernel):
        keep = compiled.greedy_keep(kernel, valid, budgets)
        return _fill_by_relevance(keep, relevance, valid, budgets)
    return greedy_map_of_kernel(kernel, relevance, valid, budgets, max_budget).keep


def greedy_map_of_kernel(
    kernel: Tensor, relevance: Tensor, valid: Tensor, budgets: Tensor, max_budget: int
) -> Selection:
    """Select in padded segments from their kernels, [S, n, n] float32; else as `greedy_map`."""
    num_segments, length, _ = kernel.shape
    segments = torch.arange(num_segments, device=kernel.device)
    marginal_gain = kernel.diagonal(dim1=1, dim2=2).masked_fill(~valid, _TAKEN)
    cholesky_rows = kernel.new_zeros(num_segments, max_budget, length)
    steps = _Steps(marginal_gain.amax(dim=1), budgets, max_budget)
    for step in range(max_budget):
        gain, token = marginal_gain.max(dim=1)
        active = steps.take(step, gain, token)
        earlier = cholesky_rows[:, :step]
        at_token = earlier.gather(2, token[:, None, None].expand(-1, step, 1))
        row = kernel[segments, token].unsqueeze(1).baddbmm(at_token.mT, earlier, alpha=-1)
        row = row.squeeze(1) * _inverse_root(gain, active).unsqueeze(1)
        cholesky_rows[:, step] = row
        # Rounding may leave a gain below zero, which is below the threshold: no clamp is needed,
        # and a clamp would bring taken tokens back.
        marginal_gain.addcmul_(row, row, value=-1)
        taken = torch.where(active, _TAKEN, marginal_gain[segments, token])
        marginal_gain.scatter_(1, token.unsqueeze(1), taken.unsqueeze(1))
    keep = valid & marginal_gain.isneginf()
    return steps.selection(_fill_by_relevance(keep, relevance, valid, budgets))


def greedy_map_flat(
    features: Tensor, relevance: Tensor, segment_ids: Tensor, budgets: Tensor, max_budget: int
) -> Selection:
    """Select in segments whose boundaries only the device knows.

    Kernel rows are formed when a token is taken, so nothing of size N x N is held. Every step
    costs a product of all N rows with S of them.

    Args:
        features: [N, D] float.
        relevance: [N] float32, >= 0.
        segment_ids: [N] int64 in [0, S), in any order.
        budgets: [S] int64 tokens to keep, each at most the tokens of its segment.
        max_budget: at least the largest budget: the number of steps.

    Returns:
        `keep` [N] with exactly `budgets` per segment, and the greedy steps.
    """
    rows = conditioned_rows(features, relevance)
    num_segments = len(budgets)
    member = segment_ids == torch.arange(num_segments, device=rows.device)[:, None]
    marginal_gain = initial_gains(torch.linalg.vector_norm(features.float(), dim=1), relevance)
    cholesky_rows = rows.new_zeros(max_budget, len(rows))
    largest_gain = marginal_gain.where(member, _TAKEN).amax(dim=1)
    steps = _Steps(largest_gain, budgets, max_budget)
    for step in range(max_budget):
        gain, token = marginal_gain.where(member, _TAKEN).max(dim=1)
        active = steps.take(step, gain, token)
        earlier = cholesky_rows[:step]
        products = (rows[token] @ rows.mT).addmm(earlier[:, token].mT, earlier, alpha=-1)
        products *= _inverse_root(gain, active).unsqueeze(1)
        row = products.gather(0, segment_ids.unsqueeze(0)).squeeze(0)
        cholesky_rows[step] = row
        marginal_gain.addcmul_(row, row, value=-1)
        # Segments with nothing left all point at token 0: the minimum lets no idle one undo it.
        taken = torch.where(active, _TAKEN, torch.inf)
        marginal_gain.scatter_reduce_(0, token, taken, "amin")
    keep = member & marginal_gain.isneginf()
    keep = _fill_by_relevance(keep, relevance.expand_as(member), member, budgets)
    return steps.selection(keep.any(dim=0))


class _Steps:
    """What S segments take, step by step, and whether a step counts."""

    def __init__(self, largest_gain: Tensor, budgets: Tensor, max_budget: int) -> None:
        self.threshold = RANK_TOLERANCE * largest_gain
        self.budgets = budgets
        shape = (max_budget, len(budgets))
        self.tokens = budgets.new_zeros(shape, dtype=torch.int64)
        self.gains = largest_gain.new_zeros(shape)

    def take(self, step: int, gain: Tensor, token: Tensor) -> Tensor:
        """Record a step; returns [S] bool, False where a segment idles."""
        self.gains[step], self.tokens[step] = gain, token
        return (gain > self.threshold) & (self.budgets > step)

    def selection(self, keep: Tensor) -> Selection:
        steps = torch.arange(len(self.tokens), device=self.tokens.device).unsqueeze(1)
        active = (self.gains > self.threshold) & (self.budgets > steps)
        return Selection(keep, self.tokens.where(active, -1).T, self.gains.where(active, 0.0).T)


def _inverse_root(gain: Tensor, active: Tensor) -> Tensor:
    """[S] 1 / sqrt(gain), and 0 where a segment idles, which makes its Cholesky row zero."""
    return gain.rsqrt().where(active, 0.0)


def _fill_by_relevance(keep: Tensor, relevance: Tensor, valid: Tensor, budgets: Tensor) -> Tensor:
    """Add to `keep` [S, n] the most relevant other tokens until every budget is met."""
    candidates = relevance.masked_fill(keep | ~valid, _TAKEN)
    by_relevance = candidates.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    rank = torch.empty_like(by_relevance).scatter_(1, by_relevance, places)
    missing = budgets - keep.sum(dim=1)
    return keep | (rank < missing.unsqueeze(1))
