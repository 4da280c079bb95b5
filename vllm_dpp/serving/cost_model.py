"""What pruning leaves of the decoder's work on a video, so that unlike methods can be compared.

Below layer K all tokens are computed and cached, from K on the kept ones: K/L + (1 - K/L) r of the
video's prefill FLOPs and KV bytes is left. (Attention scores, quadratic in the length, are left
out: at the lengths of chats the linear layers dominate.)
"""

KEPT_OF_ENTERED = 1 / 3
"""The least that the middle stage keeps of what entered, where one number sets both stages. A
quarter is level for first questions, and worse for later ones."""
MOST_ENTERING = 0.4
"""Of a video, where one number sets both stages: what enters beyond it is worth less than what it
costs the middle stage. A larger share is better left to the first stage alone."""


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
    r0 (K/L + (1 - K/L) r1) = share. r1 is `KEPT_OF_ENTERED` as long as r0 is `MOST_ENTERING` at
    most; then r1 grows up to 1; then r0 is the share.

    Args:
        share: of the video's prefill and KV that may be left, in (0, 1].
        prune_layer: K.
        num_layers: L.
        fraction: another r1, in (0, 1]; where r0 would be more than 1, everything enters and more
            of it is kept.
    """
    entering = share / kv_share(prune_layer, num_layers, fraction or KEPT_OF_ENTERED)
    most = 1.0 if fraction else MOST_ENTERING
    if entering <= most:
        return entering, fraction or KEPT_OF_ENTERED
    entering = max(share, most)
    return entering, min(1.0, retention_at(share / entering, prune_layer, num_layers))
