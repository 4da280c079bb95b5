"""Which prune layers waste KV pages; checked against vLLM's own grouping."""

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests.vllm_names import groups_of_uniform_pages, groups_of_worker
from vllm_dpp.serving.cost_model import KEPT_OF_ENTERED, two_stage_ratios
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


def specs_of(num_layers, layer):
    full = FullAttentionSpec(**PAGE)
    specs = {f"{i}": full for i in range(layer)}
    return specs | {f"{i}": CompactAttentionSpec.like(full) for i in range(layer, num_layers)}


@pytest.mark.parametrize("num_layers", [5, 6, 28, 36])
def test_agrees_with_vllm(num_layers):
    for layer in range(1, num_layers):
        groups = groups_of_uniform_pages(specs_of(num_layers, layer))
        size = max(len(group.layer_names) for group in groups)
        assert size == layers_per_group(num_layers, layer)
        assert 1 - num_layers / (size * len(groups)) == pytest.approx(
            wasted_fraction(num_layers, layer)
        )


@pytest.mark.parametrize(("stages", "least"), [(1, 0.99), (2, 1.8), (4, 1.8)])
@pytest.mark.parametrize("num_layers", [28, 36])
def test_a_pipeline_holds_more_for_a_middle_stage_than_it_saves(num_layers, stages, least):
    """Why it is refused. A block of any group takes memory on every stage of a pipeline, and the
    layers below K are all on the first ones: so a share costs nearly twice the KV of the same share
    taken before the decoder, wherever the middle stage stands.
    """
    share, per_stage = 0.2, num_layers // stages
    for layer in (k for k in range(2, num_layers) if wasted_fraction(num_layers, k) == 0):
        specs = specs_of(num_layers, layer)
        groups = groups_of_uniform_pages(specs)
        entry, kept = two_stage_ratios(share, layer, num_layers, KEPT_OF_ENTERED)
        blocks = sum(
            entry * (kept if isinstance(group.kv_cache_spec, CompactAttentionSpec) else 1)
            for group in groups
        )
        held = []
        for first in range(0, num_layers, per_stage):
            own = {f"{i}": specs[f"{i}"] for i in range(first, first + per_stage)}
            largest = max(len(group.layer_names) for group in groups_of_worker(groups, own))
            held.append(blocks * largest / per_stage)
        assert max(held) >= least * share, layer
