"""The questions of the benchmark and the videos they are about, as a user would send them."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np

from vllm_dpp.quality.evaluate import SPLITS
from vllm_dpp.quality.film import (
    FILM_FPS,
    NEEDLE_KINDS,
    ORDINARY,
    make_film,
    moment_questions,
    needle_questions,
    render_film,
)
from vllm_dpp.quality.packing import Chat
from vllm_dpp.quality.questions import KINDS, Question, make_questions
from vllm_dpp.quality.render import FPS, render, shrink
from vllm_dpp.quality.scene import Scene, make_scene
from vllm_dpp.quality.shapes import CELL
from vllm_dpp.quality.words import COLOUR_NAMES, SHAPES, YES_NO
from vllm_dpp.toy.video import Frames, write_mp4

FIRST_SEED, FIRST_TUNING_SEED = 100_000, 300_000
"""Of the scenes that are reported, and of those on which settings are chosen. The scores that
training prints are of other held-out scenes."""

_MOST_VIDEOS = 100_000

SCENE_KINDS = tuple(kind for kind in KINDS if kind != ORDINARY)
"""Asked about all videos but films: there a shape is enough to tell a thing by."""

ABSENT = "absent"
"""Kind of the questions of the test sets of that name."""

FILM = "film"
"""Test set of long videos, which are asked about what alone in them has its shape."""

ORDINARY_FILM = "ordinary"
"""Of the same, which are asked about things that share their shape and their colour with others."""

_LATER, _ABSENT, _TUNING = "-later", f"-{ABSENT}", "-tuning"
_REPORTED = (
    *(split + suffix for suffix in ("", _LATER, _ABSENT) for split in SPLITS),
    *(film + suffix for suffix in ("", _LATER) for film in (FILM, ORDINARY_FILM)),
)
TEST_SETS = (*_REPORTED, *(split + _TUNING for split in _REPORTED))
"""Splits of the task; the same questions, each asked after another one about the video; as many
questions for things that are not there, to which a model that sees less may say yes; long
videos; and all of these about other videos, on which settings are chosen."""


def split_of(test_set: str) -> str:
    """What is asked of which videos: a split of the task, `FILM` or `ORDINARY_FILM`."""
    return test_set.partition("-")[0]


@dataclass(frozen=True)
class Asked:
    """One question of the test set.

    Args:
        video: index of the video it is about.
        chat: the question, and before it those that have been answered.
    """

    video: int
    chat: Chat

    @property
    def question(self) -> Question:
        """That is asked, with its answer."""
        return self.chat[-1]


@dataclass(frozen=True)
class TestSet:
    """Videos and questions of one split.

    Args:
        split: one of `TEST_SETS`.
        fps: frames a second of its videos.
        videos: `[T, H, W, 3] uint8` each, as decoded from an mp4.
        asked: all questions, video by video.
    """

    __test__ = False  # not one of pytest's

    split: str
    fps: float
    videos: tuple[Frames, ...]
    asked: tuple[Asked, ...]

    @property
    def groups(self) -> list[int]:
        """The video of each question: answers about one video are not independent."""
        return [item.video for item in self.asked]

    @property
    def kinds(self) -> list[str]:
        """The kind of each question."""
        return [item.question.kind for item in self.asked]


def make_test_set(split: str, per_kind: int, kinds: Sequence[str]) -> TestSet:
    """Returns `per_kind` questions of each of `kinds`, at most one of a kind about a video.

    Of ordinary moments up to three are asked about each film, which has five of them or more.
    Of things that are not there as many are asked in all. A kind that nothing is asked of about
    such videos is left out.

    Args:
        split: one of `TEST_SETS`.
        per_kind: at least 1.
        kinds: of `KINDS`.
    """
    source, is_later, is_absent = _source(split), _LATER in split, _ABSENT in split
    first_seed = FIRST_TUNING_SEED if split.endswith(_TUNING) else FIRST_SEED
    kinds = kinds_of(split, kinds)
    if is_absent:
        per_kind, kinds = per_kind * len(kinds), [ABSENT]
    missing = Counter(dict.fromkeys(kinds, per_kind))
    videos: list[Frames] = []
    asked: list[Asked] = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        for seed in range(first_seed, first_seed + _MOST_VIDEOS):
            scene = source.make(seed)
            questions = _absent(scene) if is_absent else source.questions(scene)
            chosen = _some_of_each(
                questions, seed, {k: min(missing[k], source.most) for k in kinds if missing[k]}
            )
            if chosen:
                asked += [
                    Asked(len(videos), (_another(question, questions), question))
                    if is_later
                    else Asked(len(videos), (question,))
                    for question in chosen
                ]
                videos.append(read_frames(write_mp4(path, source.render(scene), source.fps)))
                missing.subtract(question.kind for question in chosen)
            if not any(missing.values()):
                break
    return TestSet(split, source.fps, tuple(videos), tuple(asked))


def kinds_of(test_set: str, kinds: Sequence[str]) -> list[str]:
    """Those of `kinds` that are asked about its videos."""
    return [kind for kind in kinds if kind in _source(test_set).kinds]


@dataclass(frozen=True)
class _Source:
    """Where videos come from: facts by seed, what can be asked about them, how they look.

    At most `most` questions of a kind are asked about one.
    """

    kinds: tuple[str, ...]
    make: Callable[[int], Any]
    questions: Callable[[Any], list[Question]]
    render: Callable[[Any], Frames]
    fps: float
    most: int = 1


def _source(test_set: str) -> _Source:
    split = split_of(test_set)
    if split == FILM:
        return _Source(NEEDLE_KINDS, make_film, needle_questions, render_film, FILM_FPS)
    if split == ORDINARY_FILM:
        return _Source((ORDINARY,), make_film, moment_questions, render_film, FILM_FPS, most=3)
    make = partial(make_scene, spec=SPLITS[split])
    return _Source(SCENE_KINDS, make, _scene_questions, render, FPS)


def _scene_questions(scene: Scene) -> list[Question]:
    return [question for question in make_questions(scene) if question.kind in SCENE_KINDS]


def _some_of_each(
    questions: list[Question], seed: int, wanted: Mapping[str, int]
) -> list[Question]:
    """As many of each kind as are wanted, or there are."""
    rng = np.random.default_rng((seed, 5))
    shuffled = [questions[i] for i in rng.permutation(len(questions))]
    return [
        question
        for kind, number in wanted.items()
        for question in [each for each in shuffled if each.kind == kind][:number]
    ]


def _absent(scene: Scene) -> list[Question]:
    shown = {thing.shape for thing in scene.things}
    absent = [name for shape, name in enumerate(SHAPES) if shape not in shown]
    return [Question(ABSENT, f"is there a {name}?", YES_NO[1]) for name in absent]


def _another(question: Question, questions: Sequence[Question]) -> Question:
    """One about something else: it shares no word for a thing with `question`, nor its answer."""
    own = _about(question)
    others = [other for other in questions if not own & _about(other)]
    rng = np.random.default_rng((len(questions), *question.text.encode()))
    return others[int(rng.integers(len(others)))]


def _about(question: Question) -> set[str]:
    words = {*question.text.lower().strip("?").split(), question.answer}
    return words & {*SHAPES, *COLOUR_NAMES} or {question.kind}


def read_frames(path: Path) -> Frames:
    """All frames of a video, `[T, H, W, 3] uint8` RGB."""
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (read := capture.read())[0]:
        frames.append(cv2.cvtColor(read[1], cv2.COLOR_BGR2RGB))
    capture.release()
    return np.stack(frames)


def fewer_frames(frames: Frames, fps: float, share: float) -> tuple[Frames, float]:
    """About `share` of the frames, evenly spread, and their frames a second.

    An even number, since two make a slice; at least two.
    """
    count = max(2, 2 * round(share * len(frames) / 2))
    chosen = [(2 * i + 1) * len(frames) // (2 * count) for i in range(count)]
    return frames[chosen], fps * count / len(frames)


def smaller_frames(frames: Frames, share: float) -> Frames:
    """Frames of about `share` of the cells, as square as possible; at least two by two."""
    height, width = frames.shape[1] // CELL, frames.shape[2] // CELL
    sizes = [(h, w) for h in range(2, height + 1) for w in range(h, width + 1) if w - h <= 1]
    rows, columns = min(sizes, key=lambda size: abs(size[0] * size[1] - share * height * width))
    return shrink(frames, (rows, columns))
