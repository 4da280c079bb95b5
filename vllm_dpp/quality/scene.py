"""What happens in a synthetic video: things that stay, come, go, and distractors.

A scene is a list of facts; `render` draws it and `questions` asks about it. Time is counted in
steps: one temporal slice of the vision encoder, two frames. Space is a grid of cells, each as
large as one video token.
"""

from dataclasses import dataclass

import numpy as np

from vllm_dpp.quality.camera import MOVING, STILL, View, make_views
from vllm_dpp.quality.words import COLOUR_NAMES, SHAPES

GRID = 4
"""Cells on a side. A cell is one video token (28 pixels)."""

NUM_CELLS = GRID * GRID

Cells = tuple[int, int]
"""(rows, columns) of cells of a frame: each makes a token."""
FRAMES_PER_STEP = 2
MAX_BRIEF_STEPS = 2
MIN_LONG_STEPS = 3


@dataclass(frozen=True)
class SceneSpec:
    """How long and how dense a video is. Ranges include both ends.

    Args:
        num_steps: length in steps, at least 6.
        num_things: range of the number of things; at most one less than there are shapes.
        num_briefs: range of the number of things that appear briefly.
        num_distractors: range of the number of cells that hold a distractor.
        cameras: the camera of a video is one of these, drawn evenly.
    """

    num_steps: int = 8
    num_things: tuple[int, int] = (4, 8)
    num_briefs: tuple[int, int] = (1, 3)
    num_distractors: tuple[int, int] = (2, 5)
    cameras: tuple[str, ...] = (STILL,)

    @property
    def num_frames(self) -> int:
        """Frames of a video."""
        return self.num_steps * FRAMES_PER_STEP


STANDARD = SceneSpec()
"""The first test set: 16 frames, 128 video tokens."""

MOVED = SceneSpec(cameras=MOVING)
"""The same under cameras that move."""

_TRAINING = (STILL, STILL, STILL, *MOVING)

TRAINING = SceneSpec(cameras=_TRAINING)
SHORTER = SceneSpec(num_steps=6, cameras=_TRAINING)
LONGER = SceneSpec(num_steps=10, cameras=_TRAINING)
"""Of these three lengths are the videos of the training."""

DENSE = SceneSpec(num_steps=16, num_things=(8, 9), num_briefs=(1, 4), num_distractors=(5, 7))
"""Longer and denser than anything in training, 256 video tokens."""


@dataclass(frozen=True)
class Thing:
    """One shape. No two things of a scene have the same shape.

    Args:
        shape: index into `SHAPES`.
        colour: index into `COLOUR_NAMES`.
        cell: row times `GRID` plus column.
        start: first step in which it is seen.
        stop: first step after it.
    """

    shape: int
    colour: int
    cell: int
    start: int
    stop: int

    @property
    def is_brief(self) -> bool:
        """Seen for one or two steps. Every other thing is seen for at least three."""
        return self.stop - self.start <= MAX_BRIEF_STEPS


@dataclass(frozen=True)
class Distractor:
    """A cell with a pattern that no question is about.

    Args:
        cell: where.
        start: first step in which it is seen.
        stop: first step after it.
        family: 0 a mosaic, 1 a scribble.
        flickers: has another pattern in every step.
    """

    cell: int
    start: int
    stop: int
    family: int
    flickers: bool


@dataclass(frozen=True)
class Scene:
    """Everything that a question can be about, and what `render` draws.

    Args:
        seed: of what has no meaning: noise, background, small shifts.
        num_steps: length.
        things: in random order.
        distractors: in cells without things.
        views: how each frame is filmed; none if the camera is still.
    """

    seed: int
    num_steps: int
    things: tuple[Thing, ...]
    distractors: tuple[Distractor, ...]
    views: tuple[View, ...] = ()


def make_scene(seed: int, spec: SceneSpec = STANDARD) -> Scene:
    """Returns the scene of `seed`. The same arguments give the same scene."""
    rng = np.random.default_rng((seed, spec.num_steps, 0))
    count = int(rng.integers(spec.num_things[0], spec.num_things[1] + 1))
    cells = [int(cell) for cell in rng.permutation(NUM_CELLS)]
    visits = _visits(rng, count, spec, cells)
    shapes = rng.permutation(len(SHAPES))[:count]
    colours = _colours(rng, count)
    things = tuple(
        Thing(int(shape), int(colour), *visit)
        for shape, colour, visit in zip(shapes, colours, visits, strict=True)
    )
    distractors = _distractors(rng, spec, cells)
    return Scene(seed, spec.num_steps, things, distractors, _views(seed, spec))


def _views(seed: int, spec: SceneSpec) -> tuple[View, ...]:
    """Of a generator of its own: the scene is the same under any camera."""
    rng = np.random.default_rng((seed, spec.num_steps, 6))
    camera = spec.cameras[int(rng.integers(len(spec.cameras)))]
    return make_views(camera, spec.num_frames, rng)


def _visits(
    rng: np.random.Generator, count: int, spec: SceneSpec, cells: list[int]
) -> list[tuple[int, int, int]]:
    """Cell, start and stop of every thing, in random order. Takes its cells off `cells`."""
    briefs = int(rng.integers(spec.num_briefs[0], min(spec.num_briefs[1], count - 2) + 1))
    visits = [(cells.pop(), *_brief(rng, spec.num_steps)) for _ in range(briefs)]
    while len(visits) < count:
        cell, kind = cells.pop(), rng.random()
        change = int(rng.integers(MIN_LONG_STEPS, spec.num_steps - MIN_LONG_STEPS + 1))
        if kind < 0.3 and len(visits) + 2 <= count:  # one thing makes way for another
            visits += [(cell, 0, change), (cell, change, spec.num_steps)]
        elif kind < 0.45:
            visits.append((cell, 0, change))
        elif kind < 0.6:
            visits.append((cell, change, spec.num_steps))
        else:
            visits.append((cell, 0, spec.num_steps))
    return [visits[i] for i in rng.permutation(count)]


def _brief(rng: np.random.Generator, num_steps: int) -> tuple[int, int]:
    """Start and stop of a brief visit, never in the first or the last step."""
    length = int(rng.integers(1, MAX_BRIEF_STEPS + 1))
    start = int(rng.integers(1, num_steps - length))
    return start, start + length


def _colours(rng: np.random.Generator, count: int) -> list[int]:
    """A colour for each thing. One or more pairs of things share one, no three do."""
    num_colours = len(COLOUR_NAMES)
    pairs = max(count - num_colours, int(rng.random() < 0.7))
    distinct = [int(colour) for colour in rng.permutation(num_colours)[: count - pairs]]
    colours = distinct + distinct[:pairs]
    return [colours[i] for i in rng.permutation(count)]


def _distractors(
    rng: np.random.Generator, spec: SceneSpec, cells: list[int]
) -> tuple[Distractor, ...]:
    """Distractors in some of the free `cells`."""
    low, high = spec.num_distractors
    count = min(int(rng.integers(low, high + 1)), len(cells))
    made = []
    for cell in cells[:count]:
        start, stop = 0, spec.num_steps
        if rng.random() < 0.4:
            start, stop = sorted(int(t) for t in rng.choice(stop + 1, 2, replace=False))
        made.append(Distractor(cell, start, stop, int(rng.integers(2)), bool(rng.random() < 0.5)))
    return tuple(made)
