"""Many chats about one video in one sequence: video first, then the chats side by side.

The video is computed once. A block-diagonal mask keeps each chat from seeing the others, and
every chat starts at the same position, so each is answered as if it stood alone. A chat is one
question, or several with the right answers between them, the last of which is to be answered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2Tokenizer

from vllm_dpp.quality.questions import KINDS, Question
from vllm_dpp.quality.scene import GRID, Cells
from vllm_dpp.quality.words import make_word_tokenizer
from vllm_dpp.toy import tokenizer as tok

BEFORE_VIDEO = f"<|im_start|>user\n{tok.VISION_START}"
AFTER_VIDEO = tok.VISION_END
AFTER_QUESTION = f"{tok.TURN_END}\n<|im_start|>assistant\n"
AFTER_ANSWER = f"{tok.TURN_END}\n<|im_start|>user\n"
"""The chat template around a video, questions and answers. A test holds it against the template."""

POSITIONS_PER_STEP = 2
"""M-RoPE: `tokens_per_second` times the seconds of a step, in all videos but films."""

NO_QUESTION = -1

Chat = tuple[Question, ...]
"""Questions about one video: the last is asked when the others have been answered."""


@dataclass(frozen=True)
class Prefix:
    """The part of a sequence that all chats share.

    Args:
        token_ids: [P] int64, with a placeholder for every video token.
        positions: [3, P] int64, M-RoPE positions (time, height, width).
        video: where the video's tokens are.
        chat_position: position of a chat's first token, the same on all three axes.
    """

    token_ids: Tensor
    positions: Tensor
    video: slice
    chat_position: int


@dataclass(frozen=True)
class Pack:
    """Chats about one video, one after the other. Q tokens, G places for chats.

    Args:
        token_ids: [Q] int64, each chat with its answer, then padding.
        chat: [Q] int64, which chat a token belongs to, or `NO_QUESTION`.
        offsets: [Q] int64, place of a token within its chat.
        ask_at: [G] int64, index of the token that must predict the answer; 0 where unused.
        answers: [G] int64, token of the answer, or `NO_QUESTION`.
        kinds: [G] int64, index into `KINDS`, or `NO_QUESTION`.
    """

    token_ids: np.ndarray
    chat: np.ndarray
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
def make_prefix(
    num_steps: int,
    cells: Cells = (GRID, GRID),
    positions_per_step: float = POSITIONS_PER_STEP,
) -> Prefix:
    """Returns the prefix of a video of `num_steps` steps and (rows, columns) of cells."""
    before, after = tokenize(BEFORE_VIDEO), tokenize(AFTER_VIDEO)
    placeholder = tokenize(tok.VIDEO_PAD)
    count = num_steps * cells[0] * cells[1]
    times = (positions_per_step * torch.arange(num_steps)).long()
    grid = torch.cartesian_prod(times, *map(torch.arange, cells))
    video = len(before) + grid.T
    last = int(video.max()) + 1
    positions = [torch.arange(len(before)).expand(3, -1), video, torch.full((3, 1), last)]
    return Prefix(
        token_ids=torch.tensor(before + count * placeholder + after),
        positions=torch.cat(positions, 1),
        video=slice(len(before), len(before) + count),
        chat_position=last + 1,
    )


def pack_chats(chats: Sequence[Chat], num_tokens: int, num_places: int) -> Pack:
    """Packs as many of `chats`, from the first on, as fit.

    Args:
        chats: about one video.
        num_tokens: Q, length of the pack.
        num_places: G, the most chats in the pack.

    Raises:
        ValueError: not even one chat fits.
    """
    padding = tokenize(tok.PADDING)[0]
    pack = Pack(
        token_ids=np.full(num_tokens, padding),
        chat=np.full(num_tokens, NO_QUESTION),
        offsets=np.zeros(num_tokens, np.int64),
        ask_at=np.zeros(num_places, np.int64),
        answers=np.full(num_places, NO_QUESTION),
        kinds=np.full(num_places, NO_QUESTION),
    )
    start = place = 0
    for chat in chats:
        ids = tokenize(chat_text(chat)) + tokenize(chat[-1].answer)
        stop = start + len(ids)
        if stop > num_tokens or place == num_places:
            break
        pack.token_ids[start:stop] = ids
        pack.chat[start:stop] = place
        pack.offsets[start:stop] = range(len(ids))
        pack.ask_at[place] = stop - 2
        pack.answers[place] = ids[-1]
        pack.kinds[place] = KINDS.index(chat[-1].kind)
        start, place = stop, place + 1
    if not place:
        raise ValueError(f"no chat fits into {num_tokens} tokens and {num_places} places")
    return pack


def chat_text(chat: Chat) -> str:
    """What a chat template makes of it behind the video: all that is given before the answer.

    It is tokenized as a whole: a word takes the line end before it along, as it does in the
    history that a client sends.
    """
    turns = [f"{old.text}{AFTER_QUESTION}{old.answer}{AFTER_ANSWER}" for old in chat[:-1]]
    return "".join(turns) + chat[-1].text + AFTER_QUESTION


def attention_mask(chat: Tensor, num_prefix: int) -> Tensor:
    """[B, 1, Q, P + Q] bool: a token sees the prefix and its own chat, up to itself.

    Args:
        chat: [B, Q] int64, as in `Pack`.
        num_prefix: P.
    """
    length = chat.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=chat.device).tril()
    own = (chat[:, :, None] == chat[:, None, :]) & causal
    return torch.nn.functional.pad(own, (num_prefix, 0), value=True)[:, None]


def hide_video(mask: Tensor, video: slice) -> Tensor:
    """`mask` without sight of the video's tokens."""
    hidden = mask.clone()
    hidden[..., video] = False
    return hidden


def pack_positions(prefix: Prefix, offsets: Tensor) -> Tensor:
    """[3, B, P + Q] int64 M-RoPE positions of packs with `offsets`, [B, Q] int64."""
    batch = offsets.shape[0]
    chats = (prefix.chat_position + offsets).expand(3, -1, -1)
    shared = prefix.positions.to(offsets.device)[:, None].expand(-1, batch, -1)
    return torch.cat([shared, chats], dim=2)
