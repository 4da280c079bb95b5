"""What K, L and r say about KV blocks and concurrency, to hold against the engine's own counts."""

from dataclasses import asdict, dataclass
from typing import Any

from vllm_dpp.bench.throughput.arms import Arm
from vllm_dpp.pruning.budget import num_kept
from vllm_dpp.serving.layer_groups import layers_per_group


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What an engine says of itself after start-up.

    Args:
        num_blocks: KV blocks of the pool; vLLM keeps one of them as a null block.
        block_size: Tokens in a block.
        group_layers: Layers of each KV group; a block holds one group's layers.
        page_bytes: Bytes of one layer in one block.
        prefix_caching: Whether blocks are cached by content.
        dtype: Of weights and activations.
        device: ``cpu`` or ``cuda``.
        enforce_eager: Whether nothing is compiled or captured.
        load_seconds: Wall time from start to ready.
    """

    num_blocks: int
    block_size: int
    group_layers: tuple[int, ...]
    page_bytes: int
    prefix_caching: bool
    dtype: str
    device: str
    enforce_eager: bool
    load_seconds: float

    @property
    def block_bytes(self) -> int:
        """Bytes of one block. All groups share one pool, so all blocks have the largest's size."""
        return max(self.group_layers) * self.page_bytes

    @property
    def kv_bytes(self) -> int:
        """Bytes of the pool."""
        return self.num_blocks * self.block_bytes


@dataclass(frozen=True, slots=True)
class Prediction:
    """KV that one request needs at the end of its prefill, and what follows from it.

    Args:
        blocks: KV blocks of one request, over all groups.
        kv_bytes: Bytes of them.
        peak_prefilled: Prefilled requests that the pool, ``max_num_seqs`` and the workload allow.
    """

    blocks: int
    kv_bytes: int
    peak_prefilled: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def predict(
    arm: Arm,
    facts: EngineFacts,
    *,
    num_layers: int,
    prompt_tokens: int,
    video_tokens: int,
    video_end: int,
    max_requests: int,
) -> Prediction:
    """Predict an arm from the arithmetic of pruning, without asking the plugin.

    Args:
        arm: Its K, r and input share count.
        facts: Only the block size, page bytes and pool size count.
        num_layers: L.
        prompt_tokens: Of one request before any pruning.
        video_tokens: Among them, of its one video.
        video_end: Tokens of the prompt up to the end of the video.
        max_requests: The smaller of the request count and ``max_num_seqs``.
    """
    size = facts.block_size
    entering = int(video_tokens * arm.input_share + 1e-6)  # EVS rounds down
    if arm.prune_layer is not None:
        entering = num_kept(video_tokens, arm.input_share)
    cut = video_tokens - entering
    full = prompt_tokens - cut
    per_group, lower, upper = num_layers, 1, 0
    compact = full
    if arm.prune_layer is not None:
        per_group = layers_per_group(num_layers, arm.prune_layer)
        lower = _ceil_div(arm.prune_layer, per_group)
        upper = _ceil_div(num_layers - arm.prune_layer, per_group)
        compact -= pruned_tokens(entering, video_end - cut, arm.retention_ratio, _whole(facts))
    blocks = lower * _ceil_div(full, size) + upper * _ceil_div(compact, size)
    block_bytes = per_group * facts.page_bytes
    usable = facts.kv_bytes // block_bytes - 1
    return Prediction(blocks, blocks * block_bytes, min(max_requests, usable // blocks))


def pruned_tokens(
    video_tokens: int, video_end: int, retention_ratio: float, block_size: int | None
) -> int:
    """Tokens that the upper layers lose of one video.

    Where there is a block size, the tokens in the block in which the video ends all stay, and whole
    blocks of the others go.
    """
    if block_size is None:
        return video_tokens - num_kept(video_tokens, retention_ratio)
    eligible = max(0, video_tokens - video_end % block_size)
    pruned = eligible - num_kept(eligible, retention_ratio) if eligible else 0
    return pruned - pruned % block_size


def relative_difference(measured: float, predicted: float) -> float:
    """(measured - predicted) / predicted; 0 where both are 0."""
    if predicted == 0:
        return 0.0 if measured == 0 else float("inf")
    return (measured - predicted) / predicted


def _whole(facts: EngineFacts) -> int | None:
    return facts.block_size if facts.prefix_caching else None


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
