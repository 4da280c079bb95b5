"""In bfloat16 pruning adds no error of its own.

Rounding decides close calls, so the kept tokens and the answer are forced: what is left is the
arithmetic of the same tokens, which may differ from float32 no more than stock vLLM's does.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engines.host import EngineHost
from tests.engines.judge import Judge
from tests.engines.traffic import Arrival
from vllm_dpp.serving.settings import ServingSettings

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

CHATS = ("video", "question first", "two videos", "image and video", "two turns")
RATIO = 0.25
LAYERS = (1, 3)


def mean_error(
    host: EngineHost, judge: Judge, keeps: dict[str, list[list[int]]], prune_layer: int
) -> float:
    """Mean difference of log-probabilities over all chats, against the float32 reference."""
    errors = []
    for chat, keep in keeps.items():
        pruned = [
            kept
            for kept, video in zip(keep, judge.prompts[chat].videos, strict=True)
            if len(kept) < video.length
        ]
        if pruned:
            host.call("force_kept", pruned)
        args = {"dpp_retention_ratio": RATIO} if pruned else None
        arrival = Arrival("a", judge.engine_prompts[chat], max_tokens=8, extra_args=args)
        answer = host.run([arrival]).answers["a"]
        expected = judge.logprobs(chat, prune_layer, keep, answer.tokens)
        errors.append(np.abs(answer.logprobs - expected).mean())
    return float(np.mean(errors))


def test_error_is_no_larger_than_stock(host: EngineHost, tiny_checkpoint: Path) -> None:
    torch.set_num_threads(1)
    judge = Judge(tiny_checkpoint, engine_dtype=torch.bfloat16)
    everything = {
        chat: [list(range(video.length)) for video in judge.prompts[chat].videos] for chat in CHATS
    }
    host.load(tiny_checkpoint, None, dtype="bfloat16")
    stock = mean_error(host, judge, everything, prune_layer=0)
    assert stock > 1e-4, "bfloat16 must differ from float32 at all"
    for layer in LAYERS:
        settings = ServingSettings(prune_layer=layer)
        keeps = {chat: judge.keep(chat, RATIO, layer, settings) for chat in CHATS}
        host.load(tiny_checkpoint, {"prune_layer": layer}, dtype="bfloat16")
        pruned = mean_error(host, judge, keeps, layer)
        print(f"layer {layer}: stock {stock:.5f}, pruned {pruned:.5f}")
        assert pruned <= 1.1 * stock
