"""Many questions about one video in one sequence: video first, then the questions side by side.

The video is computed once. A block-diagonal mask keeps each question from seeing the others,
and every question starts at the same position, so each is answered as if it stood alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2Tokenizer

from vllm_dpp.quality.questions import KINDS, Question
from vllm_dpp.quality.scene import GRID, NUM_CELLS
from vllm_dpp.quality.words import make_word_tokenizer
from vllm_dpp.toy import tokenizer as tok

BEFORE_VIDEO = f"<|im_start|>user\n{tok.VISION_START}"
AFTER_VIDEO = tok.VISION_END
AFTER_QUESTION = f"{tok.TURN_END}\n<|im_start|>assistant\n"
"""The chat template around a video and a question. A test holds it against the template."""

POSITIONS_PER_STEP = 2
"""M-RoPE: `tokens_per_second` times the seconds of a step."""

NO_QUESTION = -1


@dataclass(frozen=True)
class Prefix:
    """The part of a sequence that all questions share.

    Args:
        token_ids: [P] int64, with a placeholder for every video token.
        positions: [3, P] int64, M-RoPE positions (time, height, width).
        video: where the video's tokens are.
        question_position: position of a question's first token, the same on all three axes.
    """

    token_ids: Tensor
    positions: Tensor
    video: slice
    question_position: int


@dataclass(frozen=True)
class Pack:
    """Questions about one video, one after the other. Q tokens, G places for questions.

    Args:
        token_ids: [Q] int64, each question with its answer, then padding.
        question: [Q] int64, which question a token belongs to, or `NO_QUESTION`.
        offsets: [Q] int64, place of a token within its question.
        ask_at: [G] int64, index of the token that must predict the answer; 0 where unused.
        answers: [G] int64, token of the answer, or `NO_QUESTION`.
        kinds: [G] int64, index into `KINDS`, or `NO_QUESTION`.
    """

    token_ids: np.ndarray
    question: np.ndarray
    offsets: np.ndarray
    ask_at: np.ndarray
    answers: np.ndarray
    kinds: np.ndarray


@cache
def tokenizer() -> Qwen2Tokenizer:
    """The tokenizer, made once."""
    return make_word_tokenizer()


@cache
def tokenize(text: str) -> tuple[int, ...]:
    """Token ids of `text`."""
    return tuple(tokenizer()(text, add_special_tokens=False)["input_ids"])


@cache
def make_prefix(num_steps: int) -> Prefix:
    """Returns the prefix of a video of `num_steps` steps."""
    before, after = tokenize(BEFORE_VIDEO), tokenize(AFTER_VIDEO)
    placeholder = tokenize(tok.VIDEO_PAD)
    count = num_steps * NUM_CELLS
    grid = torch.cartesian_prod(
        POSITIONS_PER_STEP * torch.arange(num_steps), torch.arange(GRID), torch.arange(GRID)
    )
    video = len(before) + grid.T
    last = int(video.max()) + 1
    positions = [torch.arange(len(before)).expand(3, -1), video, torch.full((3, 1), last)]
    return Prefix(
        token_ids=torch.tensor(before + count * placeholder + after),
        positions=torch.cat(positions, 1),
        video=slice(len(before), len(before) + count),
        question_position=last + 1,
    )


def pack_questions(questions: Sequence[Question], num_tokens: int, num_places: int) -> Pack:
    """Packs as many of `questions`, from the first on, as fit.

    Args:
        questions: about one video.
        num_tokens: Q, length of the pack.
        num_places: G, the most questions in the pack.

    Raises:
        ValueError: not even one question fits.
    """
    padding = tokenize(tok.PADDING)[0]
    pack = Pack(
        token_ids=np.full(num_tokens, padding),
        question=np.full(num_tokens, NO_QUESTION),
        offsets=np.zeros(num_tokens, np.int64),
        ask_at=np.zeros(num_places, np.int64),
        answers=np.full(num_places, NO_QUESTION),
        kinds=np.full(num_places, NO_QUESTION),
    )
    start = place = 0
    for question in questions:
        ids = tokenize(question.text + AFTER_QUESTION) + tokenize(question.answer)
        stop = start + len(ids)
        if stop > num_tokens or place == num_places:
            break
        pack.token_ids[start:stop] = ids
        pack.question[start:stop] = place
        pack.offsets[start:stop] = range(len(ids))
        pack.ask_at[place] = stop - 2
        pack.answers[place] = ids[-1]
        pack.kinds[place] = KINDS.index(question.kind)
        start, place = stop, place + 1
    if not place:
        raise ValueError(f"no question fits into {num_tokens} tokens and {num_places} places")
    return pack


def attention_mask(question: Tensor, num_prefix: int) -> Tensor:
    """[B, 1, Q, P + Q] bool: a token sees the prefix and its own question, up to itself.

    Args:
        question: [B, Q] int64, as in `Pack`.
        num_prefix: P.
    """
    length = question.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=question.device).tril()
    own = (question[:, :, None] == question[:, None, :]) & causal
    return torch.nn.functional.pad(own, (num_prefix, 0), value=True)[:, None]


def hide_video(mask: Tensor, video: slice) -> Tensor:
    """`mask` without sight of the video's tokens."""
    hidden = mask.clone()
    hidden[..., video] = False
    return hidden


def pack_positions(prefix: Prefix, offsets: Tensor) -> Tensor:
    """[3, B, P + Q] int64 M-RoPE positions of packs with `offsets`, [B, Q] int64."""
    batch = offsets.shape[0]
    questions = (prefix.question_position + offsets).expand(3, -1, -1)
    shared = prefix.positions.to(offsets.device)[:, None].expand(-1, batch, -1)
    return torch.cat([shared, questions], dim=2)
