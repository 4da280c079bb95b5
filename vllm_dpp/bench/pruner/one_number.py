"""The original's own benchmark by its own name: one number for `global_cdpruner_segment_prune`.

`vllm-dpp bench pruner` compares that call with others; this is for code that calls it so.
"""

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_dpp.bench.help import HelpFormatter
from vllm_dpp.pruning.cdpruner import global_cdpruner_segment_prune
from vllm_dpp.pruning.checks import require_integer


def benchmark_dpp_pruning(
    batch_size: int = 1,
    num_tokens: int = 1024,
    hidden_dim: int = 4096,
    num_segments: int = 8,
    tokens_per_segment: int = 128,
    topk_per_segment: int = 64,
    device: str | torch.device = "cpu",
    num_iterations: int = 10,
) -> tuple[list[Tensor], float]:
    """Time `global_cdpruner_segment_prune` on random videos of equal segments.

    Args:
        batch_size: videos, selected one after the other.
        num_tokens: N, which must be `num_segments * tokens_per_segment`.
        hidden_dim: D.
        num_segments: segments of a video.
        tokens_per_segment: tokens of each.
        topk_per_segment: tokens kept of each.
        device: where to run.
        num_iterations: timed repetitions, >= 1, after one that is not timed.

    Returns:
        Per video the [num_segments * topk_per_segment] int64 tokens kept, and the average time of
        a batch in milliseconds.

    Raises:
        ValueError: a number is below 1, or they do not fit together.
    """
    for name, value in list(locals().items()):
        if name != "device":
            require_integer(name, value, minimum=1)
    if num_tokens != num_segments * tokens_per_segment:
        raise ValueError(
            f"num_tokens must be num_segments * tokens_per_segment = "
            f"{num_segments * tokens_per_segment}, got {num_tokens}"
        )
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch_size, num_tokens, hidden_dim, generator=generator).to(device)
    attention = torch.rand(batch_size, num_tokens, generator=generator).to(device)
    mask = torch.arange(num_segments).repeat_interleave(tokens_per_segment).to(device)
    budgets = [topk_per_segment] * num_segments
    seconds = 0.0
    for iteration in range(num_iterations + 1):
        started = _now(features.device)
        kept = [
            global_cdpruner_segment_prune(budgets, mask, x, a, sum(budgets))
            for x, a in zip(features, attention, strict=True)
        ]
        seconds += (_now(features.device) - started) * (iteration > 0)
    return kept, 1000 * seconds / num_iterations


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main(argv: Sequence[str] | None = None) -> int:
    """`benchmark_dpp_pruning` as a command; its arguments are the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_dpp.bench.pruner.one_number",
        formatter_class=HelpFormatter,
    )
    defaults = benchmark_dpp_pruning.__defaults__ or ()
    names = benchmark_dpp_pruning.__code__.co_varnames[: len(defaults)]
    for name, value in zip(names, defaults, strict=True):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(value), default=value, help=" ")
    given = vars(parser.parse_args(argv))
    kept, milliseconds = benchmark_dpp_pruning(**given)
    print(f"{milliseconds:.3f} ms on average, {len(kept[0])} of {given['num_tokens']} tokens kept")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
