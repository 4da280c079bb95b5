"""The float64 reference: plain loops that follow the definitions, never optimised.

It shares no code with the fast path but the rank tolerance. The marginal gain of a token is read
off the Schur complement of the kernel on the tokens taken so far, not off Cholesky rows.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_dpp.pruning.dpp.objective import RANK_TOLERANCE

if TYPE_CHECKING:  # the reference must not depend on what it judges
    from vllm_dpp.pruning.config import PruningConfig
    from vllm_dpp.pruning.video import VideoTokens


OF_CHANGE = 0.1
"""Share of S⁴ in the similarity of the rule "change"."""

# Gains this close, as a fraction of the largest initial gain, are a tie: the epsilon of the unit
# rows alone moves the gains of equally relevant tokens by about as much.
_TIE = 1e-7
# Remainders of shares, in tokens, that are equal: weights are sums of what float32 has rounded.
_EQUAL_SHARES = 1e-6


def naive_greedy_map(
    kernel: Tensor, k: int, relevance: Sequence[float], least_gain: float = RANK_TOLERANCE
) -> list[int]:
    """Greedy MAP on one kernel, then a fill by relevance up to exactly `k` tokens.

    Args:
        kernel: [n, n] float, symmetric, positive semi-definite.
        k: tokens to take, in [0, n].
        relevance: n values; they order the fill only.
        least_gain: of the largest initial gain; what gains no more is left to the fill.

    Returns:
        k distinct tokens in order of selection; ties go to the lowest index.

    Raises:
        ValueError: `kernel` is not square or `k` lies outside [0, n].
    """
    if kernel.dim() != 2 or kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"kernel must be [n, n], got shape {list(kernel.shape)}")
    n = len(kernel)
    if not 0 <= k <= n:
        raise ValueError(f"k must be in [0, {n}], got {k}")
    selected = [token for token, _ in _greedy_steps(kernel, k, least_gain)]
    return _filled(selected, k, relevance)


def _greedy_steps(kernel: Tensor, k: int, least_gain: float) -> list[tuple[int, float]]:
    """Up to `k` tokens and their gains."""
    rest = kernel.double().clone()
    largest = max(rest.diagonal().tolist(), default=0.0)
    steps: dict[int, float] = {}
    while len(steps) < k:
        gains = rest.diagonal().tolist()
        best = _best([i for i in range(len(kernel)) if i not in steps], gains, _TIE * largest)
        if gains[best] <= least_gain * largest:
            break
        steps[best] = gains[best]
        rest = rest - torch.outer(rest[:, best], rest[best, :]) / rest[best, best]
    return list(steps.items())


def _filled(selected: list[int], k: int, worth: Sequence[float]) -> list[int]:
    """`k` tokens: those selected, then others of the largest worth."""
    filled = list(selected)
    while len(filled) < k:
        filled.append(_best([i for i in range(len(worth)) if i not in filled], worth))
    return filled


def naive_keep_indices(videos: Sequence["VideoTokens"], config: "PruningConfig") -> list[list[int]]:
    """What `keep_indices` computes, per video a list of ascending token indices.

    Raises:
        ValueError: the rule is neither "dpp" nor "change".
    """
    return [_keep_video(video, config) for video in videos]


def naive_kernels(
    video: "VideoTokens", config: "PruningConfig"
) -> list[tuple[list[int], list[float], Tensor]]:
    """What greedy MAP reads: each segment's n tokens, their quality, and [n, n] float64 kernel.

    Raises:
        ValueError: the rule is neither "dpp" nor "change".
    """
    if config.rule not in ("dpp", "change"):
        raise ValueError(f"the reference knows the rules 'dpp' and 'change', got {config.rule!r}")
    features = video.features.double()
    tokens_per_slice = (len(features) + video.num_tail) // video.num_slices
    if config.rule == "change":
        quality, quartic = change_quality(features, tokens_per_slice).tolist(), OF_CHANGE
    else:
        quality, quartic = _relevance(video, config), config.quartic
    found = []
    for segment in _segments(features, tokens_per_slice, video.num_slices, config):
        own = [quality[i] for i in segment]
        found.append((segment, own, _kernel(features[segment], own, quartic)))
    return found


def _keep_video(video: "VideoTokens", config: "PruningConfig") -> list[int]:
    segments, qualities, kernels = zip(*naive_kernels(video, config), strict=True)
    lengths = [len(segment) for segment in segments]
    weights = [float(length) for length in lengths]
    if config.budget == "relevance":
        weights = [math.fsum(quality) for quality in qualities]
    elif config.budget == "spectrum":
        weights = [_spectral_mass(kernel) for kernel in kernels]
    budgets = naive_shares(video.num_kept, weights, lengths)
    least_gain = RANK_TOLERANCE
    if config.rule == "change":  # what adds next to nothing is taken in order of time
        qualities, least_gain = tuple([0.0] * length for length in lengths), 0.005
    if config.budget == "gains":
        most = [
            min(video.num_kept, length, budget + math.ceil(length / 8))
            for length, budget in zip(lengths, budgets, strict=True)
        ]
        steps = [_greedy_steps(*each, least_gain) for each in zip(kernels, most, strict=True)]
        of_all = _largest_gains(steps, video.num_kept)
        chosen = [segments[segment][token] for segment, token in of_all]
        worth = [0.0] * len(video.features)
        for segment, quality in zip(segments, qualities, strict=True):
            for token, value in zip(segment, quality, strict=True):
                worth[token] = value
        return sorted(_filled(chosen, video.num_kept, worth))
    keep: list[int] = []
    for segment, quality, kernel, budget in zip(segments, qualities, kernels, budgets, strict=True):
        keep += [segment[i] for i in naive_greedy_map(kernel, budget, quality, least_gain)]
    return sorted(keep)


def _largest_gains(
    steps: Sequence[Sequence[tuple[int, float]]], total: int
) -> list[tuple[int, int]]:
    """Segment and token of up to `total` steps, the largest gain of all segments first."""
    largest = max((gain for own in steps for _, gain in own), default=0.0)
    taken = [0] * len(steps)
    chosen: list[tuple[int, int]] = []
    while len(chosen) < min(total, sum(map(len, steps))):
        left = [s for s in range(len(steps)) if taken[s] < len(steps[s])]
        gains = {s: steps[s][taken[s]][1] for s in left}
        best = _best(left, gains, _TIE * largest)
        chosen.append((best, steps[best][taken[best]][0]))
        taken[best] += 1
    return chosen


def naive_shares(total: int, weights: Sequence[float], lengths: Sequence[int]) -> list[int]:
    """Share `total` by weight in exact fractions: fill up segments, then largest remainder.

    Segments of weight 0 share, by length, what is left once all others are full.
    """
    exact = _fill_up(Fraction(total), [Fraction(weight) for weight in weights], lengths)
    unweighted = [lengths[i] if weights[i] <= 0 else 0 for i in range(len(lengths))]
    left = total - sum(exact, Fraction(0))
    rest = _fill_up(left, [Fraction(length) for length in unweighted], unweighted)
    exact = [share + more for share, more in zip(exact, rest, strict=True)]
    shares = [math.floor(share) for share in exact]
    while sum(shares) < total:
        remainders = [float(share - floor) for share, floor in zip(exact, shares, strict=True)]
        shares[_best(list(range(len(shares))), remainders, _EQUAL_SHARES)] += 1
    return shares


def _fill_up(
    total: Fraction, weights: Sequence[Fraction], lengths: Sequence[int]
) -> list[Fraction]:
    """Share `total` by weight; whoever is full stops, and the others share what is left."""
    shares = [Fraction(0) for _ in lengths]
    unfilled = [i for i in range(len(lengths)) if weights[i] > 0 and lengths[i] > 0]
    while unfilled:
        level = total / sum(weights[i] for i in unfilled)
        full = [i for i in unfilled if level * weights[i] >= lengths[i]]
        if not full:
            for i in unfilled:
                shares[i] = level * weights[i]
            break
        for i in full:
            shares[i] = Fraction(lengths[i])
            total -= lengths[i]
        unfilled = [i for i in unfilled if i not in full]
    return shares


def _best(
    candidates: Sequence[int], values: Sequence[float] | dict[int, float], tie: float = 0.0
) -> int:
    """The first of `candidates` whose value is within `tie` of the largest."""
    largest = max(values[i] for i in candidates)
    return next(i for i in candidates if values[i] >= largest - tie)


def _relevance(video: "VideoTokens", config: "PruningConfig") -> list[float]:
    if video.raw_relevance is None or config.relevance == "none":
        last = video.num_last
        if last is None:
            last = max(
                0, (len(video.features) + video.num_tail) // video.num_slices - video.num_tail
            )
        others = len(video.features) - last
        return [1.0] * others + [float(config.last_slice_weight)] * last
    sign = 1.0 if config.relevance_sign == "positive" else -1.0
    raw = [sign * value for value in video.raw_relevance.double().tolist()]
    if not raw:
        return []
    low, high = min(raw), max(raw)
    floor = config.relevance_floor
    return [floor + (1 - floor) * (v - low + 1e-6) / (high - low + 1e-8) for v in raw]


def _segments(
    features: Tensor, tokens_per_slice: int, num_slices: int, config: "PruningConfig"
) -> list[list[int]]:
    """The tokens of each segment, of those that are there: a tail of the video is not."""
    if config.segment_by == "slices":
        return _by_slices(len(features), tokens_per_slice, num_slices, config)
    cuts = {t * tokens_per_slice for t in _cuts(features, tokens_per_slice, num_slices, config)}
    segments: list[list[int]] = [[]]
    for i in range(len(features)):
        if i in cuts:
            segments.append([])
        segments[-1].append(i)
    return segments


def _by_slices(
    num_tokens: int, tokens_per_slice: int, num_slices: int, config: "PruningConfig"
) -> list[list[int]]:
    """Runs of slices, or the same part of each of four where these have more tokens than may be."""
    most = config.max_segment_tokens or math.inf
    slices, parts = min(config.slices_per_segment, num_slices), 1
    while slices > 4 and slices * tokens_per_slice > most:
        slices -= 1
    slices = int(min(slices, most))
    while slices * math.ceil(tokens_per_slice / parts) > most:
        parts += 1
    segments: dict[tuple[int, int], list[int]] = {}
    for i in range(num_tokens):
        t, cell = divmod(i, tokens_per_slice)
        part = max(b for b in range(parts) if b * tokens_per_slice // parts <= cell)
        segments.setdefault((t // slices, part), []).append(i)
    return [segments[key] for key in sorted(segments)] or [[]]


def _cuts(
    features: Tensor, tokens_per_slice: int, num_slices: int, config: "PruningConfig"
) -> list[int]:
    """The slices at which a new segment starts, without the first."""
    if config.segment_by == "count":
        count = min(config.num_segments, num_slices)
        return [segment * num_slices // count for segment in range(1, count)]
    if config.segment_by == "one":
        return []
    means = [part.mean(dim=0) for part in torch.split(features, tokens_per_slice)]
    cosines = []
    for before, after in zip(means[:-1], means[1:], strict=True):
        lengths = (before.norm() + 1e-8) * (after.norm() + 1e-8)
        cosines.append(float(before @ after / lengths))
    by_similarity = sorted(range(len(cosines)), key=lambda t: cosines[t])
    return [t + 1 for t in by_similarity[: config.num_segments - 1]]


def change_quality(features: Tensor, tokens_per_slice: int) -> Tensor:
    """How unlike all of the slice before: [N] float64 in [0.2, 1] of [N, D] features."""
    unit = [row / (row.norm() + 1e-8) for row in features.double()]
    later = []
    for token in range(tokens_per_slice, len(features)):
        start = (token // tokens_per_slice - 1) * tokens_per_slice
        before = unit[start : start + tokens_per_slice]
        distance = 1 - max(float(unit[token] @ other) for other in before)
        later.append(math.sqrt(max(0.0, distance - 1e-5)))
    first = [max(later, default=1.0)] * min(tokens_per_slice, len(features))
    change = first + later
    low, high = min(change), max(change)
    quality = [0.2 + 0.8 * (value - low) / max(high - low, 0.05) for value in change]
    return torch.tensor(quality, dtype=torch.float64)


def _spectral_mass(kernel: Tensor) -> float:
    """The expected size of a set drawn from the DPP, from the eigenvalues of its kernel."""
    eigenvalues = torch.linalg.eigvalsh(kernel).clamp(min=0).tolist()
    return math.fsum(value / (1 + value) for value in eigenvalues)


def mixed(similarity: Tensor, quartic: float) -> Tensor:
    """(1 - s) S + s S⁴, elementwise, of S [n, n]; s is `quartic`."""
    return (1 - quartic) * similarity + quartic * similarity**4


def _kernel(features: Tensor, quality: list[float], quartic: float = 0.0) -> Tensor:
    """L = diag(q) S diag(q) of some tokens, [n, n] float64; S is `mixed`."""
    unit = torch.stack([row / (row.norm() + 1e-8) for row in features])
    diagonal = torch.diag(torch.tensor(quality, dtype=torch.float64))
    return diagonal @ mixed(unit @ unit.T, quartic) @ diagonal
