"""The requests of a soak: good ones of every kind, and bad ones of every kind."""

import base64
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2

from vllm_dpp.bench.chat.client import Message, assistant, image, user, video
from vllm_dpp.bench.chat.talk import clip
from vllm_dpp.serving.request_plan import (
    ENTRY_RATIO_ARG,
    RETENTION_RATIO_ARG,
    VIDEO_SHARE_ARG,
)
from vllm_dpp.toy.video import as_data_url, render_frames

PATCH = 28  # pixels of a token's side
FRAMES_PER_SLICE = 2
QUESTIONS = (
    "what colour is the star?",
    "what moves?",
    "which shape is to the left of the moon, and what colour is it?",
    "tell me in some detail what it is that moves through the picture and where it goes.",
)
MIDDLE_ALONE = {ENTRY_RATIO_ARG: 1.0, RETENTION_RATIO_ARG: 0.25}
WHOLE = {VIDEO_SHARE_ARG: 1.0}
SHARES: tuple[dict[str, float], ...] = (
    *({}, {}, {}),  # as the server does
    *({VIDEO_SHARE_ARG: share} for share in (1.0, 0.6, 0.2, 0.1)),
)
CHOICES = (*SHARES, *(MIDDLE_ALONE | {RETENTION_RATIO_ARG: ratio} for ratio in (0.5, 0.1)))
"""What requests choose for themselves."""
ENTRY_CHOICES = (*SHARES, *({ENTRY_RATIO_ARG: ratio} for ratio in (0.5, 0.1)))
"""The same where tokens are left out before the decoder alone."""
LONGEST_SLICES = 24  # of all but the long videos


@dataclass(frozen=True, slots=True)
class Case:
    """One request.

    Args:
        name: Its kind and number.
        messages: The conversation.
        max_tokens: To generate.
        extra: More fields of the request.
        is_good: Whether it must be answered; otherwise it must get a 4xx.
        is_ours: Whether it is the plugin that refuses it.
    """

    name: str
    messages: list[Message]
    max_tokens: int = 4
    extra: dict[str, Any] = field(default_factory=dict)
    is_good: bool = True
    is_ours: bool = False

    def for_stock(self) -> "Case":
        """The same without arguments that stock vLLM does not know."""
        extra = {name: value for name, value in self.extra.items() if name != "vllm_xargs"}
        return replace(self, extra=extra)

    @property
    def kind(self) -> str:
        return self.name.rpartition(" ")[0]


