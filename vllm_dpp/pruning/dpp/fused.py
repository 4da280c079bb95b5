"""The whole selection on a GPU, by two Triton kernels for all segments of all requests.

`gram_kernel` multiplies the rows of every segment with one another, in tiles on and under the
diagonal. `greedy_kernel` then takes one program per segment through its whole loop: it scales the
products to the kernel L as it reads them, which it does for rows of taken tokens alone, stops at
the budget of its segment or where no token gains enough, and fills up.

Offsets and budgets stay on the device, the host knows two bounds, and nothing waits, so a CUDA
graph may hold it all. What is compiled depends on the dtype of the features, on whether D and the
row stride are multiples of 16 (if not, products are slow), and on the power of two above the
longest segment, of which there are five: no other number of a request compiles anything. It takes
a second or two each time and must have happened before a graph is captured.

The result of a segment depends on nothing but itself, to the last bit: tiles have one size and
start at its first token, and `fused_kernels` says why the power of two does not matter.

Estimated for an H200, 16,384 tokens of 3,584 bfloat16 features, a quarter kept; and measured, with
all that `keep_indices` does around it (`vllm_dpp/bench/results/gpu-h200.md`):

| segments of | products | loop | what bounds the loop | measured |
|---|---|---|---|---|
| 256 | 0.1 ms | 0.1 ms | 64 steps of about 1 us: latency of loads and the maximum | 0.74 ms |
| 512 | 0.15 ms | 0.3 ms | both | 0.99 ms |
| 1024 | 0.2 ms | 1.5 ms | 134 MB of Cholesky rows read by each program | - |

One program is one multiprocessor, so a segment of n tokens with k kept takes about 2 n k² bytes at
0.1 TB/s, whatever else is idle. Past a few thousand tokens another path is faster.
"""

import importlib.util
import os

import torch
from torch import Tensor

from vllm_dpp.pruning.dpp.greedy_map import Selection
from vllm_dpp.pruning.dpp.objective import PLAIN, Objective

# Rows and columns of a tile of products, features read at once, warps. A tile of 16-bit features
# is what one multiprocessor holds: two sums of 128 x 128 and three stages of loads.
_TILES = {
    torch.bfloat16: (128, 64, 8),
    torch.float16: (128, 64, 8),
    torch.float32: (64, 32, 4),
}
_FEATURES_PER_SUM = 512  # see `gram_kernel`
_COLUMNS_PER_WARP = 128  # each thread holds four, which is one load of 16 bytes
_MIN_BLOCK = 128
_MAX_BLOCK = 2048  # columns held at once; a longer segment is passed over in several parts
COMPILED_LENGTHS = tuple(1 << power for power in range(7, 12))  # from _MIN_BLOCK to _MAX_BLOCK
_MAX_SEGMENTS = 65535  # of one launch


def is_available(device: torch.device) -> bool:
    """Whether `greedy_map_fused` runs on `device`: NVIDIA, compute capability 8.0, and Triton.

    Triton's interpreter runs it on a CPU, to see what it does, not to be fast.
    """
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return importlib.util.find_spec("triton") is not None
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return importlib.util.find_spec("triton") is not None


def greedy_map_fused(
    features: Tensor,
    relevance: Tensor,
    offsets: Tensor,
    budgets: Tensor,
    longest: int,
    max_budget: int,
    *,
    objective: Objective = PLAIN,
    max_kernel_bytes: int,
) -> Selection:
    """Select in the segments of one or many videos whose offsets only the device knows.

    NaN or infinity in a segment fills its budget without a greedy step.

    Args:
        features: [N, D] float32, bfloat16 or float16; any stride between rows, none within.
        relevance: [N] float32, >= 0.
        offsets: [S + 1] int64; segment s is [offsets[s], offsets[s + 1]). Tokens that are not to
            be pruned at all may be segments of budget 0: they cost nothing.
        budgets: [S] int64 tokens to keep, each at most the tokens of its segment.
        longest: at least the tokens of the longest segment: shorter is not noticed, and unsafe.
        max_budget: at least the largest budget.
        objective: in what the rule differs from the plain DPP.
        max_kernel_bytes: bound on the float32 products held at once, where one segment needs at
            most that; the Cholesky rows take `max_budget / longest` as much again.

    Returns:
        `keep` [N] with exactly `budgets` per segment, and the greedy steps.

    Raises:
        ValueError: `features` has another dtype or shape, or gaps within its rows.
    """
    gaps = features.dim() == 2 and features.shape[1] > 1 and features.stride(1) != 1
    if features.dim() != 2 or features.dtype not in _TILES or gaps:
        raise ValueError(
            "features must be [N, D] float32, bfloat16 or float16 with contiguous rows, got "
            f"shape {list(features.shape)} of {features.dtype}, strides {features.stride()}"
        )
    device, num_segments = features.device, len(budgets)
    keep = torch.zeros(len(features), dtype=torch.int8, device=device)
    order = torch.full((num_segments, max_budget), -1, dtype=torch.int64, device=device)
    gains = torch.zeros(num_segments, max_budget, dtype=torch.float32, device=device)
    if order.numel() and len(features) and longest:
        budgets = budgets.minimum(offsets.diff()).clamp(0, max_budget)  # never write past the ends
        inputs = features, relevance.float().contiguous(), offsets, budgets
        with torch.cuda.device_of(features):  # type: ignore[no-untyped-call]  # torch's
            _select(*inputs, longest, objective, max_kernel_bytes, Selection(keep, order, gains))
    return Selection(keep.view(torch.bool), order, gains)


