"""Compares an engine's answers with the transformers reference."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.engines.prompts import engine_prompt
from tests.engines.traffic import Answer
from tests.reference.chats import CHATS
from tests.reference.plan import plan_pieces
from tests.reference.prompt import Messages, Prompt
from tests.reference.reference import Reference, ReferenceResult
from tests.reference.selection import settings_at
from vllm_dpp.bench.pruner.judge import NEAR_TIE, largest_shortfall
from vllm_dpp.pruning import PruningConfig, VideoTokens, naive_keep_indices
from vllm_dpp.pruning.naive import naive_kernels
from vllm_dpp.serving.settings import ServingSettings

TOLERANCE = 1e-4
"""Largest difference of a log-probability, over the whole vocabulary, in float32."""


class Judge:
    """One checkpoint's reference; each forward pass is made once.

    The engine's own tokens are forced on the reference, so one pass judges them all: the reference
    must give the same log-probabilities and would have chosen the same tokens.
    """

    def __init__(self, checkpoint: Path, engine_dtype: torch.dtype = torch.float32) -> None:
        self.reference = Reference(checkpoint, engine_dtype=engine_dtype)
        self.prompts: dict[str, Prompt] = {}
        self.engine_prompts: dict[str, dict[str, Any]] = {}
        for name, messages in CHATS.items():
            self.add(name, messages)
        self._chosen: dict[Any, ReferenceResult] = {}
        self._nearly: dict[tuple[int, ...], list[int]] = {}
        self._logprobs: dict[Any, np.ndarray] = {}

    def add(self, name: str, messages: Messages) -> None:
        """Know a chat by a name."""
        self.prompts[name] = self.reference.from_messages(messages)
        self.engine_prompts[name] = engine_prompt(self.reference.processor, messages)

    def enter(self, name: str, chat: str, ratio: float, settings: PruningConfig) -> None:
        """Know by a name a chat of whose videos this fraction enters."""
        with torch.inference_mode():
            self.prompts[name] = self.reference.enter(self.prompts[chat], ratio, settings)
        self.engine_prompts[name] = self.engine_prompts[chat]

    def prune_images(self, name: str, chat: str) -> None:
        """Know by a name a chat of whose images tokens may go, too."""
        self.prompts[name] = replace(self.prompts[chat], prunes=("video", "image"))
        self.engine_prompts[name] = self.engine_prompts[chat]

    def keep(
        self,
        chat: str,
        ratio: float,
        prune_layer: int,
        settings: PruningConfig,
        block_size: int | None = None,
        recorded: Mapping[int, list[int] | None] | None = None,
    ) -> list[list[int]]:
        """The reference's kept indices of each video of a chat.

        Args:
            chat: Its name.
            ratio: What is kept, of what enters.
            prune_layer: K.
            settings: How it is chosen.
            block_size: Of an engine that caches prefixes.
            recorded: By the start of a video what an engine kept. Its features are rounded
                otherwise, so what is greedy's own but for near-ties is taken for the reference's,
                from then on and in every chat.
        """
        settings = settings_at(prune_layer, settings)
        key = (chat, ratio, prune_layer, settings, block_size)
        if key not in self._chosen:
            with torch.inference_mode():
                self._chosen[key] = self.reference.run(
                    self.prompts[chat],
                    prune_layer=prune_layer,
                    retention_ratio=ratio,
                    max_tokens=1,
                    block_size=block_size,
                    settings=settings,
                )
        chosen = self._chosen[key]
        for number, (plan, own) in enumerate(zip(chosen.plans, chosen.keep, strict=True)):
            theirs = (recorded or {}).get(plan.start)
            if theirs not in (None, own) and _nearly_ties(chosen, number, theirs, settings):
                self._nearly[tuple(own)] = theirs
        return [self._nearly.get(tuple(own), own) for own in chosen.keep]

    def pieces(
        self, chat: str, ratio: float, prune_layer: int, length: int, block_size: int | None
    ) -> list[int]:
        """What is kept of a chat's one video if it is decided in pieces, without a question."""
        (video,) = self.prompts[chat].videos
        with torch.inference_mode():
            (features,) = self.reference.run(
                self.prompts[chat],
                prune_layer=prune_layer,
                retention_ratio=ratio,
                max_tokens=1,
            ).features
        settings, kept, end = ServingSettings(relevance="none"), [], 0
        for start, end, count in plan_pieces(video, ratio, length, block_size):
            piece = VideoTokens(features[start:end].double(), None, count, num_slices=1)
            kept += [start + int(index) for index in naive_keep_indices([piece], settings)[0]]
        return [*kept, *range(end, video.length)]

    def logprobs(
        self, chat: str, prune_layer: int, keep: list[list[int]], tokens: tuple[int, ...]
    ) -> np.ndarray:
        """[len(tokens), vocabulary]: what the reference says before each of ``tokens``."""
        key = (chat, prune_layer, str(keep), tokens)
        if key not in self._logprobs:
            with torch.inference_mode():
                logits = self.reference.logits(self.prompts[chat], tokens[:-1], prune_layer, keep)
            self._logprobs[key] = logits[-len(tokens) :].log_softmax(-1).float().numpy()
        return self._logprobs[key]

    def prompt_difference(self, answer: Answer, chat: str) -> float:
        """Largest difference of the log-probability of a prompt token; all tokens are kept."""
        keep = [list(range(video.length)) for video in self.prompts[chat].videos]
        with torch.inference_mode():
            logits = self.reference.logits(self.prompts[chat], (), 0, keep)
        expected = logits[:-1].log_softmax(-1)
        following = torch.tensor(self.prompts[chat].sent_token_ids[1:], device=expected.device)
        expected = expected.gather(-1, following[:, None])[:, 0].float().cpu().numpy()
        return float(np.abs(np.array(answer.prompt_logprobs) - expected).max())

    def difference(
        self, answer: Answer, chat: str, prune_layer: int, keep: list[list[int]]
    ) -> float:
        """Largest difference of a log-probability; tokens must be the reference's own choice."""
        assert answer.error is None and answer.tokens, answer
        assert answer.prompt_token_ids == self.prompts[chat].sent_token_ids
        expected = self.logprobs(chat, prune_layer, keep, answer.tokens)
        chosen = tuple(expected.argmax(-1).tolist())
        assert answer.tokens == chosen, (chat, answer.tokens, chosen)
        if answer.logprobs is None:
            return 0.0
        return float(np.abs(answer.logprobs - expected).max())


def _nearly_ties(
    result: ReferenceResult, number: int, theirs: list[int], settings: PruningConfig
) -> bool:
    """Whether greedy MAP may keep ``theirs`` of a video, as many of each segment as it kept."""
    plan, own, kept = result.plans[number], set(result.keep[number]), set(theirs)
    beyond = plan.num_tail + plan.num_missing
    evidence = result.features[number], result.raw_relevance[number]
    last = max(0, plan.num_last - plan.num_tail)
    video = VideoTokens(*evidence, plan.num_kept - plan.num_tail, plan.num_slices, beyond, last)
    for segment, _, kernel in naive_kernels(video, settings):
        places = {place for place, token in enumerate(segment) if token in kept}
        if len(places) != len(own.intersection(segment)):
            return False
        if places and largest_shortfall(kernel, places) >= NEAR_TIE:
            return False
    return True
