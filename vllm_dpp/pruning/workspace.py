"""How much memory a selection takes, for engines that share out a device's memory beforehand.

Each part adds up what the code it names allocates, and changes with it: tests measure the peaks.
"""

from dataclasses import replace

import torch
from torch import Tensor

from vllm_dpp.pruning.config import PruningConfig
from vllm_dpp.pruning.dpp.fused import fused_bytes
from vllm_dpp.pruning.dpp.kernel import kernel_bytes
from vllm_dpp.pruning.dpp.mass import BYTES_PER_ENTRY
from vllm_dpp.pruning.dpp.select import Backend, SegmentedTokens, fastest_for
from vllm_dpp.pruning.rows import rows_per_cast
from vllm_dpp.pruning.rules import change
from vllm_dpp.pruning.rules.dpp import objective_of, relevance_of, segmented
from vllm_dpp.pruning.video import VideoTokens

_FLOAT, _INDEX = 4, 8  # bytes of float32 and int64


def workspace_bytes(
    num_tokens: int,
    dim: int,
    num_kept: int,
    config: PruningConfig,
    device: torch.device,
    *,
    num_slices: int,
    num_tail: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    backend: Backend | None = None,
) -> int:
    """At least the bytes that `keep_indices` holds at once beyond its inputs, for one video.

    Several videos at once take at most the sum of theirs and, where the kernels of `fused` select,
    a copy of all their features. Not counted: what compilers and BLAS libraries keep, and the pass
    over all values that `validate` asks for.

    Args:
        num_tokens: N, of the tokens that are selected from.
        dim: D of their features.
        num_kept: tokens to keep of the N.
        config: how segments, relevance and budgets are formed.
        device: where the selection runs.
        num_slices: temporal slices of the whole video, a divisor of N + `num_tail`.
        num_tail: tokens of the video that are not among the N, as of `VideoTokens`.
        dtype: of the features.
        backend: as of `keep_indices`.

    Raises:
        ValueError: a number does not fit, as in `VideoTokens`.
    """
    features = torch.empty(num_tokens, dim, dtype=dtype, device="meta")
    video = VideoTokens(features, None, num_kept, num_slices, num_tail)
    kept = _INDEX * num_kept
    if not 0 < num_kept < num_tokens:
        return kept
    if config.rule not in ("dpp", "change"):
        return kept + _ordered(num_tokens)
    problem = _without_values(video, config)
    per_segment = 6 * _INDEX * len(problem.segments)  # offsets, budgets, and how they are shared
    held = kept + (_FLOAT + 1) * num_tokens + per_segment  # the relevance and what is kept
    if problem.tokens is not None:  # they, and a copy of what is in their order
        held += num_tokens * (2 * _INDEX + _FLOAT + features.element_size() * dim)
    if problem.features.shape[1] < dim:
        held += _FLOAT * (num_tokens + dim) * problem.features.shape[1]
    bound = config.max_kernel_bytes
    way = backend or fastest_for(device, problem.segments.longest, problem.max_budget)
    select = {"torch": _torch, "compiled": _compiled, "fused": _fused}[way]
    one_after_the_other = (
        _relevance(num_tokens),
        _change(video, config),
        _scenes(video, config),
        _projection(features, config),
        _masses(problem, config, device),
        select(problem, bound, device),
        _steps(problem) + _gains(problem),
        _indices(num_tokens),
    )
    return held + max(one_after_the_other)


def _without_values(video: VideoTokens, config: PruningConfig) -> SegmentedTokens:
    """What is selected from, as far as shapes go, by the code that makes it for a selection.

    Only what would take time is left out: the bound on budgets is one for "relevance" and
    "spectrum".
    """
    budget = config.budget if config.budget == "length" else "relevance"
    config_of_shapes = replace(config, budget=budget, projection_dim=None)
    objective = change.OBJECTIVE if config.rule == "change" else objective_of(config)
    quality = relevance_of(video, config)
    problem = segmented(video, quality, config_of_shapes, objective)
    num_tokens, dim = video.features.shape
    to_dim = config.projection_dim
    if to_dim is None or dim <= to_dim:
        return problem
    projected = video.features.new_empty(num_tokens, to_dim, dtype=torch.float32)
    return replace(problem, features=projected)


def _relevance(num_tokens: int) -> int:
    """Of `normalize_relevance`."""
    return 4 * _FLOAT * num_tokens


def _change(video: VideoTokens, config: PruningConfig) -> int:
    """Of `rules.change`: slices and those before them, cast and scaled, products, and values."""
    if config.rule != "change":
        return 0
    num_tokens, dim = video.features.shape
    cells = video.tokens_per_slice
    rows = min(num_tokens, (change.slices_at_once(cells, dim) + 1) * cells)
    products = min(rows, max(1, rows_per_cast(cells))) * cells
    held = rows * (dim * (_cast_bytes(video.features) + _FLOAT) + 2 * _FLOAT)
    return held + _FLOAT * products + 6 * _FLOAT * num_tokens


def _ordered(num_tokens: int) -> int:
    """Of a rule that orders tokens: the order, twice, and what sorting takes."""
    return 6 * _INDEX * num_tokens


