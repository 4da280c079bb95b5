"""Which prune layers waste KV pages; checked against vLLM's own grouping."""

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.vllm_names import groups_of_uniform_pages
from vllm_dpp.serving.engine.kv_cache import CompactAttentionSpec
from vllm_dpp.serving.layer_groups import default_prune_layer, layers_per_group, wasted_fraction

PAGE = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}


@pytest.mark.parametrize(
    ("num_layers", "layer"),
    [(28, 14), (36, 18), (80, 40), (6, 3), (12, 6), (9, 6), (2, 1), (7, 6), (1, 0)],
)
def test_defaults(num_layers, layer):
    assert default_prune_layer(num_layers) == layer
    assert wasted_fraction(num_layers, layer) == 0


@pytest.mark.parametrize(
    ("layer", "waste"), [(0, 0), (7, 0), (14, 0), (4, 0), (12, 4 / 32), (16, 4 / 32), (11, 5 / 33)]
)
def test_waste_of_28_layers(layer, waste):
    assert wasted_fraction(28, layer) == pytest.approx(waste)


@pytest.mark.parametrize("num_layers", [5, 6, 28, 36])
def test_agrees_with_vllm(num_layers):
    for layer in range(1, num_layers):
        full = FullAttentionSpec(**PAGE)
        specs = {f"{i}": full for i in range(layer)}
        specs |= {f"{i}": CompactAttentionSpec.like(full) for i in range(layer, num_layers)}
        groups = groups_of_uniform_pages(specs)
        size = max(len(group.layer_names) for group in groups)
        assert size == layers_per_group(num_layers, layer)
        assert 1 - num_layers / (size * len(groups)) == pytest.approx(
            wasted_fraction(num_layers, layer)
        )
