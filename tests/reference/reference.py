"""A model that forgets video tokens at one decoder layer, recomputed from scratch at every step."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoProcessor

from vllm_dpp.pruning import PruningConfig

from .network import Network
from .plan import VideoPlan, num_kept, plan_videos
from .prompt import Messages, Prompt, prompt_from_messages
from .selection import Select, naive_selection, settings_at


@dataclass(frozen=True)
class ReferenceResult:
    """What the model answered and what it looked at.

    Args:
        tokens: the generated token ids.
        logprobs: [len(tokens), vocabulary], in the dtype of the model.
        keep: per video, the ascending indices of the tokens kept, counted from its first token.
        raw_relevance: per video [N], None where no question follows the video.
        features: per video [N, hidden], by what its tokens are compared.
        plans: per video, what was decided before looking at any data.
    """

    tokens: list[int]
    logprobs: Tensor
    keep: list[list[int]]
    raw_relevance: list[Tensor | None]
    features: list[Tensor]
    plans: list[VideoPlan]


class Reference:
    """A checkpoint that answers prompts with pruned videos.

    Args:
        checkpoint_path: folder with a checkpoint and its processor.
        dtype: of the computation; torch.float64 judges near-ties.
        engine_dtype: of the engine to compare with, which rounds pixels and seconds to it.
    """

    def __init__(
        self,
        checkpoint_path: str | Path,
        dtype: torch.dtype = torch.float32,
        engine_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.network = Network(checkpoint_path, dtype)
        self.processor = AutoProcessor.from_pretrained(checkpoint_path)
        self.engine_dtype = engine_dtype

    def from_messages(self, messages: Messages) -> Prompt:
        """Tokens and media of a chat, through the checkpoint's own processor."""
        return prompt_from_messages(self.processor, messages, engine_dtype=self.engine_dtype)

    def enter(self, prompt: Prompt, ratio: float, settings: PruningConfig) -> Prompt:
        """The prompt with what `settings` let in of each video: this fraction of it.

        A video enters whole if its text takes more room than what would be left out.
        """
        media = self.network.media_embeddings(prompt)
        width = self.network.model.config.get_text_config().hidden_size
        select = naive_selection(settings)
        chosen = []
        for item, tokens in zip(prompt.media, media, strict=True):
            if item.modality == "video":
                number = num_kept(item.length, ratio)
                if item.text and number + len(item.text) >= item.length:
                    number = item.length
                chosen.append(select(tokens[:, :width], None, number, item.grid_thw[0], 0, 0))
        return prompt.entered(chosen)

    def run(
        self,
        prompt: Prompt,
        *,
        prune_layer: int,
        retention_ratio: float,
        max_tokens: int,
        block_size: int | None = None,
        settings: PruningConfig | None = None,
        select: Select | None = None,
        forced_tokens: Sequence[int] | None = None,
        forced_keep: Sequence[Sequence[int]] | None = None,
    ) -> ReferenceResult:
        """Generate exactly `max_tokens` tokens greedily; an end-of-sequence token stops nothing.

        Args:
            prune_layer: K; layers [0, K) see every token, layers [K, L) only those kept.
            retention_ratio: fraction of each video that is kept, in (0, 1]; the ratio in
                `settings` is not read.
            block_size: page size of the engine's cache when prefix caching is on, else None.
            settings: of the default selection, and by what it compares tokens.
            select: a selection in the place of the default one.
            forced_tokens: the answer, whatever the logits say.
            forced_keep: per video the tokens to keep, whatever the plan and the selection say.
        """
        if not 0 <= prune_layer < self.network.num_layers:
            raise ValueError(
                f"prune_layer must be in [0, {self.network.num_layers}), got {prune_layer}"
            )
        if forced_tokens is not None and len(forced_tokens) != max_tokens:
            raise ValueError(f"{max_tokens} tokens are asked for, {len(forced_tokens)} are forced")

        settings = settings and settings_at(prune_layer, settings)
        question_free = settings is not None and settings.relevance == "none"
        plans = plan_videos(prompt, retention_ratio, block_size, question_free)
        media = self.network.media_embeddings(prompt)
        similarity = getattr(settings, "similarity", "both")
        features, relevance = self._evidence(prompt, media, plans, prune_layer, similarity)
        if forced_keep is None:
            select = select or naive_selection(settings)
            evidence = zip(plans, features, relevance, strict=True)
            keep = [_choose(select, *seen) for seen in evidence]
        else:
            keep = [list(indices) for indices in forced_keep]

        tokens: list[int] = []
        logprobs: list[Tensor] = []
        for step in range(max_tokens):
            logits = self.logits(prompt, tokens, prune_layer, keep, media)[-1]
            logprobs.append(logits.log_softmax(dim=-1))
            tokens.append(int(logits.argmax()) if forced_tokens is None else forced_tokens[step])
        return ReferenceResult(tokens, torch.stack(logprobs), keep, relevance, features, plans)

    def logits(
        self,
        prompt: Prompt,
        generated: Sequence[int],
        prune_layer: int,
        keep: Sequence[Sequence[int]],
        media: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Logits [rows, vocabulary] of every prompt token that is kept, then of the generated ones.

        Args:
            media: outputs of the vision tower if they are known already.
        """
        network = self.network
        if media is None:
            media = network.media_embeddings(prompt)
        positions = network.positions(prompt, len(generated))
        rows = kept_rows(prompt, positions.shape[1], keep)

        hidden = network.embeddings(prompt, generated, media)
        added = network.deepstack(prompt, len(generated), media)
        if len(added) > prune_layer:
            raise ValueError(f"DeepStack adds to {len(added)} layers, but K is {prune_layer}")
        hidden = network.hidden_states(hidden, positions, range(prune_layer), added)[-1]
        upper = range(prune_layer, network.num_layers)
        hidden = network.hidden_states(hidden[rows], positions[:, rows], upper)[-1]
        return network.logits(hidden)

    def _evidence(
        self,
        prompt: Prompt,
        media: Sequence[Tensor],
        plans: Sequence[VideoPlan],
        prune_layer: int,
        similarity: str,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Per video by what its tokens are compared, and the raw relevance before the prune layer.

        Of both kinds of features (0.9 S₁ + 0.1 S₂) = Z Zᵀ with Z = [sqrt(0.9) X̂₁, sqrt(0.1) X̂₂].
        """
        network = self.network
        positions = network.positions(prompt, 0)
        hidden = network.embeddings(prompt, (), media)
        added = network.deepstack(prompt, 0, media)
        entering = network.hidden_states(hidden, positions, range(prune_layer), added)
        asked = max(prune_layer - 1, 0)
        features: list[Tensor] = []
        relevance: list[Tensor | None] = []
        for item, plan in zip(prompt.videos, plans, strict=True):
            video = item.rows[: plan.length - plan.num_tail]
            entered, hidden = entering[0][video], entering[prune_layer][video]
            if similarity == "both" and prune_layer > 0:
                parts = (
                    normalize(entered.double()) * 0.9**0.5,
                    normalize(hidden.double()) * 0.1**0.5,
                )
                features.append(torch.cat(parts, dim=-1).float())
            else:
                features.append(hidden if similarity == "hidden_states" else entered)
            relevance.append(
                network.raw_relevance(asked, entering[asked], positions, plan.question, video)
                if plan.question
                else None
            )
        return features, relevance


def kept_rows(prompt: Prompt, num_tokens: int, keep: Sequence[Sequence[int]]) -> list[int]:
    """Rows that enter the prune layer: all but the video tokens that are not kept."""
    dropped: set[int] = set()
    for video, indices in zip(prompt.videos, keep, strict=True):
        everything = set(range(video.length))
        if list(indices) != sorted(set(indices)) or not everything.issuperset(indices):
            raise ValueError(f"keep needs ascending indices below {video.length}, got {indices}")
        rows = video.rows
        dropped.update(rows[index] for index in everything.difference(indices))
    return [row for row in range(num_tokens) if row not in dropped]


def _choose(
    select: Select, plan: VideoPlan, features: Tensor, relevance: Tensor | None
) -> list[int]:
    if plan.num_kept == plan.length:
        return list(range(plan.length))
    tail = range(plan.length - plan.num_tail, plan.length)
    wanted = plan.num_kept - len(tail)
    beyond = plan.num_tail + plan.num_missing
    last = max(0, plan.num_last - plan.num_tail)
    chosen = select(features, relevance, wanted, plan.num_slices, beyond, last)
    indices = [*(int(index) for index in chosen), *tail]
    if len(indices) != plan.num_kept:
        raise ValueError(f"the plan keeps {plan.num_kept} tokens, but {len(indices)} were chosen")
    return indices
