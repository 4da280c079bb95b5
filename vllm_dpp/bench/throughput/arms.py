"""The arms of a comparison: what each engine is started with and what its requests ask for."""

import re
from dataclasses import dataclass, field
from typing import Any

from vllm_dpp.serving.cost_model import kv_share, two_stage_ratios
from vllm_dpp.serving.front.families import family_of
from vllm_dpp.serving.layer_groups import default_prune_layer
from vllm_dpp.serving.request_plan import RETENTION_RATIO_ARG
from vllm_dpp.serving.settings import SECTION

DEFAULT_ARMS = ("stock", "evs", "dpp", "dpp@1", "dpp-off")
GRAMMAR = (
    "stock, evs[@RATE], dpp[@RATIO][:kLAYER], two-stages[@SHARE][:kLAYER] or "
    "dpp-off[@RATIO][:kLAYER]"
)


@dataclass(frozen=True, slots=True)
class Model:
    """What the arms must know of a checkpoint.

    Args:
        architecture: The one its configuration names.
        num_layers: L.
    """

    architecture: str
    num_layers: int


@dataclass(frozen=True, slots=True)
class Arm:
    """One engine of the comparison.

    Args:
        name: As it was asked for.
        engine_args: vLLM's engine arguments that only this arm has.
        extra_args: ``SamplingParams.extra_args`` of its requests.
        prune_layer: K; ``None`` where the plugin is not loaded.
        retention_ratio: r of its requests, in (0, 1]: 1 in arms that prune nothing in the decoder.
        input_share: Share of video tokens that enters the decoder, in (0, 1].
        kv_share: Share of video KV that is left, in (0, 1].
    """

    name: str
    engine_args: dict[str, Any] = field(default_factory=dict)
    extra_args: dict[str, Any] | None = None
    prune_layer: int | None = None
    retention_ratio: float = 1.0
    input_share: float = 1.0
    kv_share: float = 1.0

    @property
    def is_lossless(self) -> bool:
        """Whether its answers must be those of stock vLLM."""
        return self.kv_share == 1


def parse_arm(text: str, model: Model, *, retention_ratio: float, prune_layer: int | None) -> Arm:
    """Read one name of ``--arms``.

    Args:
        text: ``stock``; ``evs@RATE`` with RATE the share of video tokens cut before the decoder,
            by default the one that leaves as much KV as ``dpp``; ``dpp@RATIO:kLAYER``;
            ``two-stages@SHARE:kLAYER`` with SHARE of the video's KV left, by default as much; or
            ``dpp-off``, an engine that prunes by default, asked by every request not to.
        model: The checkpoint.
        retention_ratio: r where ``text`` gives none, in (0, 1].
        prune_layer: K where ``text`` gives none; ``None`` takes the plugin's default.

    Raises:
        ValueError: ``text`` is none of these, or a number is out of range.
    """
    match = re.fullmatch(r"(stock|evs|dpp|two-stages|dpp-off)(?:@([0-9.]+))?(?::k([0-9]+))?", text)
    if match is None or (match[1] in ("stock", "evs") and match[3]) or text.startswith("stock@"):
        raise ValueError(f"unknown arm {text!r}: expected {GRAMMAR}")
    layer = int(match[3]) if match[3] else prune_layer
    if layer is None:
        layer = default_prune_layer(model.num_layers)
    if not 0 <= layer < model.num_layers:
        raise ValueError(f"layer {layer} of {text!r} is not one of {model.num_layers}")
    number = float(match[2]) if match[2] else None
    if match[1] == "stock":
        return Arm(text)
    if match[1] == "evs":
        return _evs(text, number, kv_share(layer, model.num_layers, retention_ratio))
    if match[1] == "two-stages":
        share = kv_share(layer, model.num_layers, retention_ratio) if number is None else number
        return _two_stages(text, model, layer, share)
    ratio = retention_ratio if number is None else number
    return _dpp(text, model, layer, ratio, off=match[1] == "dpp-off")


def _evs(name: str, rate: float | None, default_share: float) -> Arm:
    share = default_share if rate is None else 1 - rate
    if not 0 < share < 1:
        raise ValueError(f"{name!r} must cut a share of video tokens in (0, 1), not {1 - share}")
    engine_args = {"video_pruning_rate": round(1 - share, 6), "video_pruning_method": "evs"}
    return Arm(name, engine_args, input_share=share, kv_share=share)


def _two_stages(name: str, model: Model, layer: int, share: float) -> Arm:
    if not 0 < share <= 1:
        raise ValueError(f"the share of {name!r} must be in (0, 1], not {share}")
    entering, ratio = two_stage_ratios(share, layer, model.num_layers)
    settings = {"video_share": share, "prune_layer": layer}
    return Arm(
        name,
        {
            "hf_overrides": {"architectures": [family_of(model.architecture).variant]},
            "additional_config": {SECTION: settings},
        },
        prune_layer=layer,
        retention_ratio=ratio,
        input_share=entering,
        kv_share=share,
    )


def _dpp(name: str, model: Model, layer: int, ratio: float, *, off: bool) -> Arm:
    if not 0 < ratio <= 1:
        raise ValueError(f"the retention ratio of {name!r} must be in (0, 1], not {ratio}")
    asked = 1.0 if off else ratio
    return Arm(
        name,
        {
            "hf_overrides": {"architectures": [family_of(model.architecture).variant]},
            "additional_config": {SECTION: {"retention_ratio": ratio, "prune_layer": layer}},
        },
        extra_args={RETENTION_RATIO_ARG: 1.0} if off else None,
        prune_layer=layer,
        retention_ratio=asked,
        kv_share=kv_share(layer, model.num_layers, asked),
    )
