"""The original's names, for code that calls them: the migration path to `keep_indices`.

The names, arguments and results are those of the segment-wise CDPruner code (CDPruner: arXiv
2506.10967), the relevance too: negated attention, min-max normalised over the whole video. What
differs is that exactly `topk` tokens come back whatever the rank of the features.
"""

import logging
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vllm_dpp.pruning.budget import share_by_length, share_by_weight
from vllm_dpp.pruning.checks import is_integer, is_number, require_integer
from vllm_dpp.pruning.dpp.select import SegmentedTokens, select, select_in_kernels
from vllm_dpp.pruning.relevance import normalize_relevance
from vllm_dpp.pruning.segments import Segments, to_device

logger = logging.getLogger(__name__)

SegmentKeepInfo = Mapping[int, float] | Sequence[float]

_MAX_KERNEL_BYTES = 1 << 28
_TEXT = -1  # segment id of what is no visual token


@torch.no_grad()
def global_cdpruner_segment_prune(
    segment_keep_info: SegmentKeepInfo | None,
    segment_mask: Tensor,
    image_features: Tensor,
    last_layer_attention_avg: Tensor,
    topk: int,
) -> Tensor:
    """Keep `topk` of the N visual tokens of a video, a diverse and relevant set in every segment.

    Args:
        segment_keep_info: from segment id (or index) to an int budget, all of which sum to `topk`,
            or to a float weight by which `topk` is shared. What does not fit in its segment is
            shared again. None shares in proportion to length.
        segment_mask: [N'] int, the segment of every token, -1 for text tokens, which are left out.
            Segments need not be contiguous, sorted or of consecutive ids.
        image_features: [N, D] or [1, N, D] float.
        last_layer_attention_avg: [N] or [1, N] float, attention that each visual token receives.
        topk: tokens to keep, in [0, N].

    Returns:
        [topk] int64, ascending, indices into the N visual tokens.

    Raises:
        ValueError: an argument does not fit the others, or is not finite.
    """
    features = _drop_batch("image_features", image_features, 2)
    attention = _drop_batch("last_layer_attention_avg", last_layer_attention_avg, 1)
    _require_finite("last_layer_attention_avg", attention)
    segment_ids = _visual_segments(segment_mask)
    num_tokens = len(features)
    for name, values in (("segment_mask", segment_ids), ("last_layer_attention_avg", attention)):
        if len(values) != num_tokens:
            raise ValueError(
                f"{name} must have one entry for each of the {num_tokens} visual tokens, got "
                f"{len(values)} (segment_mask {list(segment_mask.shape)}, image_features "
                f"{list(image_features.shape)}, last_layer_attention_avg "
                f"{list(last_layer_attention_avg.shape)})"
            )
    require_integer("topk", topk, minimum=0)
    if topk > num_tokens:
        raise ValueError(f"topk must be <= N = {num_tokens}, got {topk}")
    # Segments that lie one after the other, as those of a video do, need no copy of the features.
    in_order = bool((segment_ids.diff() >= 0).all())
    order = None if in_order else segment_ids.argsort(stable=True)
    sorted_ids = segment_ids if order is None else segment_ids[order]
    ids, lengths = (of.tolist() for of in torch.unique_consecutive(sorted_ids, return_counts=True))
    budgets = _budgets(segment_keep_info, ids, lengths, topk)
    for segment, length, budget in zip(ids, lengths, budgets, strict=True):
        logger.debug("segment %d: %d tokens, %d kept", segment, length, budget)
    if topk in (0, num_tokens):
        _require_finite("image_features", features)
        return torch.arange(topk, device=features.device)
    if order is None:
        return _select(features, attention, lengths, budgets).nonzero().squeeze(1)
    order = order.to(features.device)
    keep = _select(features[order], attention[order.to(attention.device)], lengths, budgets)
    return order[keep].sort().values


def _select(features: Tensor, attention: Tensor, lengths: list[int], budgets: list[int]) -> Tensor:
    """[N] bool, True on the tokens kept, of tokens in the order of their segments."""
    relevance = normalize_relevance(attention, "negative", floor=0.0).to(features.device)
    segments = Segments.between([0, *accumulate(lengths)], features.device)
    video = SegmentedTokens(
        features, relevance, segments, to_device(budgets, features.device), max(budgets)
    )
    [selected] = select([video], _MAX_KERNEL_BYTES)
    if not bool(selected.began.all()):
        _require_finite("image_features", features)
    return selected.keep


