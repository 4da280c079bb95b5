"""How K lower and L - K upper layers share KV pages, in vLLM's allocator.

A KV block serves one group of layers, so every group must have the same number of layers, and the
smaller kind sets that number (``_get_kv_cache_groups_uniform_page_size`` in
``vllm.v1.core.kv_cache_utils``). Groups that are not full are padded, with memory that nobody uses.
"""


def layers_per_group(num_layers: int, prune_layer: int) -> int:
    """Layers in one KV group when the first ``prune_layer`` of ``num_layers`` hold every token."""
    small, large = sorted((prune_layer, num_layers - prune_layer))
    if small == 0:
        return large
    return large if large < 1.5 * small else small


def wasted_fraction(num_layers: int, prune_layer: int) -> float:
    """Share of the KV pages of a request that padding layers take, before pruning."""
    size = layers_per_group(num_layers, prune_layer)
    padded = sum(-(-n // size) * size for n in (prune_layer, num_layers - prune_layer))
    return 1 - num_layers / padded


def default_prune_layer(num_layers: int) -> int:
    """The layer nearest to half of the depth that wastes no KV pages, at least 1.

    By then a question has looked at most of what it needs, and knows where to look for the rest:
    ``vllm-dpp bench quality``. Ties go to the deeper layer, which makes fewer groups.
    """
    whole = [k for k in range(1, num_layers) if wasted_fraction(num_layers, k) == 0]
    if not whole:
        return 0
    return min(whole, key=lambda k: (abs(2 * k - num_layers), -k))
