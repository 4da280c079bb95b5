"""The loss: answers to packed questions, and auxiliary heads that only training has."""

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import Tensor, nn

from vllm_dpp.quality import network
from vllm_dpp.quality.batches import Batch
from vllm_dpp.quality.labels import NUM_CLASSES, CellLabels
from vllm_dpp.quality.model import FIRST_LOOK_UP
from vllm_dpp.quality.packing import (
    AFTER_QUESTION,
    NO_QUESTION,
    Pack,
    Prefix,
    attention_mask,
    hide_video,
    pack_positions,
    tokenize,
)
from vllm_dpp.quality.words import COLOUR_NAMES, SHAPES
from vllm_dpp.toy.tokenizer import TURN_END

SEEN = ("shape", "colour", "row", "column", "time")
"""Labels that the vision encoder's output must show."""

REMEMBERED = ("last_shape", "visit")
"""Labels that the decoder's video tokens must show after `MEMORY_LAYERS` layers."""

MEMORY_LAYERS = 3
SEEN_WEIGHT = 0.3
REMEMBERED_WEIGHT = 1.0
TURN_END_WEIGHT = 0.1

PLACE_GAIN = 2.0
"""The larger, the smaller the part of a video token that says where it is."""

EARLY_LAYERS = 5
EARLY_WEIGHT = 1.0
"""A question's last word must know the answer after `EARLY_LAYERS` layers. It is often the thing
asked about, so this teaches the look-up by itself, before the way to the end of the prompt."""

GLANCES_WEIGHT = 1.0
"""Questions must not look at the video before layer `FIRST_LOOK_UP`. In steps that hide it from
them they cannot; in the others this loss teaches them not to, for a served model hides nothing."""


def word_to_end() -> int:
    """Tokens from the last word of a question to the one that predicts the answer."""
    return len(tokenize("?" + AFTER_QUESTION))


class Heads(nn.Module):
    """Linear read-outs of the video tokens. Not part of the saved model.

    Shapes and colours are read with the directions of their words' embeddings, and from tokens of
    one size. So a video token must point where the word for what it shows points, and a question
    can find it by likeness. Rows and columns, too, are read from directions, so that a token can
    find those of the same cell at other times.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.readout = nn.ModuleDict(
            {name: nn.Linear(hidden_size, NUM_CLASSES[name]) for name in SEEN + REMEMBERED}
        )
        for name in ("shape", "colour"):  # one row, for the cell that shows none
            self.readout[name] = nn.Linear(hidden_size, 1)
        for name, words in (("shape", SHAPES), ("colour", COLOUR_NAMES)):
            ids = torch.tensor([tokenize(word)[0] for word in words])
            self.register_buffer(f"{name}_words", ids, persistent=False)

    def logits(self, name: str, hidden: Tensor, embedding: Tensor) -> Tensor:
        """[B, V, classes] of label `name`. `embedding` is the model's, [vocabulary, D]."""
        hidden = F.rms_norm(hidden, hidden.shape[-1:])
        own: Any = self.readout[name]
        if name in ("row", "column"):
            return F.linear(hidden, PLACE_GAIN * F.normalize(own.weight, dim=-1), own.bias)
        if name not in ("shape", "colour"):
            return own(hidden)
        words = F.normalize(embedding[getattr(self, f"{name}_words")], dim=-1)
        return torch.cat([F.linear(hidden, words), own(hidden)], -1)