def fused_bytes(
    num_tokens: int, num_segments: int, longest: int, max_budget: int, max_kernel_bytes: int
) -> int:
    """At least the bytes that `greedy_map_fused` holds at once for N tokens; as its arguments."""
    width = _width(longest)
    batch = _segments_per_batch(num_segments, num_tokens, longest, width, max_kernel_bytes)
    num_rows = min(num_tokens, batch * longest)
    workspace = 4 * width * (num_rows + min(num_rows, batch * max_budget) + 3 * batch)
    return workspace + 4 * num_tokens + num_segments * (24 + 12 * max_budget)


def _select(
    features: Tensor,
    relevance: Tensor,
    offsets: Tensor,
    budgets: Tensor,
    longest: int,
    objective: Objective,
    max_kernel_bytes: int,
    out: Selection,
) -> None:
    """Write `out`, in as many batches of segments as the bound asks for."""
    from vllm_dpp.pruning.dpp.fused_kernels import gram_kernel, greedy_kernel

    num_tokens, dim = features.shape
    num_segments, max_budget = out.order.shape
    width = _width(longest)
    batch = _segments_per_batch(num_segments, num_tokens, longest, width, max_kernel_bytes)
    # The rows of a segment follow those of the one before, so that short segments take little.
    num_rows = min(num_tokens, batch * longest)
    products = relevance.new_empty(num_rows, width)
    cholesky_rows = relevance.new_empty(min(num_rows, batch * max_budget), width)
    vectors = relevance.new_empty(batch, 3, width)
    row_starts = budgets.cumsum(0) - budgets
    tile, depth, gram_warps = _TILES[features.dtype]
    num_tiles = -(-longest // tile)
    block = min(_MAX_BLOCK, max(_MIN_BLOCK, 1 << (longest - 1).bit_length()))
    for first in range(0, num_segments, batch):
        count = min(batch, num_segments - first)
        gram_kernel[(num_tiles, num_tiles, count)](
            features,
            products,
            offsets,
            budgets,
            dim,
            features.stride(0),
            width,
            first,
            tile=tile,
            depth=depth,
            partial=_FEATURES_PER_SUM,
            # float32 in three products of its upper and lower halves; plain TF32 loses indices.
            precision="tf32x3" if features.dtype == torch.float32 else "ieee",
            upcast=not features.is_cuda,  # Triton's interpreter computes bfloat16 as integers
            num_warps=gram_warps,
            num_stages=3,
            enable_fp_fusion=False,
        )
        greedy_kernel[(count,)](
            products,
            cholesky_rows,
            vectors,
            relevance,
            offsets,
            budgets,
            row_starts,
            out.keep,
            out.order,
            out.gains,
            width,
            max_budget,
            first,
            objective.quartic,
            objective.least_gain,
            is_mixed=objective.quartic > 0,
            rest_in_order=objective.rest_in_order,
            block=block,
            unroll=8 if block < _MAX_BLOCK else 4,  # what the registers of a thread hold
            num_warps=block // _COLUMNS_PER_WARP,
            enable_fp_fusion=False,
        )


def _width(longest: int) -> int:
    """Columns of the workspaces."""
    from vllm_dpp.pruning.dpp.fused_kernels import COLUMNS

    return -(-longest // COLUMNS) * COLUMNS


def _segments_per_batch(
    num_segments: int, num_tokens: int, longest: int, width: int, max_kernel_bytes: int
) -> int:
    """As many segments, at least one, as have rows of products within the bound for certain."""
    max_rows = max_kernel_bytes // (4 * width)
    within = num_segments if max_rows >= num_tokens else max_rows // longest
    return max(1, min(within, num_segments, _MAX_SEGMENTS))
