"""Greedy MAP inference of a DPP, in every segment of a video at once.

Each step takes the token of largest marginal gain and updates the gains of the others with one
new row of the incremental Cholesky factor (Chen, Zhang and Zhou 2018, arXiv 1709.05135). The
number of steps is known on the host and no tensor is read there.

Once the best gain of a segment is at or below a fraction of its largest initial gain, the segment
stops, and what its budget lacks is filled by relevance, or in order, ties to the lowest index. So a
segment keeps exactly its budget, whatever its rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vllm_dpp.pruning.dpp.objective import PLAIN, Objective

_TAKEN = -torch.inf  # gain of what cannot be selected: taken tokens and padding


class Selection(NamedTuple):
    """The selected tokens of S segments.

    Args:
        keep: bool in the layout of the input, True on the tokens kept.
        order: [S, max_budget] int64 place in its segment of the token taken at each greedy step, -1
            where a segment idled.
        gains: [S, max_budget] float32 marginal gain of each step, 0 where a segment idled.
    """

    keep: Tensor
    order: Tensor
    gains: Tensor


def greedy_map(
    kernel: Tensor,
    relevance: Tensor,
    valid: Tensor,
    budgets: Tensor,
    max_budget: int,
    objective: Objective = PLAIN,
) -> Selection:
    """Select in padded segments from their kernels.

    Args:
        kernel: [S, n, n] float32; padding may hold anything finite.
        relevance: [S, n] float32, >= 0.
        valid: [S, n] bool, False on padding.
        budgets: [S] int64 tokens to keep, each at most the valid tokens of its segment.
        max_budget: at least the largest budget: the number of steps.
        objective: when a segment stops, and what fills it up.

    Returns:
        `keep` [S, n] with exactly `budgets` per segment, and the greedy steps.
    """
    num_segments, length, _ = kernel.shape
    marginal_gain = kernel.diagonal(dim1=1, dim2=2).masked_fill(~valid, _TAKEN)
    gains_as_row = marginal_gain.unsqueeze(1)
    cholesky_rows = kernel.new_zeros(num_segments, max_budget, length)
    largest_gain = marginal_gain.amax(dim=1)
    steps = _Steps(largest_gain, objective.least_gain, budgets, max_budget)
    row = kernel.new_empty(num_segments, 1, length)
    new_rows = cholesky_rows.unsqueeze(2).unbind(dim=1)
    places = steps.tokens[:, :, None, None].unbind()
    columns = steps.tokens[:, :, None].unbind()
    for step in range(max_budget):
        steps.take(step, marginal_gain)
        torch.gather(kernel, 1, places[step].expand_as(row), out=row)
        earlier = cholesky_rows[:, :step]
        at_token = earlier.gather(2, places[step].expand(-1, step, 1))
        row.baddbmm_(at_token.mT, earlier, alpha=-1)
        torch.mul(row, steps.inverse_roots[step], out=new_rows[step])
        # Rounding may leave a gain below zero, which is below the threshold: no clamp is needed,
        # and a clamp would bring taken tokens back.
        gains_as_row.addcmul_(new_rows[step], new_rows[step], value=-1)
        marginal_gain.scatter_(1, columns[step], _TAKEN)
    keep = steps.taken(valid)
    return steps.selection(fill_up(keep, relevance, valid, budgets, objective.rest_in_order))


class _Steps:
    """What S segments take, step by step, and whether a step counts."""

    def __init__(
        self, largest_gain: Tensor, least_gain: float, budgets: Tensor, max_budget: int
    ) -> None:
        shape = (max_budget, len(budgets))
        steps = torch.arange(max_budget, device=budgets.device).unsqueeze(1)
        self.tokens = budgets.new_empty(shape, dtype=torch.int64)
        self.gains = largest_gain.new_empty(shape)
        self.active = budgets.new_empty(shape, dtype=torch.bool)
        needed = (least_gain * largest_gain).where(budgets > steps, torch.inf)
        roots = largest_gain.new_empty(shape)
        # Views are made once: in the loop they would cost as much as the arithmetic.
        self.inverse_roots = roots[:, :, None, None].unbind()
        self._views = list(
            zip(
                *(x.unbind() for x in (self.gains, self.tokens, needed, self.active, roots)),
                strict=True,
            )
        )
        self._none = largest_gain.new_zeros(())

    def take(self, step: int, marginal_gain: Tensor) -> None:
        """Record the best token of each segment, from [S, n] gains.

        `inverse_roots[step]` [S, 1, 1] becomes 1 / sqrt(gain), and 0 where a segment idles: its
        Cholesky row is zero then.
        """
        gain, token, needed, active, root = self._views[step]
        torch.max(marginal_gain, dim=1, out=(gain, token))
        torch.gt(gain, needed, out=active)
        torch.where(active, gain.rsqrt(), self._none, out=root)

    def taken(self, valid: Tensor) -> Tensor:
        """[S, n] bool, True on the tokens of steps that count."""
        keep = torch.zeros_like(valid, dtype=torch.int8)
        # A segment that idles may name a token again: what counts once counts.
        return keep.scatter_reduce_(1, self.tokens.T, self.active.T.to(torch.int8), "amax").bool()

    def selection(self, keep: Tensor) -> Selection:
        order = self.tokens.where(self.active, -1)
        return Selection(keep, order.T, self.gains.where(self.active, self._none).T)


def fill_up(
    keep: Tensor, relevance: Tensor, valid: Tensor, budgets: Tensor, in_order: bool
) -> Tensor:
    """Add to `keep` [S, n] other tokens, the most relevant or the first, as budgets [S] ask for."""
    worth = torch.zeros_like(relevance) if in_order else relevance
    candidates = worth.masked_fill(keep | ~valid, _TAKEN)
    by_worth = candidates.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    rank = torch.empty_like(by_worth).scatter_(1, by_worth, places)
    missing = budgets - keep.sum(dim=1)
    return keep | (rank < missing.unsqueeze(1))
