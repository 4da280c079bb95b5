"""How tokens are chosen: by name, the settings of the server that chooses them so."""

from collections.abc import Mapping
from typing import Any

_ONE = {"segment_by": "one"}
_FOUR = {"segment_by": "count", "num_segments": 4}
_NO_QUESTION = {"relevance": "none"}

SELECTORS: Mapping[str, Mapping[str, Any]] = {
    "attention": {"rule": "attention"},
    "random": {"rule": "random"},
    "uniform": {"rule": "uniform"},
    "vidcom2": {"rule": "vidcom2"},
    # The product's own, with its defaults; then its settings one by one.
    "dpp": {},
    # As the default, 1024, where slices have 256 and 1024 tokens, and not 16 as here.
    "dpp-64-tokens": {"max_segment_tokens": 64},
    "dpp-16-tokens": {"max_segment_tokens": 16},
    "dpp-1-slice": {"slices_per_segment": 1},
    # One segment for the whole video, by relevance. Softened: by 0.1 where nothing else is said.
    "dpp-none": _ONE | _NO_QUESTION,
    "dpp-softened": _ONE | {"relevance_floor": 0.1},
    "dpp-softened-0.3": _ONE | {"relevance_floor": 0.3},
    "dpp-softened-0.6": _ONE | {"relevance_floor": 0.6},
    "dpp-embeddings-0.6": _ONE | {"relevance_floor": 0.6, "similarity": "embeddings"},
    "dpp-hidden-0.6": _ONE | {"relevance_floor": 0.6, "similarity": "hidden_states"},
    "dpp-all-slices-0.6": _ONE | {"relevance_floor": 0.6, "last_slice_weight": 1.0},
    "dpp-quartic-0.6": _ONE | {"relevance_floor": 0.6, "quartic": 0.1},
    "dpp-positive": _ONE | {"relevance_floor": 0.0},
    "dpp-negated": _ONE | {"relevance_floor": 0.0, "relevance_sign": "negative"},
    # Four segments, by how they share the budget.
    "dpp-4-equal": _FOUR | {"budget": "length"},
    "dpp-4-relevance": _FOUR | {"budget": "relevance"},
    "dpp-4-spectrum": _FOUR | {"budget": "spectrum"},
    "dpp-scene-equal": _FOUR | {"segment_by": "scene", "budget": "length"},
    "dpp-scene-spectrum": _FOUR | {"segment_by": "scene", "budget": "spectrum"},
    "dpp-4-equal-none": _FOUR | _NO_QUESTION | {"budget": "length"},
}
"""Fields of ``ServingSettings``; the others keep their defaults.

`vidcom2` is a rule of this benchmark's own, see ``stock_rules.register``.
"""
