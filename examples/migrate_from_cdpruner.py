"""From a CDPruner-style loop to `vllm_dpp.pruning`: the same tokens, one call. Needs torch alone.

python examples/migrate_from_cdpruner.py
"""

import time

import torch

from vllm_dpp.pruning.cdpruner import global_cdpruner_segment_prune

NUM_TOKENS, DIM, NUM_SEGMENTS, TOPK = 1024, 4096, 8, 512


def prune_with_a_loop(
    budgets: list[int], mask: torch.Tensor, features: torch.Tensor, attention: torch.Tensor
) -> torch.Tensor:
    """What such code looks like: one kernel of all tokens, then a step in Python per token kept."""
    unit = features / (features.norm(dim=-1, keepdim=True) + 1e-8)
    relevance = (-attention + attention.max() + 1e-6) / (attention.max() - attention.min() + 1e-8)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance[None, :]
    kept = []
    for segment, budget in enumerate(budgets):
        tokens = (mask == segment).nonzero().flatten()
        part = kernel[tokens][:, tokens]
        gain, rows = part.diagonal().clone(), part.new_zeros(budget, len(tokens))
        for step in range(budget):
            best = int(gain.argmax())
            row = (part[best] - rows[:step, best] @ rows[:step]) / gain[best].sqrt()
            rows[step], gain = row, gain - row.square()
            gain[best] = -torch.inf
            kept.append(tokens[best])
    return torch.stack(kept).sort().values


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(NUM_TOKENS, DIM, generator=generator)
    attention = torch.rand(NUM_TOKENS, generator=generator)
    mask = torch.arange(NUM_SEGMENTS).repeat_interleave(NUM_TOKENS // NUM_SEGMENTS)
    budgets = [TOPK // NUM_SEGMENTS] * NUM_SEGMENTS
    seconds, kept = {}, {}
    for _ in range(3):  # the last one counts: the first compiles
        for name, prune in {
            "loop": lambda: prune_with_a_loop(budgets, mask, features, attention),
            "call": lambda: global_cdpruner_segment_prune(budgets, mask, features, attention, TOPK),
        }.items():
            started = time.perf_counter()
            kept[name] = prune()
            seconds[name] = time.perf_counter() - started
    same = torch.equal(kept["loop"], kept["call"])
    print(f"{TOPK} of {NUM_TOKENS} tokens kept, the same ones: {same}")
    print("  ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds.items()))
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
