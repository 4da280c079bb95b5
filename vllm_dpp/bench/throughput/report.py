"""From rounds to numbers, and JSON for machines."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

from vllm_dpp.bench.summary import Spread, percentile, spread
from vllm_dpp.bench.throughput.arms import Arm
from vllm_dpp.bench.throughput.capacity import EngineFacts, Prediction, relative_difference
from vllm_dpp.bench.throughput.drive import Round

Rounds = Sequence[Round]


def ratios(arm: Rounds, stock: Rounds, of: Callable[[Round], float]) -> Spread:
    """``of`` in ``arm`` over ``of`` in ``stock``, round by round, because machines drift."""
    return spread([of(a) / of(s) for a, s in zip(arm, stock, strict=True)])


def paired_ratio(arm: Rounds, stock: Rounds) -> float | None:
    """Time of ``arm`` over that of ``stock``, step against step.

    Of every step the median of its ratio over the rounds, weighed by stock's median time: what
    disturbs the machine in a few steps does not count. It says most where the steps of the arms
    alternate, so that both meet the same machine. ``None`` where they do not take the same steps.
    """
    if len({len(r.step_seconds) for r in [*arm, *stock]}) > 1 or not stock[0].step_seconds:
        return None
    mine, theirs = ([r.step_seconds for r in rounds] for rounds in (arm, stock))
    weights = [median(times) for times in zip(*theirs, strict=True)]
    medians = [
        median(a / s for a, s in zip(ours, times, strict=True))
        for ours, times in zip(zip(*mine, strict=True), zip(*theirs, strict=True), strict=True)
    ]
    return sum(w * r for w, r in zip(weights, medians, strict=True)) / sum(weights)


def equal_share(outputs: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> float:
    """Share of generated tokens that are equal at the same place; 1 where there are none."""
    pairs = [
        a == b
        for mine, theirs in zip(outputs, expected, strict=True)
        for a, b in zip(mine, theirs, strict=True)
    ]
    return fmean(pairs) if pairs else 1.0


def selection_shares(rounds: Rounds) -> dict[str, float] | None:
    """Share of the selection in the decoder passes and in the engine steps that contain one."""
    total = {
        key: sum(r.selection.get(key, 0.0) for r in rounds)
        for key in ("passes", "selection_seconds", "decoder_seconds", "step_seconds")
    }
    if not total["passes"]:
        return None
    seconds = total["selection_seconds"]
    return {
        **total,
        "share_of_decoder": seconds / total["decoder_seconds"],
        "share_of_step": seconds / total["step_seconds"],
    }


def metrics(rounds: Rounds, facts: EngineFacts, sent_prompt_tokens: int) -> dict[str, float]:
    """One arm's numbers: medians over rounds.

    Args:
        rounds: At least one.
        facts: Of the arm's engine.
        sent_prompt_tokens: Prompt tokens of all requests before any pruning, so that an arm which
            shortens prompts is not charged for it.
    """
    count = len(rounds[0].outputs)

    def middle(of: Callable[[Round], float]) -> float:
        return median(map(of, rounds))

    blocks = middle(lambda r: r.blocks_per_request)
    return {
        "requests_per_s": middle(lambda r: count / r.seconds),
        "tokens_per_s": middle(lambda r: (sent_prompt_tokens + r.num_output_tokens) / r.seconds),
        "output_tokens_per_s": middle(lambda r: r.num_output_tokens / r.seconds),
        "ttft_p50_s": middle(lambda r: percentile(r.ttft, 50)),
        "ttft_p99_s": middle(lambda r: percentile(r.ttft, 99)),
        "seconds": middle(lambda r: r.seconds),
        "cpu_seconds": middle(lambda r: r.cpu_seconds),
        "submit_seconds": middle(lambda r: r.submit_seconds),
        "steps": middle(lambda r: r.steps),
        "mean_step_ms": middle(lambda r: r.mean_step_ms),
        "peak_running": middle(lambda r: r.peak_running),
        "peak_prefilled": middle(lambda r: r.peak_prefilled),
        "saturated_running": middle(lambda r: r.saturated_running),
        "preemptions": middle(lambda r: r.preemptions),
        "decoder_prompt_tokens": middle(lambda r: fmean(r.prompt_tokens)),
        "kv_blocks_per_request": blocks,
        "kv_bytes_per_request": blocks * facts.block_bytes,
    }


def against_stock(rounds: Rounds, stock: Rounds) -> dict[str, Any]:
    """Ratios to stock: median, smallest and largest over rounds; and ``paired_ratio``."""
    return {
        "throughput": ratios(stock, rounds, lambda r: r.seconds),
        "seconds": ratios(rounds, stock, lambda r: r.seconds),
        "cpu_seconds": ratios(rounds, stock, lambda r: r.cpu_seconds),
        "mean_step_ms": ratios(rounds, stock, lambda r: r.mean_step_ms),
        "steps": ratios(rounds, stock, lambda r: r.steps),
        "paired_steps": paired_ratio(rounds, stock),
    }


def capacity_rows(measured: Mapping[str, float], predicted: Prediction) -> dict[str, Any]:
    """Predicted and counted, with the relative difference of each."""
    pairs = {
        "kv_blocks_per_request": predicted.blocks,
        "kv_bytes_per_request": predicted.kv_bytes,
        "peak_prefilled": predicted.peak_prefilled,
    }
    return {
        key: {
            "predicted": value,
            "counted": measured[key],
            "difference": relative_difference(measured[key], value),
        }
        for key, value in pairs.items()
    }


def arm_as_json(arm: Arm, facts: EngineFacts, rounds: Rounds) -> dict[str, Any]:
    """The raw material of one arm; outputs are left out."""
    raw = [{k: v for k, v in asdict(r).items() if k != "outputs"} for r in rounds]
    return {"arm": asdict(arm), "engine": asdict(facts), "rounds": raw}