def _scenes(video: VideoTokens, config: PruningConfig) -> int:
    """Of `scene_offsets`: means twice, unit rows and their products, and one cast of slices."""
    if config.segment_by != "scene":
        return 0
    num_tokens, dim = video.features.shape
    size = video.tokens_per_slice
    cast = min(num_tokens, max(size, rows_per_cast(dim) // size * size))
    means = 3 * _FLOAT * -(-num_tokens // size) * dim
    return means + _cast_bytes(video.features) * cast * dim


def _projection(features: Tensor, config: PruningConfig) -> int:
    """Of `project`, beside its result and matrix: one more of these, a cast and its product."""
    num_tokens, dim = features.shape
    to_dim = config.projection_dim
    if to_dim is None or dim <= to_dim:
        return 0
    rows = min(num_tokens, rows_per_cast(dim))
    multiplied = rows * (_cast_bytes(features) * dim + _FLOAT * to_dim)
    return max(_FLOAT * dim * to_dim, multiplied)


def _masses(problem: SegmentedTokens, config: PruningConfig, device: torch.device) -> int:
    """Of `relevance_mass` and `spectral_mass`."""
    if config.budget != "spectrum":
        return 3 * _INDEX * len(problem.features)
    n = problem.segments.longest
    count = _segments_at_once(problem, config.max_kernel_bytes * _FLOAT // BYTES_PER_ENTRY)
    wide = BYTES_PER_ENTRY * count * n**2 + 64 * (count * n + len(problem.segments))
    return max(_padded_kernels(problem, count, device), wide) + _mixing(problem)


def _torch(problem: SegmentedTokens, max_kernel_bytes: int, device: torch.device) -> int:
    """Of `greedy_map`: the kernels, then Cholesky rows beside them."""
    n, k = problem.segments.longest, problem.max_budget
    count = _segments_at_once(problem, max_kernel_bytes)
    with_rows = _FLOAT * count * n * (n + k)
    steps = count * 80 * (n + k)
    most = max(_padded_kernels(problem, count, device) + _mixing(problem), with_rows)
    return most + steps + _steps(problem)


def _compiled(problem: SegmentedTokens, max_kernel_bytes: int, device: torch.device) -> int:
    """Of `greedy_map_compiled`: the kernels, then the Cholesky rows of a segment a thread."""
    n, k = problem.segments.longest, problem.max_budget
    num_tokens, dim = problem.features.shape
    # Shorter segments may fill the bound better than the longest, by less than one of these.
    most = -(-max_kernel_bytes // (_FLOAT * n**2))
    count = min(len(problem.segments), -(-num_tokens // n), most)
    cast = _cast_bytes(problem.features)
    kernels = kernel_bytes(count, n, num_tokens, dim, device, bytes_per_feature=cast)
    threads = min(torch.get_num_threads(), len(problem.segments))
    with_rows = _FLOAT * n * (count * n + threads * k)
    steps = count * 48 * n + num_tokens + len(problem.segments) * 16 * k
    return max(kernels + _mixing(problem), with_rows) + steps + _steps(problem)


def _steps(problem: SegmentedTokens) -> int:
    """Of all segments: tokens and gains."""
    return (_INDEX + _FLOAT) * len(problem.segments) * problem.max_budget


def _gains(problem: SegmentedTokens) -> int:
    """Of `keep_largest_gains`: places and gains, sorted, and the rest that is filled up."""
    if problem.total is None:
        return 0
    num_steps = len(problem.segments) * problem.max_budget
    return 5 * _INDEX * num_steps + 6 * _INDEX * len(problem.features)


def _mixing(problem: SegmentedTokens) -> int:
    """Of S⁴ in `segment_kernels`: one kernel more."""
    return _FLOAT * problem.segments.longest**2 if problem.objective.quartic else 0


def _fused(problem: SegmentedTokens, max_kernel_bytes: int, device: torch.device) -> int:
    """Of `greedy_map_fused`, which reads features as they are but for float64."""
    cast = _cast_bytes(problem.features) if problem.features.dtype == torch.float64 else 0
    return cast * problem.features.numel() + fused_bytes(
        len(problem.features),
        len(problem.segments),
        problem.segments.longest,
        problem.max_budget,
        max_kernel_bytes,
    )


def _indices(num_tokens: int) -> int:
    """Of what turns a mask into indices: positions and the sort of these."""
    return 5 * _INDEX * num_tokens


def _segments_at_once(problem: SegmentedTokens, max_kernel_bytes: int) -> int:
    """Of `padded_batches`."""
    within = max_kernel_bytes // (_FLOAT * problem.segments.longest**2)
    return max(1, min(within, len(problem.segments)))


def _padded_kernels(problem: SegmentedTokens, count: int, device: torch.device) -> int:
    """Of `segment_kernels` for `count` segments of `padded_batches`, gathered where unequal."""
    lengths, n = problem.segments.lengths, problem.segments.longest
    batches = range(0, len(problem.segments), count)
    equal = lengths is not None and all(len(set(lengths[i : i + count])) == 1 for i in batches)
    gathered = 0 if equal else problem.features.dtype.itemsize
    bytes_per_feature = gathered + _cast_bytes(problem.features)
    dim = problem.features.shape[1]
    return kernel_bytes(count, n, count * n, dim, device, bytes_per_feature=bytes_per_feature)


def _cast_bytes(features: Tensor) -> int:
    """Of a feature in float32, where it is something else."""
    return 0 if features.dtype == torch.float32 else _FLOAT
