import math
from dataclasses import FrozenInstanceError, dataclass

import pytest

from vllm_dpp.pruning import PruningConfig


@dataclass(frozen=True, kw_only=True)
class WiderConfig(PruningConfig):
    layer: int = 1


def test_defaults():
    config = PruningConfig()
    assert (config.rule, config.segment_by, config.slices_per_segment) == ("dpp", "slices", 16)
    assert (config.relevance, config.relevance_sign, config.relevance_floor) == (
        "question",
        "positive",
        0.6,
    )
    assert (config.num_segments, config.budget) == (4, "length")


def test_frozen_and_keyword_only():
    with pytest.raises(FrozenInstanceError):
        PruningConfig().relevance_floor = 0.5
    with pytest.raises(TypeError):
        PruningConfig(0.5)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("segment_by", "frames", r"segment_by must be one of 'slices', 'count', 'scene', 'one'"),
        ("segment_by", ["one"], r"segment_by must be one of .* got \['one'\]"),
        ("slices_per_segment", 0, r"slices_per_segment must be an integer >= 1, got 0"),
        ("max_segment_tokens", 0, r"max_segment_tokens must be an integer >= 1, got 0"),
        ("slices_per_segment", 2.0, r"slices_per_segment must be an integer >= 1, got 2\.0"),
        ("num_segments", True, r"num_segments must be an integer >= 1, got True"),
        ("num_segments", -3, r"num_segments must be an integer >= 1, got -3"),
        ("relevance", "attention", r"relevance must be one of 'question', 'none', got 'attention'"),
        ("relevance_sign", 1, r"relevance_sign must be one of 'positive', 'negative', got 1"),
        ("relevance_floor", -0.1, r"relevance_floor must be a number in \[0, 1\], got -0\.1"),
        ("quartic", 1.5, r"quartic must be a number in \[0, 1\], got 1\.5"),
        ("quartic", 1, "quartic must be below 1"),
        ("last_slice_weight", 0.5, r"last_slice_weight must be a number >= 1, got 0\.5"),
        ("last_slice_weight", math.inf, r"last_slice_weight must be a number >= 1, got inf"),
        ("relevance_floor", math.inf, r"relevance_floor must be a number in \[0, 1\], got inf"),
        ("projection_dim", 0, r"projection_dim must be an integer >= 1, got 0"),
        ("max_kernel_bytes", 0.5, r"max_kernel_bytes must be an integer >= 1, got 0\.5"),
        ("budget", "", r"budget must be one of 'length', 'relevance', 'spectrum', 'gains', got ''"),
    ],
)
def test_bad_values(field, value, message):
    with pytest.raises(ValueError, match=message):
        PruningConfig(**{field: value})
    with pytest.raises(ValueError, match=message):
        WiderConfig.from_mapping({field: value})


@pytest.mark.parametrize("field,value", [("relevance_floor", 1), ("relevance_floor", 0)])
def test_range_ends(field, value):
    assert getattr(PruningConfig(**{field: value}), field) == value


def test_from_mapping():
    config = PruningConfig.from_mapping({"relevance_floor": 0.5, "segment_by": "one"})
    assert config == PruningConfig(relevance_floor=0.5, segment_by="one")


def test_from_mapping_of_a_subclass():
    config = WiderConfig.from_mapping({"layer": 3, "budget": "relevance"})
    assert config == WiderConfig(layer=3, budget="relevance")
    with pytest.raises(ValueError, match="unknown PruningConfig keys: 'layer'"):
        PruningConfig.from_mapping({"layer": 3})


def test_from_mapping_names_unknown_keys_and_lists_valid_ones():
    with pytest.raises(ValueError) as caught:
        WiderConfig.from_mapping({"relevance_flor": 0.5, "zzz": 1, 7: 2})
    message = str(caught.value)
    assert "'relevance_flor' (did you mean 'relevance_floor'?)" in message
    assert "'zzz', 7; valid keys: rule, segment_by," in message
    assert message.endswith("max_kernel_bytes, layer")


def test_from_mapping_needs_a_mapping():
    with pytest.raises(ValueError, match="needs a mapping of its fields, got 0.5"):
        PruningConfig.from_mapping(0.5)
