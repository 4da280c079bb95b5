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
from tests.reference.chats import text, user, video
from vllm_dpp.serving.settings import ServingSettings

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

CHATS = ["video", "question first", "two videos", "image and video", "two turns"]
MORE_VIDEOS = range(10, 30)
RATIO = 0.25
LAYERS = (1, 3)


def errors(
    host: EngineHost, judge: Judge, keeps: dict[str, list[list[int]]], prune_layer: int
) -> np.ndarray:
    """[chats] mean difference of log-probabilities from the float32 reference."""
    means = []
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
        means.append(np.abs(answer.logprobs - expected).mean())
    return np.array(means)


def test_error_is_no_larger_than_stock(host: EngineHost, tiny_checkpoint: Path) -> None:
    torch.set_num_threads(1)
    judge = Judge(tiny_checkpoint, engine_dtype=torch.bfloat16)
    chats = [*CHATS, *map(str, MORE_VIDEOS)]
    for seed in MORE_VIDEOS:
        judge.add(str(seed), [user(video(seed, 8, 84, 112), text("What moves?"))])
    everything = {
        chat: [list(range(video.length)) for video in judge.prompts[chat].videos] for chat in chats
    }
    host.load(tiny_checkpoint, None, dtype="bfloat16")
    stock = errors(host, judge, everything, prune_layer=0)
    assert stock.min() > 1e-4, "bfloat16 must differ from float32 at all"
    for layer in LAYERS:
        settings = ServingSettings(prune_layer=layer)
        keeps = {chat: judge.keep(chat, RATIO, layer, settings) for chat in chats}
        host.load(tiny_checkpoint, {"prune_layer": layer}, dtype="bfloat16")
        growth = np.log(errors(host, judge, keeps, layer) / stock)
        mean, deviation = growth.mean(), growth.std(ddof=1) / len(chats) ** 0.5
        print(f"layer {layer}: error over stock's {np.exp(mean):.3f}, +- {2 * deviation:.3f}")
        # Both sums of roundings are drawn anew, so the ratio scatters about 1.
        assert mean - 2 * deviation <= 0, "larger than stock's, and not by chance"
        assert mean + 2 * deviation <= 0.1, "too few chats to tell"