class Maker:
    """Makes cases. Equal arguments give equal cases.

    Args:
        folder: For video files.
        seed: Of everything.
        long_tokens: Tokens of the longest videos.
        side: Pixels of the side of their frames, and of the largest frames of others.
        entry_only: Whether tokens are left out before the decoder alone.
    """

    def __init__(
        self, folder: Path, seed: int, long_tokens: int, side: int, *, entry_only: bool = False
    ) -> None:
        self._entry_only = entry_only
        self._folder, self._rng, self._seed = folder, random.Random(seed), 1000 * seed
        self._long_tokens, self._side = long_tokens, side
        self._long_frames = long_tokens // (side // PATCH) ** 2 * FRAMES_PER_SLICE

    def good(self, each: int) -> list[Case]:
        """``each`` cases of every kind of good request."""
        kinds: dict[str, Callable[[], list[Message]]] = {
            "video": lambda: [user(self._question(), self._video())],
            "long video": lambda: [user(self._question(), self.long_video())],
            "two videos": lambda: [user(self._question(), self._video(), self._video())],
            "image": lambda: [user(self._question(), self._image())],
            "image and video": lambda: [user(self._question(), self._image(), self._video())],
            "text": lambda: [user(self._question())],
            "chat": self._chat,
        }
        return [
            Case(f"{kind} {i}", make(), self._rng.choice((2, 4, 8, 48)), self._choice())
            for i in range(each)
            for kind, make in kinds.items()
        ]

    def longest(self) -> Case:
        """A request that needs the whole buffer, or all of whose video enters."""
        messages = [user(QUESTIONS[-1], self.long_video())]
        chosen = WHOLE if self._entry_only else MIDDLE_ALONE
        return Case("longest 0", messages, extra={"vllm_xargs": chosen})

    def bad(self) -> Iterator[Case]:
        """Every kind of bad request."""
        good = clip(self._folder, self._next(), 8, 112)
        head, _, data = good.partition(",")
        broken = {
            "cut mp4": f"{head},{base64.b64encode(base64.b64decode(data)[:300]).decode()}",
            "no mp4": f"{head},{base64.b64encode(b'this is not a video').decode()}",
            "no base64": f"{head},!!!",
            "empty mp4": f"{head},",
        }
        for name, url in broken.items():
            yield Case(f"{name} 0", [user(QUESTIONS[0], video(url))], is_good=False)
        middle_alone: dict[str, Any] = {"vllm_xargs": MIDDLE_ALONE}
        ratio = ENTRY_RATIO_ARG if self._entry_only else RETENTION_RATIO_ARG
        too_low = 0 if self._entry_only else 0.001  # one token of a video enters at least
        arguments: dict[str, dict[str, Any]] = {
            "ratio too high": {"vllm_xargs": {ratio: 1.5}},
            "ratio too low": {"vllm_xargs": {ratio: too_low}},
            "no ratio": {"vllm_xargs": {ratio: "half"}},
            "misspelt": {"vllm_xargs": {"dpp_retention": 0.5}},
            "record without a folder": {"vllm_xargs": {"dpp_record": 1}},
        }
        if self._entry_only:
            arguments["nothing is kept later"] = middle_alone
        else:
            scored = {"prompt_logprobs": 1, "stream": False, "stream_options": None}
            arguments["prompt logprobs"] = middle_alone | scored
        for name, extra in arguments.items():
            messages = [user(QUESTIONS[0], video(good))]
            yield Case(f"{name} 0", messages, extra=extra, is_good=False, is_ours=True)
        if not self._entry_only:  # where there is a buffer
            too_long = [user(QUESTIONS[0], self.long_video(self._long_frames + 8))]
            yield Case("too long 0", too_long, extra=middle_alone, is_good=False, is_ours=True)
        # vLLM's own refusals, without media: with media they disturb others (refused-media.md)
        yield Case("long text 0", [user("why? " * 4000)], is_good=False)
        yield Case("temperature 0", [user("why?")], extra={"temperature": -1}, is_good=False)

    def long_video(self, num_frames: int | None = None) -> Message:
        frames = num_frames or self._long_frames
        return video(clip(self._folder, self._next(), frames, self._side))

    def _video(self) -> Message:
        """Of at most three eighths of the tokens of a long one: two of them are read together."""
        side = self._rng.randint(2, self._side // PATCH)
        most = min(LONGEST_SLICES, max(1, 3 * self._long_tokens // 8 // side**2))
        frames = FRAMES_PER_SLICE * self._rng.randint(min(2, most), most)
        return video(clip(self._folder, self._next(), frames, side * PATCH))

    def _image(self) -> Message:
        height, width = (28 * self._rng.randint(2, 8) for _ in range(2))
        [frame] = render_frames(self._next(), 1, height, width)
        path = self._folder / f"{self._seed}.png"
        if not cv2.imwrite(str(path), frame):
            raise OSError(f"OpenCV cannot write {path}")
        return image(as_data_url(path).replace("video/mp4", "image/png", 1))

    def _chat(self) -> list[Message]:
        """Two or three turns; the second may bring another video."""
        messages = [user(self._question(), self._video()), assistant("a red star.")]
        second = [self._video()] if self._rng.random() < 0.5 else []
        messages += [user(self._question(), *second)]
        if self._rng.random() < 0.5:
            messages += [assistant("yes."), user(self._question())]
        return messages

    def _choice(self) -> dict[str, Any]:
        chosen = self._rng.choice(ENTRY_CHOICES if self._entry_only else CHOICES)
        return {"vllm_xargs": chosen} if chosen else {}

    def _question(self) -> str:
        return self._rng.choice(QUESTIONS)

    def _next(self) -> int:
        self._seed += 1
        return self._seed
