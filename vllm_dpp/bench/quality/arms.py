"""What is compared: methods, budgets, and the engine that each needs."""

import re
from dataclasses import dataclass

from vllm_dpp.bench.cost_model import retention_at
from vllm_dpp.bench.quality.selectors import SELECTORS

BUDGETS = (0.6, 0.4, 0.3, 0.2)
"""Shares of the video's LM prefill and KV that are left."""

FULL, EVS, FRAMES, RESOLUTION = "full", "evs", "frames", "resolution"
_WITHOUT_LAYER = (FULL, EVS, FRAMES, RESOLUTION)
GRAMMAR = "full, evs, frames, resolution, or SELECTOR@K[:last], SELECTOR one of " + ", ".join(
    SELECTORS
)

_AT_LAYER = {
    0: "random uniform attention vidcom2 dpp-none dpp-softened dpp-positive dpp-negated "
    "dpp-4-equal-none",
    1: "random dpp-none dpp-softened",
    2: "random uniform attention dpp-none dpp-softened dpp-negated",
    3: "random uniform attention dpp-none dpp-softened dpp-positive dpp-negated "
    "dpp-4-equal dpp-4-relevance dpp-4-spectrum dpp-scene-spectrum",
    4: "random attention dpp-none dpp-softened",
}
DEFAULT_METHODS = (
    FULL,
    EVS,
    FRAMES,
    RESOLUTION,
    *(f"{name}@{layer}" for layer, names in _AT_LAYER.items() for name in names.split()),
    "attention@3:last",
    "dpp-softened@3:last",
)


@dataclass(frozen=True)
class Method:
    """A way to make videos cheaper.

    Args:
        name: as `--methods` has it.
        layer: K; None for what happens before the decoder, and for `full`.
        selector: name of the rule; None where there is no layer.
        last_token: the relevance is that of the question's last token, not its mean.
    """

    name: str
    layer: int | None = None
    selector: str | None = None
    last_token: bool = False


def parse_method(text: str) -> Method:
    """Reads one name of `--methods`.

    Raises:
        ValueError: it is none of `GRAMMAR`.
    """
    if text in _WITHOUT_LAYER:
        return Method(text)
    match = re.fullmatch(r"([\w.-]+)@(\d+)(:last)?", text)
    if match is None or match[1] not in SELECTORS:
        raise ValueError(f"unknown method {text!r}: expected {GRAMMAR}")
    return Method(text, int(match[2]), match[1], match[3] is not None)


@dataclass(frozen=True)
class Engine:
    """What an engine must be started with.

    Args:
        layer: K of the pruning plugin; None for stock vLLM.
        evs_share: share of video tokens that EVS leaves; 1 where it is off.
    """

    layer: int | None = None
    evs_share: float = 1.0


@dataclass(frozen=True)
class Arm:
    """A method at a budget.

    Args:
        method: which.
        budget: share of the video's LM prefill and KV that may be left; 1 for `full`.
    """

    method: Method
    budget: float

    @property
    def engine(self) -> Engine:
        """The engine it runs in; arms of equal engines share one."""
        share = self.budget if self.method.name == EVS else 1.0
        return Engine(self.method.layer, share)


def make_arms(methods: list[Method], budgets: list[float], num_layers: int) -> list[Arm]:
    """Returns every method at every budget that it can keep to.

    Raises:
        ValueError: a layer is not one of the model's.
    """
    arms = []
    for method in methods:
        if method.layer is not None and method.layer >= num_layers:
            raise ValueError(f"{method.name!r}: the model has {num_layers} layers")
        for budget in [1.0] if method.name == FULL else budgets:
            if _feasible(method, budget, num_layers):
                arms.append(Arm(method, budget))
    return arms


def _feasible(method: Method, budget: float, num_layers: int) -> bool:
    if method.layer is None:
        return True
    try:
        retention_at(budget, method.layer, num_layers)
    except ValueError:
        return False
    return True
