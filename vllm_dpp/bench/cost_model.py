"""What pruning leaves of the decoder's work on a video, so that unlike methods can be compared.

Below layer K all tokens are computed and cached, from K on the kept ones: K/L + (1 - K/L) r of the
video's prefill FLOPs and KV bytes is left. (Attention scores, quadratic in the length, are left
out: at the lengths of chats the linear layers dominate.)
"""


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
