"""Whether an arm of the pruner benchmark selects what the float64 reference selects."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_dpp.bench.pruner.problem import Case, Problem
from vllm_dpp.pruning import naive_greedy_map
from vllm_dpp.pruning.naive import OF_CHANGE, change_quality, mixed

NEAR_TIE = 1e-5  # gains that differ by less, as a fraction, may be taken either way
_STEPS_TRIED_A_TOKEN = 100  # before a set is called wrong
# The reference reads a kernel of n x n in each of k steps: about 5e7 entries in a second.
_ENTRIES_OF_A_CASE = 1e8
_ENTRIES_OF_A_SEGMENT = 4e9


@dataclass(frozen=True)
class Verdict:
    """What the judge found.

    Args:
        fault: what is wrong, None if nothing is.
        near_ties: judged segments whose tokens differ from the reference's by a near-tie alone.
    """

    fault: str | None
    near_ties: int = 0


@dataclass(frozen=True)
class _Expected:
    """The reference's answer for one segment: its kernel, [n, n] float64, and [k] tokens."""

    segment: int
    kernel: Tensor
    tokens: set[int]


class Judge:
    """Judges answers to one problem on a random sample of its segments.

    Args:
        problem: what was asked.
        seed: of the sample.
        rule: by which rule of `pruning.rules`, "dpp" or "change".
    """

    def __init__(self, problem: Problem, seed: int, rule: str = "dpp") -> None:
        self._case = problem.case
        chosen = random.Random(seed).sample(
            range(problem.case.num_segments), num_judged(problem.case)
        )
        if rule == "change":
            quality, quartic = (
                change_quality(problem.features.cpu(), self._case.tokens_per_segment),
                OF_CHANGE,
            )
        else:
            quality, quartic = _relevance(problem), problem.settings.quartic
        self._expected = [_expect(problem, quality, quartic, segment) for segment in sorted(chosen)]

    @property
    def num_segments(self) -> int:
        """Segments in the sample."""
        return len(self._expected)

    def verdict(self, keep: Tensor) -> Verdict:
        """Judge [num_kept] int64 indices: form and budgets everywhere, tokens in the sample."""
        fault = self._fault_of_form(keep)
        if fault is not None:
            return Verdict(fault)
        near_ties = 0
        by_segment = keep.cpu().view(self._case.num_segments, -1) % self._case.tokens_per_segment
        for expected in self._expected:
            tokens = set(by_segment[expected.segment].tolist())
            if tokens == expected.tokens:
                continue
            if fault := _fault_of_tokens(expected, tokens):
                return Verdict(f"segment {expected.segment}: {fault}")
            near_ties += 1
        return Verdict(None, near_ties)

    def _fault_of_form(self, keep: Tensor) -> str | None:
        case = self._case
        if keep.dtype != torch.int64 or keep.shape != (case.num_kept,):
            return f"{case.num_kept} int64 indices wanted, got {list(keep.shape)} of {keep.dtype}"
        indices = keep.cpu()
        if bool((indices.diff() <= 0).any()):
            return "indices are not ascending and distinct"
        segment_ids = torch.arange(case.num_segments).repeat_interleave(case.kept_per_segment)
        if not torch.equal(indices // case.tokens_per_segment, segment_ids):
            return f"not every segment keeps its {case.kept_per_segment} tokens"
        return None


def num_judged(case: Case) -> int:
    """Segments of a case that the reference can afford, at least 1.

    Raises:
        ValueError: the reference would take minutes for one.
    """
    entries = case.tokens_per_segment**2 * case.kept_per_segment
    if entries > _ENTRIES_OF_A_SEGMENT:
        raise ValueError(
            f"{case}: the reference is too slow for such segments, and nothing is timed that is "
            "not checked; make segments or retention ratio smaller"
        )
    return max(1, min(case.num_segments, int(_ENTRIES_OF_A_CASE / entries)))


def _relevance(problem: Problem) -> Tensor:
    """[N] float64, normalised as the contract says and not by the code that is judged."""
    settings = problem.settings
    raw = problem.raw_relevance.cpu().double()
    if settings.relevance_sign == "negative":
        raw = -raw
    scaled = (raw - raw.min() + 1e-6) / (raw.max() - raw.min() + 1e-8)
    return settings.relevance_floor + (1 - settings.relevance_floor) * scaled


def _expect(problem: Problem, quality: Tensor, quartic: float, segment: int) -> _Expected:
    rows = problem.by_segment[segment].cpu().double()
    unit = rows / (rows.norm(dim=1, keepdim=True) + 1e-8)
    weights = quality.view(problem.case.num_segments, -1)[segment]
    kernel = weights[:, None] * mixed(unit @ unit.T, quartic) * weights[None, :]
    tokens = naive_greedy_map(kernel, problem.case.kept_per_segment, weights.tolist())
    return _Expected(segment, kernel, set(tokens))


def _fault_of_tokens(expected: _Expected, tokens: set[int]) -> str | None:
    """Why `tokens`, which differ from the reference's, are more than near-ties away."""
    shortfall = largest_shortfall(expected.kernel, tokens)
    if shortfall >= NEAR_TIE:
        return f"a token taken has a gain {shortfall:.1e} below the best there was"
    return None


def largest_shortfall(kernel: Tensor, tokens: set[int]) -> float:
    """How far greedy steps among `tokens` fall short of the best gain of all; a fraction.

    Each step takes the best of them that is left. Where several nearly tie, each is tried in turn:
    a set is greedy's if it is so in any of these orders.

    Args:
        kernel: [n, n] float64.
        tokens: what was selected, in any order.
    """
    least = 1.0
    # Ways on, the best last: the kernel given the tokens taken, those, and their shortfall.
    ways: list[tuple[Tensor, list[int], float]] = [(kernel, [], 0.0)]
    for _ in range(_STEPS_TRIED_A_TOKEN * (1 + len(tokens))):
        if not ways or least < NEAR_TIE:
            break
        rest, taken, worst = ways.pop()
        if taken:
            column = rest[:, taken[-1]]
            rest = rest - torch.outer(column, column) / column[taken[-1]]
        left = [token for token in tokens if token not in taken]
        if not left:
            least = min(least, worst)
            continue
        gains = rest.diagonal().clone()
        gains[taken] = -torch.inf
        highest, own = float(gains.max()), float(gains[left].max())
        worst = max(worst, 1 - own / highest)
        if worst < least:
            nearly = [token for token in left if float(gains[token]) > own - NEAR_TIE * highest]
            nearly.sort(key=lambda token: float(gains[token]))
            ways += [(rest, [*taken, token], worst) for token in nearly]
    return least
