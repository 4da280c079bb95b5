"""Long videos: many shots in a row, and a few things that are seen in one of them for a moment.

Some of these things alone have their shape, so they are unlike all others. Others are ordinary:
their shape and their colour are seen elsewhere, too, but not together. A film runs fast: its time
spans as many positions as that of a short video, so a model that has seen none can be asked, too.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vllm_dpp.quality.camera import MOVING, STILL
from vllm_dpp.quality.questions import Question, make_questions
from vllm_dpp.quality.render import FPS, render
from vllm_dpp.quality.scene import Scene, SceneSpec, make_scene
from vllm_dpp.quality.words import SHAPES
from vllm_dpp.toy.video import Frames

NUM_SHOTS = 11
SHOT = SceneSpec(num_steps=6, num_things=(7, 8), num_briefs=(1, 3), cameras=(STILL, *MOVING))
"""Of 66 steps, 1056 video tokens, in all."""

FILM_FPS = 8 * FPS
"""Frames a second: 66 steps in the positions of eight."""

NUM_NEEDLES = 3

NEEDLE_KINDS = ("colour", "spelled", "where")
"""Of question, that are asked about them."""

ORDINARY = "pair"
"""Kind of question that is asked about a thing by shape and colour, of which there are others."""

FILM_KINDS = (*NEEDLE_KINDS, ORDINARY)


@dataclass(frozen=True)
class Film:
    """Shots, and what is asked about.

    Args:
        shots: in order; the shape of a needle is in one of them alone.
        needles: shot and shape, an index into `SHAPES`, of each; all were brief.
    """

    shots: tuple[Scene, ...]
    needles: tuple[tuple[int, int], ...]


def make_film(seed: int, num_shots: int = NUM_SHOTS) -> Film:
    """Returns the film of `seed`, no film of tests below 10 million."""
    rng = np.random.default_rng((seed, 8))
    shots = [make_scene(NUM_SHOTS * seed + i, SHOT) for i in range(num_shots)]
    needles: list[tuple[int, int]] = []
    for shot in rng.permutation(num_shots):
        taken = [shape for _, shape in needles]
        briefs = [t.shape for t in shots[shot].things if t.is_brief and t.shape not in taken]
        if briefs and len(needles) < NUM_NEEDLES:
            needles.append((int(shot), int(rng.choice(briefs))))
    return Film(
        tuple(_without_others(i, shot, needles) for i, shot in enumerate(shots)), (*needles,)
    )


def _without_others(place: int, shot: Scene, needles: Sequence[tuple[int, int]]) -> Scene:
    """The shot without shapes that are needles of others."""
    elsewhere = {shape for own, shape in needles if own != place}
    return replace(shot, things=tuple(t for t in shot.things if t.shape not in elsewhere))


def needle_questions(film: Film) -> list[Question]:
    """Returns the questions about each needle, of `NEEDLE_KINDS`."""
    return [
        question
        for shot, shape in film.needles
        for question in make_questions(film.shots[shot])
        if question.kind in NEEDLE_KINDS and _names(question, SHAPES[shape])
    ]


def ordinary_questions(film: Film, briefly: bool = True) -> list[Question]:
    """Returns one about each thing that shares its shape with others and its colour with others.

    Args:
        film: in which no other thing has both.
        briefly: leave out what is seen for longer than a moment.
    """
    things = [thing for shot in film.shots for thing in shot.things]
    shapes, colours = Counter(t.shape for t in things), Counter(t.colour for t in things)
    pairs = Counter((t.shape, t.colour) for t in things)
    return [
        question
        for shot in film.shots
        for thing in shot.things
        if min(shapes[thing.shape], colours[thing.colour]) > 1
        and pairs[thing.shape, thing.colour] == 1
        and (thing.is_brief or not briefly)
        for question in make_questions(shot)
        if question.kind == ORDINARY and _names(question, SHAPES[thing.shape])
    ]


def moment_questions(film: Film) -> list[Question]:
    """Returns all questions about what is seen for a moment, of `FILM_KINDS`."""
    return needle_questions(film) + ordinary_questions(film)


def _names(question: Question, word: str) -> bool:
    return word in question.text.lower().strip("?").split()


def render_film(film: Film) -> Frames:
    """Draws a film. Returns `[T, SIDE, SIDE, 3] uint8`, RGB."""
    return np.concatenate([render(shot) for shot in film.shots])
