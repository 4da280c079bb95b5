"""The servers of a comparison: how each is started."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_dpp.serving.cost_model import kv_share
from vllm_dpp.serving.request_plan import VIDEO_SHARE_ARG

ARMS = ("stock", "dpp", "dpp-none", "dpp-pieces", "dpp-share", "evs")
EVS_WORKER = "vllm_dpp.bench.chat.evs_worker.EvsWorker"


@dataclass(frozen=True, slots=True)
class Arm:
    """One server.

    Args:
        name: One of ``ARMS``.
        is_pruned: Whether it is one of ours, so that requests may have arguments of ours.
        flags: What only this server is started with.
        environment: What only this server finds in its environment, names and values.
        has_prefix_caching: Whether the server may answer from its prefix cache.
    """

    name: str
    is_pruned: bool
    flags: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    has_prefix_caching: bool = True

    @property
    def unpruned(self) -> dict[str, Any]:
        """Fields of a request that make it keep every token."""
        return {"vllm_xargs": {VIDEO_SHARE_ARG: 1.0}} if self.is_pruned else {}

    def command(self, model: str, flags: Sequence[str]) -> list[str]:
        """What starts it: `vllm-dpp serve`, or `vllm serve` for the others."""
        module = "vllm_dpp" if self.is_pruned else "vllm.entrypoints.cli.main"
        return [sys.executable, "-m", module, "serve", model, *flags, *self.flags]


def make_arm(
    name: str,
    *,
    num_layers: int,
    prune_layer: int,
    retention_ratio: float,
    decide_every: int,
    video_share: float,
    on_cpu: bool,
) -> Arm:
    """One arm.

    Args:
        name: ``stock``; ``dpp``, which reads the question; ``dpp-none``, diversity alone;
            ``dpp-pieces``, which decides pieces of a video as they come; ``dpp-share``, set by one
            number; or ``evs``, vLLM's own pruning before the decoder, which leaves as much KV as
            ``dpp``.
        num_layers: L.
        prune_layer: K.
        retention_ratio: r, in (0, 1].
        decide_every: Tokens of a piece.
        video_share: That number, in (0, 1].
        on_cpu: EVS needs help there (patches/evs-on-cpu.md).

    Raises:
        ValueError: There is no such arm.
    """
    without_plugins = (("VLLM_PLUGINS", ""),)
    if name == "stock":
        return Arm(name, False, environment=without_plugins)
    if name == "evs":
        rate = round(1 - kv_share(prune_layer, num_layers, retention_ratio), 6)
        flags = ["--video-pruning-rate", str(rate), "--no-enable-prefix-caching"]
        flags += ["--worker-cls", EVS_WORKER] if on_cpu else []
        return Arm(name, False, tuple(flags), without_plugins, has_prefix_caching=False)
    ratio = ("--retention-ratio", str(retention_ratio))
    more = {
        "dpp": ratio,
        "dpp-none": (*ratio, "--relevance", "none"),
        "dpp-pieces": (*ratio, "--relevance", "none", "--decide-every", str(decide_every)),
        "dpp-share": ("--video-share", str(video_share)),
    }
    if name not in more:
        raise ValueError(f"unknown arm {name!r}: expected one of {', '.join(ARMS)}")
    return Arm(name, True, ("--prune-layer", str(prune_layer), *more[name]))