@dataclass(frozen=True)
class Step:
    """What a forward pass gives, before the backward pass.

    Args:
        loss: [] the sum to be minimised.
        parts: its parts, by name, without weights.
        right: [B, G] bool, the answer has the largest logit.
        asked: [B, G] bool, there is a question.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    right: Tensor
    asked: Tensor


def to_tensors(item: Pack | CellLabels, device: torch.device) -> dict[str, Tensor]:
    """The arrays of `item` by name, on `device`."""
    return {
        field.name: torch.from_numpy(getattr(item, field.name)).to(device) for field in fields(item)
    }


def vision_step(model: Any, heads: Heads, batch: Batch) -> Step:
    """The vision encoder alone, with its auxiliary losses."""
    device = model.device
    assert batch.labels is not None, "smaller frames teach no vision encoder"
    video = _encode(model, batch, device)
    parts = _head_losses(model, heads, SEEN, video, to_tensors(batch.labels, device))
    none = torch.zeros(batch.packs.answers.shape, dtype=torch.bool)
    return Step(torch.stack(list(parts.values())).sum(), parts, none, none)


def answer_step(model: Any, heads: Heads, batch: Batch, hide: bool = False) -> Step:
    """The whole model: answers and auxiliary losses.

    Args:
        model: a `Qwen2_5_VLForConditionalGeneration`.
        heads: read-outs of its video tokens.
        batch: videos and questions.
        hide: questions do not see the video before layer `FIRST_LOOK_UP`.
    """
    device = model.device
    packs = to_tensors(batch.packs, device)
    video = _encode(model, batch, device)
    decoded = decode(model, video, packs, batch.prefix, hide)
    parts: dict[str, Tensor] = {}
    if batch.labels is not None:
        labels = to_tensors(batch.labels, device)
        parts |= _head_losses(model, heads, SEEN, video, labels)
        parts |= _head_losses(model, heads, REMEMBERED, decoded.remembered, labels)
    asked = packs["answers"] != NO_QUESTION
    rows = torch.arange(len(asked), device=device)[:, None].expand_as(asked)[asked]
    columns = packs["ask_at"][asked]
    logits = network.final_logits(model, decoded.questions[rows, columns])
    answers = packs["answers"][asked]
    ends = network.final_logits(model, decoded.questions[rows, columns + 1])
    parts["answer"] = F.cross_entropy(logits, answers)
    parts["turn_end"] = F.cross_entropy(ends, torch.full_like(answers, tokenize(TURN_END)[0]))
    words = network.final_logits(model, decoded.early[rows, columns - word_to_end()])
    parts["early"] = F.cross_entropy(words, answers)
    if decoded.glances is not None:
        parts["glances"] = decoded.glances
    right = torch.zeros_like(asked)
    right[asked] = logits.argmax(-1) == answers
    loss = torch.stack([weight_of(name) * part for name, part in parts.items()]).sum()
    return Step(loss, parts, right, asked)


@dataclass(frozen=True)
class Decoded:
    """What the decoder makes of B videos and their questions.

    Args:
        questions: [B, Q, D] float, the questions' tokens after the last layer, before the norm.
        remembered: [B, V, D] float, the videos' after `MEMORY_LAYERS`.
        early: [B, Q, D] float, the questions' after `EARLY_LAYERS`.
        glances: [] how much the questions look at the video before `FIRST_LOOK_UP`, as a loss:
            the mean of -log(1 - attention). None where they cannot.
    """

    questions: Tensor
    remembered: Tensor
    early: Tensor
    glances: Tensor | None


def decode(
    model: Any,
    video: Tensor,
    packs: dict[str, Tensor],
    prefix: Prefix,
    hide: bool = False,
) -> Decoded:
    """All layers of the decoder.

    Args:
        model: a `Qwen2_5_VLForConditionalGeneration`.
        video: [B, V, D] float, video tokens from the encoder.
        packs: the chats, as tensors.
        prefix: of the videos.
        hide: as in `answer_step`.
    """
    hidden, turns, mask = embed(model, video, packs, prefix)
    blind = hide_video(mask, prefix.video) if hide else mask
    remembered = early = hidden
    glances = []
    for depth, layer in enumerate(model.model.language_model.layers):
        is_first = depth < FIRST_LOOK_UP
        if is_first and not hide:
            shares = network.attention_to(layer, hidden, turns, mask, prefix.video)
            glances.append(-torch.log1p(-shares.clamp(max=_MOST_ATTENTION)).mean())
        hidden = network.decoder_layer(layer, hidden, turns, blind if is_first else mask)
        if depth + 1 == MEMORY_LAYERS:
            remembered = hidden[:, prefix.video]
        if depth + 1 == EARLY_LAYERS:
            early = hidden
    start = len(prefix.token_ids)
    looked = torch.stack(glances).mean() if glances else None
    return Decoded(hidden[:, start:], remembered, early[:, start:], looked)


_MOST_ATTENTION = 1 - 1e-6


def embed(
    model: Any, video: Tensor, packs: dict[str, Tensor], prefix: Prefix
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Input of the decoder: [B, P + Q, D] embeddings, rotary turns, and the mask."""
    shared = prefix.token_ids.to(video.device).expand(len(video), -1)
    ids = torch.cat([shared, packs["token_ids"]], 1)
    words = model.model.language_model.embed_tokens(ids)
    before, after = prefix.video.start, prefix.video.stop
    hidden = torch.cat([words[:, :before], video, words[:, after:]], 1)
    turns = network.rotary(model, pack_positions(prefix, packs["offsets"]), hidden)
    return hidden, turns, attention_mask(packs["chat"], len(prefix.token_ids))


def weight_of(part: str) -> float:
    """Weight of a part of the loss."""
    if part in SEEN:
        return SEEN_WEIGHT
    if part in REMEMBERED:
        return REMEMBERED_WEIGHT
    weights = {"turn_end": TURN_END_WEIGHT, "early": EARLY_WEIGHT, "glances": GLANCES_WEIGHT}
    return weights.get(part, 1.0)


def _encode(model: Any, batch: Batch, device: torch.device) -> Tensor:
    frames = torch.from_numpy(batch.frames).to(device)
    patches, cells = network.patchify(frames), network.cells_of(frames)
    return network.encode_videos(model, patches, len(frames), cells)


def _head_losses(
    model: Any, heads: Heads, names: tuple[str, ...], hidden: Tensor, labels: dict[str, Tensor]
) -> dict[str, Tensor]:
    embedding = model.model.language_model.embed_tokens.weight
    return {
        name: F.cross_entropy(
            heads.logits(name, hidden, embedding).flatten(0, 1), labels[name].flatten()
        )
        for name in names
    }
