"""What is asked about a scene. Every question has exactly one right answer, of one token."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from vllm_dpp.quality.scene import GRID, Scene, SceneSpec, Thing, make_scene
from vllm_dpp.quality.words import COLOUR_NAMES, HALVES, NUMBERS, QUADRANTS, SHAPES, YES_NO


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    Args:
        kind: one of `KINDS`.
        text: the question as a user would put it.
        answer: one of `ANSWERS`.
    """

    kind: str
    text: str
    answer: str


Maker = Callable[[Scene, np.random.Generator], Iterator[tuple[str, str]]]


def _colour(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    for thing in scene.things:
        yield f"what colour is the {_shape(thing)}?", _colour_name(thing)


def _spelled(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """In capitals, a word is bytes: the model must first read it, so it looks it up late."""
    for thing in scene.things:
        yield f"what colour is the {_shape(thing).upper()}?", _colour_name(thing)


def _shape_of(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    counts = Counter(thing.colour for thing in scene.things)
    for thing in scene.things:
        if counts[thing.colour] == 1:
            yield f"what shape is {_colour_name(thing)}?", _shape(thing)


def _where(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    for thing in scene.things:
        row, column = divmod(thing.cell, GRID)
        quadrant = 2 * (row >= GRID // 2) + (column >= GRID // 2)
        yield f"where is the {_shape(thing)}?", QUADRANTS[quadrant]


def _pair(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """In a film neither word may be enough: others have the shape, others the colour."""
    for thing, (_, answer) in zip(scene.things, _where(scene, rng), strict=True):
        yield f"where is the {_colour_name(thing)} {_shape(thing)}?", answer


def _when(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    middle = scene.num_steps // 2
    for thing in scene.things:
        if thing.is_brief and (thing.stop <= middle or thing.start >= middle):
            yield f"in which half is the {_shape(thing)}?", HALVES[thing.start >= middle]


def _brief(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    briefs = [thing for thing in scene.things if thing.is_brief]
    if len(briefs) == 1:
        yield "what shape appeared briefly?", _shape(briefs[0])
        yield "what colour appeared briefly?", _colour_name(briefs[0])


def _order(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Things that are not there from the start, whose first steps lie two or more apart."""
    late = [thing for thing in scene.things if thing.start > 0]
    for a in late:
        for b in late:
            if abs(a.start - b.start) >= 2:
                first = a if a.start < b.start else b
                yield f"which came first the {_shape(a)} or the {_shape(b)}?", _shape(first)


def _replaced(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Two hops: from a thing to its place, and to what is there next."""
    for a in scene.things:
        for b in scene.things:
            if a.cell == b.cell and b.start == a.stop:
                yield f"what replaced the {_shape(a)}?", _shape(b)
                yield f"what colour replaced the {_shape(a)}?", _colour_name(b)


def _twin(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Two hops: from a thing to its colour, and to the other thing of that colour."""
    for a in scene.things:
        for b in scene.things:
            if a is not b and a.colour == b.colour:
                yield f"what else has the colour of the {_shape(a)}?", _shape(b)


def _exists(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """As often yes as no."""
    present = [SHAPES[thing.shape] for thing in scene.things]
    absent = [name for name in SHAPES if name not in present]
    for names, answer in zip((present, absent), YES_NO, strict=True):
        yield f"is there a {rng.choice(names)}?", answer


def _count(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """Needs a token of every thing."""
    yield "how many shapes are there?", NUMBERS[len(scene.things)]


def _shape(thing: Thing) -> str:
    return SHAPES[thing.shape]


def _colour_name(thing: Thing) -> str:
    return COLOUR_NAMES[thing.colour]


_MAKERS: dict[str, Maker] = {
    "colour": _colour,
    "spelled": _spelled,
    "shape": _shape_of,
    "where": _where,
    "pair": _pair,
    "when": _when,
    "brief": _brief,
    "order": _order,
    "replaced": _replaced,
    "twin": _twin,
    "exists": _exists,
    "count": _count,
}

KINDS = tuple(_MAKERS)
"""The types of question. README and tables use these names."""


def make_questions(scene: Scene) -> list[Question]:
    """Returns every question that the task asks about `scene`, of as many kinds as it allows."""
    rng = np.random.default_rng((scene.seed, scene.num_steps, 2))
    return [
        Question(kind, text, answer)
        for kind, make in _MAKERS.items()
        for text, answer in dict.fromkeys(make(scene, rng))
    ]


def chance_levels(spec: SceneSpec, seeds: range) -> dict[str, float]:
    """How often a guesser is right who never sees the video, per kind.

    The guesser has learned, from the even ones of `seeds`, the commonest answer to each question
    text, and where a text is new the commonest answer to its kind. It is asked the odd ones.

    Args:
        spec: of the videos.
        seeds: at least some thousands, or texts that are rare are guessed from few cases.

    Returns:
        Accuracy in [0, 1] per kind.
    """
    by_text: dict[str, Counter[str]] = {}
    by_kind: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    asked: list[Question] = []
    for i, seed in enumerate(seeds):
        questions = make_questions(make_scene(seed, spec))
        if i % 2:
            asked += questions
            continue
        for question in questions:
            by_text.setdefault(question.text, Counter())[question.answer] += 1
            by_kind[question.kind][question.answer] += 1
    right: Counter[str] = Counter()
    for question in asked:
        counts = by_text.get(question.text, by_kind[question.kind])
        right[question.kind] += counts.most_common(1)[0][0] == question.answer
    totals = Counter(question.kind for question in asked)
    return {kind: right[kind] / totals[kind] for kind in KINDS if totals[kind]}
