"""By how much an engine that rounds is off, beside transformers that rounds.

Attention over fewer tokens averages less rounding out, in any engine; so what is compared is by how
much the error grows over the unpruned model's, here over stock vLLM's and in transformers over its
own.
"""

from collections.abc import Iterable

import numpy as np
import torch

from tests.engines.host import EngineHost
from tests.engines.judge import Judge
from tests.engines.traffic import Arrival
from tests.reference.reference import Reference

RATIO = 0.25
MOST_GROWTH = 0.1
"""Of the error's logarithm, with 97.7 % confidence."""


class Errors:
    """Mean differences of log-probabilities from the float32 reference, chat by chat.

    Args:
        judge: The float32 reference.
        rounded: The same computation by transformers in bfloat16: what pruning costs by itself,
            because fewer values are averaged.
    """

    def __init__(self, judge: Judge, rounded: Reference) -> None:
        self.judge, self.rounded = judge, rounded

    def of(
        self, host: EngineHost, keeps: dict[str, list[list[int]]], prune_layer: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """[chats] of the engine and of transformers, on the engine's tokens."""
        pairs = [self._pair(host, chat, keep, prune_layer) for chat, keep in keeps.items()]
        mine, theirs = np.array(pairs).T
        return mine, theirs

    def _pair(
        self, host: EngineHost, chat: str, keep: list[list[int]], prune_layer: int
    ) -> tuple[float, float]:
        prompt = self.judge.prompts[chat]
        pruned = [
            kept
            for kept, video in zip(keep, prompt.videos, strict=True)
            if len(kept) < video.length
        ]
        if pruned:
            host.call("force_kept", pruned)
        if entering := [list(v.entered) for v in prompt.videos if v.entered is not None]:
            host.call("force_entering", entering)
        args = {"dpp_retention_ratio": RATIO} if pruned else None
        arrival = Arrival("a", self.judge.engine_prompts[chat], max_tokens=8, extra_args=args)
        answer = host.run([arrival]).answers["a"]
        assert answer.prompt_token_ids == prompt.sent_token_ids
        expected = self.judge.logprobs(chat, prune_layer, keep, answer.tokens)
        with torch.inference_mode():
            logits = self.rounded.logits(prompt, answer.tokens[:-1], prune_layer, keep)
        theirs = logits[-len(answer.tokens) :].float().log_softmax(-1).numpy()
        return np.abs(answer.logprobs - expected).mean(), np.abs(theirs - expected).mean()


def everything_of(judge: Judge, chats: Iterable[str]) -> dict[str, list[list[int]]]:
    """All tokens of each video of the chats."""
    return {
        chat: [list(range(video.length)) for video in judge.prompts[chat].videos] for chat in chats
    }


def check_growth(mine: np.ndarray, theirs: np.ndarray) -> None:
    """Hold the growth of an engine's errors to that of transformers.

    Args:
        mine: [chats], by which factor each error grows.
        theirs: The same in transformers.
    """
    growth = np.log(mine) - np.log(theirs)
    mean, deviation = growth.mean(), growth.std(ddof=1) / len(growth) ** 0.5
    print(f"growth over that of transformers {mean:+.3f} +- {2 * deviation:.3f}")
    # All are sums of roundings that are drawn anew, so the mean scatters about zero: over 65 chats
    # it was +0.006 +- 0.015. With fewer it may well be two deviations off, on another machine.
    assert mean + 2 * deviation <= MOST_GROWTH, "larger than the same pruning costs elsewhere"
