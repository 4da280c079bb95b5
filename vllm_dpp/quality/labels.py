"""What is true of each video token: targets of the auxiliary losses in training."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from vllm_dpp.quality.camera import seen_cells
from vllm_dpp.quality.scene import GRID, NUM_CELLS, Scene
from vllm_dpp.quality.words import COLOUR_NAMES, SHAPES

NO_SHAPE = len(SHAPES)
NO_COLOUR = len(COLOUR_NAMES)
TIME_BINS = 6

NUM_CLASSES = {
    "shape": NO_SHAPE + 1,
    "colour": NO_COLOUR + 1,
    "row": GRID,
    "column": GRID,
    "time": TIME_BINS,
    "last_shape": NO_SHAPE + 1,
    "visit": 5,
}
"""Per field of `CellLabels`."""

NOTHING, NEW, OLD, LEFT, LEFT_BRIEFLY = range(5)


@dataclass(frozen=True)
class CellLabels:
    """Classes of the tokens of a video, [V] int64 each, step by step.

    Args:
        shape: what is drawn there, or `NO_SHAPE`.
        colour: of what is drawn there, or `NO_COLOUR`.
        row: of the scene's cell, which is the picture's if the camera is still.
        column: of the same.
        time: part of the video, of `TIME_BINS` equal ones.
        last_shape: what was there last before what is there now, or `NO_SHAPE`.
        visit: nothing so far; a thing's first step if that is not the video's; a thing that was
            there before; a thing has left; a thing has left that appeared briefly.
    """

    shape: np.ndarray
    colour: np.ndarray
    row: np.ndarray
    column: np.ndarray
    time: np.ndarray
    last_shape: np.ndarray
    visit: np.ndarray


def label_cells(scene: Scene) -> CellLabels:
    """Returns the labels of `scene`'s tokens."""
    size = (scene.num_steps, NUM_CELLS)
    shape, colour = np.full(size, NO_SHAPE), np.full(size, NO_COLOUR)
    last_shape, visit = np.full(size, NO_SHAPE), np.full(size, NOTHING)
    for thing in sorted(scene.things, key=lambda thing: thing.start):
        span, after = slice(thing.start, thing.stop), slice(thing.stop, None)
        shape[span, thing.cell] = thing.shape
        colour[span, thing.cell] = thing.colour
        last_shape[after, thing.cell] = thing.shape
        visit[span, thing.cell] = OLD
        visit[thing.start, thing.cell] = NEW if thing.start else OLD
        visit[after, thing.cell] = LEFT_BRIEFLY if thing.is_brief else LEFT
    cell = seen_cells(scene.views, scene.num_steps, GRID)
    step = np.arange(scene.num_steps)[:, None]
    time = step * TIME_BINS // scene.num_steps + np.zeros_like(cell)
    seen = (label[step, cell] for label in (shape, colour, last_shape, visit))
    shape, colour, last_shape, visit = seen
    labels = (shape, colour, cell // GRID, cell % GRID, time, last_shape, visit)
    return CellLabels(*(label.ravel().astype(np.int64) for label in labels))


def stack_labels(labels: Sequence[CellLabels]) -> CellLabels:
    """Returns the labels of a batch, [B, V] each."""
    names = [field.name for field in fields(CellLabels)]
    return CellLabels(*(np.stack([getattr(x, name) for x in labels]) for name in names))
