"""A selection shared out over the ranks of a group, which all hold the same tokens.

Each rank selects in some of the segments, and one small all-reduce puts the parts together. So
the result is that of one rank, and the same on all of them.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from vllm_dpp.pruning.dpp.select import Backend, SegmentedTokens, select
from vllm_dpp.pruning.segments import Segments


def select_sharded(
    video: SegmentedTokens,
    max_kernel_bytes: int,
    group: dist.ProcessGroup,
    backend: Backend | None = None,
) -> Tensor:
    """Select exactly the budget of every segment, on all ranks of `group` together.

    Every rank must call this with the same tokens, up to rounding; the budgets are rank 0's.
    Segments whose lengths only the device knows are not shared out, nor those of which the largest
    gains are kept: all are rank 0's then.

    Args:
        video: the tokens, all of them on each rank.
        max_kernel_bytes: as for `select`, on each rank.
        group: the ranks.
        backend: as for `select`.

    Returns:
        [N] bool in the order of the video, True on the tokens kept, the same on every rank.
    """
    budgets = video.budgets.clone()
    dist.broadcast(budgets, group=group, group_src=0)
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    lengths = video.segments.lengths
    if lengths is None or video.total is not None:
        whole = select([video], max_kernel_bytes, backend)[0].keep
        dist.broadcast(whole, group=group, group_src=0)
        return whole
    first, last = (part * len(lengths) // num_ranks for part in (rank, rank + 1))
    offsets = [sum(lengths[:segment]) for segment in range(first, last + 1)]
    tokens = slice(offsets[0], offsets[-1])
    keep = torch.zeros(len(video.features), dtype=torch.uint8, device=video.features.device)
    if first < last:
        mine = SegmentedTokens(
            video.features[tokens],
            video.relevance[tokens],
            Segments.between([offset - offsets[0] for offset in offsets], keep.device),
            budgets[first:last],
            video.max_budget,
            video.objective,
        )
        keep[tokens] = select([mine], max_kernel_bytes, backend)[0].keep.to(keep.dtype)
    dist.all_reduce(keep, dist.ReduceOp.MAX, group=group)
    return video.in_video(keep.bool())
