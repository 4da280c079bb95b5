"""What is compared: methods, budgets, and the engine that each needs."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from vllm_dpp.bench.quality.selectors import SELECTORS
from vllm_dpp.serving.cost_model import MOST_BY_QUESTION, retention_at, two_stage_ratios
from vllm_dpp.serving.request_plan import ARG_PREFIX, CHOICES

BUDGETS = (0.6, 0.4, 0.3, 0.2, 0.15, 0.1)
"""Shares of the video's LM prefill and KV that are left."""

FULL, EVS, FRAMES, RESOLUTION = "full", "evs", "frames", "resolution"
_WITHOUT_LAYER = (FULL, EVS, FRAMES, RESOLUTION)
ENTRY_RULES = ("change", "dpp", "evs", "uniform", "random")
"""That choose what enters the decoder, without a question."""
GRAMMAR = (
    "full, evs, which vLLM itself does, frames, resolution; RULE, which chooses what enters the "
    "decoder, one of "
    f"{', '.join(ENTRY_RULES)}; SELECTOR@K, which chooses at layer K, SELECTOR one of "
    f"{', '.join(SELECTORS)}; or both, RULE+SELECTOR@K[:FRACTION], where K keeps FRACTION of what "
    "enters, or what --video-share would have it keep, and reads no question where that reads none"
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
TWO_STAGES = "change+dpp-softened-0.6@4"
DEFAULT_METHODS = (
    FULL,
    EVS,
    FRAMES,
    RESOLUTION,
    "change",
    TWO_STAGES,
    "change+dpp-softened-0.6@4:1/4",
    "change+dpp-none@4:1/2",
    *(f"{name}@{layer}" for layer, names in _AT_LAYER.items() for name in names.split()),
)


@dataclass(frozen=True)
class Method:
    """A way to make videos cheaper.

    Args:
        name: as `--methods` has it.
        layer: K; None for what happens before the decoder, and for `full`.
        selector: one of `SELECTORS`; None where there is no layer.
        entry: the rule that chooses what enters the decoder; None where everything does.
        fraction: of what enters that stays from layer K on, where `entry` is given; `None` for
            what follows from the share.
    """

    name: str
    layer: int | None = None
    selector: str | None = None
    entry: str | None = None
    fraction: float | None = None

    @property
    def as_by_share(self) -> bool:
        """Whether both stages do as `--video-share` has them do."""
        return None not in (self.entry, self.layer) and self.fraction is None

    def ratios(self, share: float, num_layers: int) -> tuple[float, float]:
        """What enters the decoder of the video, and what is kept at layer K of that.

        Raises:
            ValueError: the layers below K alone take `share` or more.
        """
        if self.entry is None:
            return 1.0, 1.0 if self.layer is None else retention_at(share, self.layer, num_layers)
        if self.layer is None:
            return share, 1.0
        return two_stage_ratios(share, self.layer, num_layers, self.fraction)


def parse_method(text: str) -> Method:
    """Reads one name of `--methods`.

    Raises:
        ValueError: it is none of `GRAMMAR`.
    """
    if text in _WITHOUT_LAYER:
        return Method(text)
    if text in ENTRY_RULES:
        return Method(text, entry=text)
    match = re.fullmatch(r"(?:(\w+)\+)?([\w.-]+)@(\d+)(?::(\d+/\d+))?", text)
    if match is None or match[2] not in SELECTORS or match[1] not in (None, *ENTRY_RULES):
        raise ValueError(f"unknown method {text!r}: expected {GRAMMAR}")
    entry, selector, layer, option = match.groups()
    if entry is None:
        if option is not None:
            raise ValueError(f"{text!r}: a fraction of what enters needs a RULE+ before it")
        return Method(text, int(layer), selector)
    fraction = None if option is None else float(Fraction(option))
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"{text!r}: expected a fraction in (0, 1] after the colon")
    return Method(text, int(layer), selector, entry=entry, fraction=fraction)


@dataclass(frozen=True)
class Engine:
    """What an engine must be started with.

    Args:
        layer: K of the pruning plugin; None for stock vLLM.
        evs_share: share of video tokens that EVS leaves; 1 where it is off.
        settings: the plugin's others, sorted.
    """

    layer: int | None = None
    evs_share: float = 1.0
    settings: tuple[tuple[str, Any], ...] = ()


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
        method = self.method
        layer = _ENTRY_ENGINE_LAYER if method.entry and method.layer is None else method.layer
        selector = method.selector or _ENTRY_ENGINE_SELECTOR
        settings = {k: v for k, v in SELECTORS[selector].items() if k not in CHOICES}
        if method.entry is not None:
            settings["entry_rule"] = method.entry
        of_plugin = () if layer is None else tuple(sorted(settings.items()))
        return Engine(layer, self.budget if method.name == EVS else 1.0, of_plugin)

    @property
    def choices(self) -> dict[str, Any]:
        """What its requests choose for themselves, with the prefix of request arguments."""
        method = self.method
        own = dict(SELECTORS[method.selector]) if method.selector else {}
        if method.as_by_share and self.budget > MOST_BY_QUESTION:
            own["relevance"] = "none"
        return {ARG_PREFIX + k: v for k, v in own.items() if k in CHOICES}


# Where nothing is pruned in the middle: those of TWO_STAGES, to share its engine.
_ENTRY_ENGINE_LAYER, _ENTRY_ENGINE_SELECTOR = 4, "dpp-softened-0.6"


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
    try:
        method.ratios(budget, num_layers)
    except ValueError:
        return False
    return True