@torch.no_grad()
def _dpp_sampling_fast(kernel: Tensor, k: int) -> Tensor:
    """Greedy MAP (nothing is sampled) of one kernel.

    Args:
        kernel: [n, n] float, symmetric, positive semi-definite.
        k: tokens to take, in [0, n].

    Returns:
        [<= k] int64 in order of selection; fewer than k where the kernel has a lower rank.

    Raises:
        ValueError: `kernel` is not square or not finite, or `k` lies outside its range.
    """
    if kernel.dim() != 2 or kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"kernel must be [n, n], got shape {list(kernel.shape)}")
    _require_finite("kernel", kernel)
    require_integer("k", k, minimum=0)
    if k > len(kernel):
        raise ValueError(f"k must be <= n = {len(kernel)}, got {k}")
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=kernel.device)
    budgets = to_device([k], kernel.device)
    relevance = kernel.new_ones(1, len(kernel), dtype=torch.float32)
    order: Tensor = select_in_kernels(kernel.float().unsqueeze(0), relevance, budgets).order[0]
    return order[order >= 0]


def _drop_batch(name: str, values: Tensor, dims: int) -> Tensor:
    """`values` without a first dimension of 1, checked to be floats of `dims` dimensions."""
    plain = values[0] if values.dim() == dims + 1 and len(values) == 1 else values
    if plain.dim() != dims or not plain.is_floating_point():
        expected = "[N, D] or [1, N, D]" if dims == 2 else "[N] or [1, N]"
        raise ValueError(
            f"{name} must be {expected} float, got shape {list(values.shape)} of {values.dtype}"
        )
    return plain


def _require_finite(name: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or inf in shape {list(values.shape)}")


def _visual_segments(segment_mask: Tensor) -> Tensor:
    """[N] int64 segment of each visual token."""
    is_float = segment_mask.is_floating_point() or segment_mask.is_complex()
    if segment_mask.dim() != 1 or is_float or segment_mask.dtype == torch.bool:
        raise ValueError(
            "segment_mask must be [N'] int, -1 for text tokens, got shape "
            f"{list(segment_mask.shape)} of {segment_mask.dtype}"
        )
    segment_ids = segment_mask.long()
    segment_ids = segment_ids[segment_ids != _TEXT]
    if bool((segment_ids < _TEXT).any()):
        raise ValueError(f"segment_mask must be >= -1, got {int(segment_ids.min())}")
    return segment_ids


def _budgets(
    info: SegmentKeepInfo | None, ids: list[int], lengths: list[int], topk: int
) -> list[int]:
    """Tokens to keep of each segment, which sum to `topk`."""
    if info is None:
        return share_by_length(topk, lengths)
    by_id = dict(info) if isinstance(info, Mapping) else dict(enumerate(info))
    missing = [segment for segment in ids if segment not in by_id]
    if missing:
        raise ValueError(
            f"segment_keep_info must name every segment of segment_mask, got none for {missing}"
        )
    for segment, value in by_id.items():
        if not is_number(value) or not 0 <= value < float("inf"):
            raise ValueError(
                f"segment_keep_info[{segment}] must be a finite number >= 0, got {value!r}"
            )
    total = sum(by_id.values())
    are_counts = all(is_integer(value) for value in by_id.values())
    if are_counts and total != topk:
        raise ValueError(
            f"int budgets in segment_keep_info must sum to topk = {topk}, got {total}; give float "
            "weights to share topk"
        )
    wanted = [by_id[segment] for segment in ids]
    fits = all(value <= length for value, length in zip(wanted, lengths, strict=True))
    if are_counts and fits and sum(wanted) == topk:  # nothing is left to share
        return [int(value) for value in wanted]
    weights = torch.tensor([float(value) for value in wanted], dtype=torch.float64)
    return [int(share) for share in share_by_weight(topk, weights, torch.tensor(lengths))]
