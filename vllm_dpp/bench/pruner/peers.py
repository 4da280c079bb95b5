"""What the pruner is measured against, each written from its formulas.

All of them select what `keep_indices` does: the same relevance, the same segments and budgets,
float32. They differ in how the loop over selected tokens is run, which is what is measured.
"""

import torch
from torch import Tensor

from vllm_dpp.bench.pruner.problem import Problem

_EPSILON = 1e-8  # of the unit rows


def original(problem: Problem) -> Tensor:
    """One kernel of the whole video, a slice of it per segment, and a loop over single tokens.

    This is what segment code in the style of CDPruner (arXiv 2506.10967) does: every segment's
    slice is cut out of the N x N kernel, and each step reads its token on the host.

    Returns:
        [num_kept] int64, ascending; so do the others here.
    """
    relevance = problem.relevance()
    rows = _unit_rows(problem.features)
    kernel = relevance[:, None] * (rows @ rows.T) * relevance[None, :]
    kept = []
    for segment in range(problem.case.num_segments):
        members = (problem.segment_ids == segment).nonzero().squeeze(1)
        of_segment = kernel[members][:, members]
        kept.append(members[_one_by_one(of_segment, problem.case.kept_per_segment)])
    return torch.cat(kept).sort().values


def per_segment(problem: Problem) -> Tensor:
    """The same loop, but each segment has its own products and no kernel is larger than one."""
    relevance = problem.relevance()
    kept = []
    for segment in range(problem.case.num_segments):
        members = (problem.segment_ids == segment).nonzero().squeeze(1)
        rows, weights = _unit_rows(problem.features[members]), relevance[members]
        kernel = weights[:, None] * (rows @ rows.T) * weights[None, :]
        kept.append(members[_one_by_one(kernel, problem.case.kept_per_segment)])
    return torch.cat(kept).sort().values


def batched(problem: Problem) -> Tensor:
    """All segments in one loop, as CDPruner runs the images of a batch.

    Segments must be of equal length and budget. Nothing is read on the host.
    """
    case = problem.case
    relevance = problem.relevance().view(case.num_segments, case.tokens_per_segment)
    rows = _unit_rows(problem.by_segment)
    kernel = relevance[:, :, None] * (rows @ rows.mT) * relevance[:, None, :]
    segments = torch.arange(case.num_segments, device=kernel.device)
    marginal_gain = kernel.diagonal(dim1=1, dim2=2).clone()
    cholesky_rows = kernel.new_zeros(case.kept_per_segment, *marginal_gain.shape)
    tokens = segments.new_empty(case.kept_per_segment, case.num_segments)
    for step in range(case.kept_per_segment):
        token = marginal_gain.argmax(dim=1)
        earlier = cholesky_rows[:step]
        explained = torch.einsum("ts,tsn->sn", earlier[:, segments, token], earlier)
        root = marginal_gain[segments, token].sqrt().unsqueeze(1)
        row = (kernel[segments, token] - explained) / root
        cholesky_rows[step] = row
        marginal_gain -= row.square()
        marginal_gain[segments, token] = -torch.inf
        tokens[step] = token
    return (tokens + segments * case.tokens_per_segment).flatten().sort().values


def gram(rows: Tensor) -> Tensor:
    """[S, n, n] bare products of [S, n, D] float32 rows: what every path needs at the least."""
    return torch.bmm(rows, rows.mT)


def _one_by_one(kernel: Tensor, k: int) -> Tensor:
    """Greedy MAP on an [n, n] kernel, a step at a time: [k] int64 in order of selection."""
    marginal_gain = kernel.diagonal().clone()
    cholesky_rows = kernel.new_zeros(k, len(kernel))
    selected: list[int] = []
    for step in range(k):
        token = int(marginal_gain.argmax().item())
        earlier = cholesky_rows[:step]
        row = (kernel[token] - earlier[:, token] @ earlier) / marginal_gain[token].sqrt()
        cholesky_rows[step] = row
        marginal_gain -= row.square()
        marginal_gain[token] = -torch.inf
        selected.append(token)
    return torch.tensor(selected, device=kernel.device)


def _unit_rows(features: Tensor) -> Tensor:
    rows = features.float()
    return rows / (rows.norm(dim=-1, keepdim=True) + _EPSILON)
