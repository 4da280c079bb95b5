"""What the engine knows of a request that loses tokens."""

from dataclasses import dataclass

from vllm_dpp.serving.engine.compact_hashes import CompactHashes
from vllm_dpp.serving.plan import PrunePlan
from vllm_dpp.serving.request_plan import RequestOptions


@dataclass(slots=True)
class PlannedRequest:
    """One request, from its arrival to its end.

    Args:
        prompt_plan: What its prompt says.
        options: What it asked for.
        hashes: Names of its compact blocks; ``None`` where prefix caching is off.
        plan: ``prompt_plan`` after the last look-up in the prefix cache.
        num_allocated: Tokens that its blocks were last allocated for.
    """

    prompt_plan: PrunePlan
    options: RequestOptions
    hashes: CompactHashes | None
    plan: PrunePlan
    num_allocated: int = 0

    def start_at(self, num_cached: int) -> None:
        """The request starts, or starts again, with this many tokens from the prefix cache."""
        self.plan = self.prompt_plan.after_hit(num_cached)

    def compact_length(self, num_tokens: int) -> int:
        return self.plan.compact_length(num_tokens)

    def num_full_blocks(self, num_tokens: int, block_size: int) -> int:
        """Compact blocks that are full when those of the first ``num_tokens`` tokens may be cached.

        vLLM caches up to a block's end, which may lie before a decision point that the request
        has passed; what matters is whether it has.
        """
        if self.num_allocated >= self.plan.end:
            return (num_tokens - self.plan.num_pruned) // block_size
        if self.plan.turn_at(self.num_allocated) is not None:
            return self.compact_length(self.num_allocated) // block_size
        pruned = self.num_allocated - self.compact_length(self.num_allocated)
        return (num_tokens - pruned) // block_size
