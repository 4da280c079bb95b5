"""What pruning leaves of the decoder's work on a video, so that unlike methods can be compared.

Below layer K all tokens are computed and cached, from K on the kept ones: K/L + (1 - K/L) r of the
video's prefill FLOPs and KV bytes is left. (Attention scores, quadratic in the length, are left
out: at the lengths of chats the linear layers dominate.)
"""

KEPT_OF_ENTERED = 1 / 3
"""What the middle stage keeps of what entered, where one number sets both stages, unless everything
enters. A quarter is worse for later questions, half where much happens."""
MOST_BY_QUESTION = 0.2
"""Up to this share it reads the question, where one number sets both stages. Beyond, the question
would tell it nothing, and what is kept serves any question."""


def kv_share(prune_layer: int, num_layers: int, retention_ratio: float) -> float:
    """Share of video KV left with K lower layers of L: K/L + (1 - K/L) r."""
    lower = prune_layer / num_layers
    return lower + (1 - lower) * retention_ratio


def retention_at(share: float, prune_layer: int, num_layers: int) -> float:
    """The retention ratio r at which `share` is left; the inverse of `kv_share`.

    Raises:
        ValueError: the lower layers alone take `share` or more.
    """
    lower = prune_layer / num_layers
    if share <= lower:
        raise ValueError(
            f"layers below {prune_layer} of {num_layers} take {lower:.3f}, not less than {share}"
        )
    return (share - lower) / (1 - lower)


def two_stage_ratios(
    share: float, prune_layer: int, num_layers: int, fraction: float | None = None
) -> tuple[float, float]:
    """What enters the decoder, of the video, and what is kept at layer K, of that.

    Entering tokens take K/L of their cost, kept ones all of it, so that `share` is left where
    r0 (K/L + (1 - K/L) r1) = share. r1 is `KEPT_OF_ENTERED`; where r0 would be more than 1,
    everything enters and more of it is kept.

    Args:
        share: of the video's prefill and KV that may be left, in (0, 1].
        prune_layer: K.
        num_layers: L.
        fraction: another r1, in (0, 1].
    """
    kept = fraction or KEPT_OF_ENTERED
    entering = share / kv_share(prune_layer, num_layers, kept)
    if entering <= 1:
        return entering, kept
    return 1.0, min(1.0, retention_at(share, prune_layer, num_layers))
