"""How relevant each video token is to the question."""

import torch
from torch import Tensor

from vllm_dpp.pruning.checks import require_choice, require_integer, require_unit_interval

# Attention weights held at once by `question_attention`: 64 MiB of float32.
_MAX_WEIGHTS = 1 << 24


def question_attention(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    total_num_heads: int | None = None,
    max_weights: int = _MAX_WEIGHTS,
) -> Tensor:
    """Attention that the question pays to each video token: the raw relevance.

    A softmax over the video tokens alone, per head and question token, in float32; then the mean
    over question tokens and the sum over heads divided by `total_num_heads`. With all heads given
    the result sums to 1. Ranks that hold some of the heads each pass the total and add results.

    Args:
        query: [Q, H, d] float, question tokens, rotary embedding applied.
        key: [V, Hkv, d] float, video tokens, rotary embedding applied; H is a multiple of Hkv and
            head h reads key head h // (H // Hkv).
        scale: factor of the dot products, usually d ** -0.5.
        total_num_heads: heads over all ranks; H when None.
        max_weights: bound on the number of attention weights held at once; the question is
            handled in chunks to respect it, of one token (H * V weights) at the least.

    Returns:
        [V] float32 raw relevance; zeros when the question is empty.

    Raises:
        ValueError: shapes that do not fit together, or a count below 1.
    """
    _check_heads(query, key)
    num_question, num_heads, head_dim = query.shape
    num_video, num_kv_heads, _ = key.shape
    total = num_heads if total_num_heads is None else total_num_heads
    require_integer("total_num_heads", total, minimum=1)
    require_integer("max_weights", max_weights, minimum=1)
    relevance = torch.zeros(num_video, dtype=torch.float32, device=key.device)
    if num_question == 0 or num_video == 0:
        return relevance
    keys = key.float().permute(1, 2, 0)  # [Hkv, d, V]
    tokens_per_chunk = max(1, max_weights // (num_heads * num_video))
    for chunk in torch.split(query.float(), tokens_per_chunk):
        grouped = (chunk * scale).reshape(len(chunk), num_kv_heads, -1, head_dim).transpose(0, 1)
        logits = grouped.reshape(num_kv_heads, -1, head_dim) @ keys  # [Hkv, q * group, V]
        relevance += logits.softmax(dim=-1).sum(dim=(0, 1))
    return relevance / (num_question * total)


def normalize_relevance(raw: Tensor, sign: str, floor: float) -> Tensor:
    """Bring raw relevance to about [floor, 1], over all tokens given: min-max, then softening.

    `r = (raw - min + 1e-6) / (max - min + 1e-8)` after the sign, then `floor + (1 - floor) * r`.
    Constant input gives a constant far above 1, which changes no selection.

    Args:
        raw: [V] float, raw relevance of the whole video.
        sign: "positive" or "negative", which reverses the order.
        floor: lower end, in [0, 1].

    Returns:
        [V] float32, positive.

    Raises:
        ValueError: `raw` is not [V], or `sign` or `floor` is not as above.
    """
    require_choice("sign", sign, ("positive", "negative"))
    require_unit_interval("floor", floor)
    if raw.dim() != 1:
        raise ValueError(f"raw must be [V], got shape {list(raw.shape)}")
    if raw.numel() == 0:
        return raw.float()
    signed = raw.float() if sign == "positive" else -raw.float()
    low, high = signed.aminmax()
    scaled = (signed - low + 1e-6) / (high - low + 1e-8)
    return floor + (1 - floor) * scaled


def _check_heads(query: Tensor, key: Tensor) -> None:
    """Raise `ValueError` unless query is [Q, H, d], key [V, Hkv, d], H a multiple of Hkv."""
    fits = query.dim() == 3 and key.dim() == 3 and query.shape[2] == key.shape[2]
    if not fits or 0 in (query.shape[1], key.shape[1]) or query.shape[1] % key.shape[1]:
        raise ValueError(
            "query must be [Q, H, d] and key [V, Hkv, d], with H a multiple of Hkv, "
            f"got shapes {list(query.shape)} and {list(key.shape)}"
        )
