"""Draws a scene: real frames with a background that drifts, noise, changing light, a camera."""

from functools import cache

import cv2
import numpy as np

from vllm_dpp.quality.camera import film
from vllm_dpp.quality.scene import FRAMES_PER_STEP, GRID, Cells, Distractor, Scene, Thing
from vllm_dpp.quality.shapes import CELL, shape_masks
from vllm_dpp.quality.words import COLOURS
from vllm_dpp.toy.video import Frames

SIDE = GRID * CELL
"""Height and width of a frame in pixels."""

FPS = 2.0
"""Frames a second: one step is one second."""

NOISE_STD = 6.0
_NOISE_BANK = 32
_PALETTE = np.array(list(COLOURS.values()), np.int16)


def render(scene: Scene) -> Frames:
    """Draws `scene`. Returns `[T, SIDE, SIDE, 3] uint8`, RGB; equal scenes give equal frames."""
    rng = np.random.default_rng((scene.seed, scene.num_steps, 1))
    frames = _background(rng, scene.num_steps * FRAMES_PER_STEP)
    for distractor in scene.distractors:
        _draw_distractor(frames, distractor, rng)
    for thing in scene.things:
        _draw_thing(frames, thing, rng)
    film(frames, scene.views)
    frames += _noise()[rng.integers(0, _NOISE_BANK, len(frames))]
    return np.clip(frames, 0, 255, out=frames).astype(np.uint8)


def shrink(frames: Frames, cells: Cells) -> Frames:
    """`frames` in fewer pixels: (rows, columns) of cells, of which each makes a token."""
    size = (cells[1] * CELL, cells[0] * CELL)
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])


def _background(rng: np.random.Generator, num_frames: int) -> np.ndarray:
    """`[T, SIDE, SIDE, 3] int16`: light from above and from the left, and a drifting texture.

    The sky is brighter than the ground, the left is warmer than the right, and the light goes
    from green to purple as the video passes. So a patch shows where and when it is, as patches
    of real videos often do, and adjacent frames are nearly but never quite equal.
    """
    texture = (_smooth(rng, SIDE + 32, 5, 12.0) + rng.uniform(-8, 8)).astype(np.int16)
    velocity, centre = rng.uniform(-2, 2, 2), 16
    frames = np.empty((num_frames, SIDE, SIDE, 3), np.int16)
    for t in range(num_frames):
        y, x = np.clip(centre + velocity * (t - num_frames / 2), 0, 32).astype(int)
        frames[t] = texture[y : y + SIDE, x : x + SIDE]
    progress = (np.arange(num_frames) + 0.5) / num_frames - 0.5
    dusk = (progress[:, None] * _DUSK).round().astype(np.int16)
    frames += _light()
    frames += dusk[:, None, None, :]
    return frames


_DUSK = np.array([20.0, -50.0, 20.0])


@cache
def _light() -> np.ndarray:
    """`[SIDE, SIDE, 3] int16`, the light that is the same in every video."""
    fall = np.linspace(60, -60, SIDE)[:, None, None] * np.ones(3)
    side = np.linspace(1, -1, SIDE)[None, :, None] * np.array([40.0, 0.0, -40.0])
    return (128 + fall + side).round().astype(np.int16)


@cache
def _noise() -> np.ndarray:
    """`[_NOISE_BANK, SIDE, SIDE, 3] int16`. A bank: fresh noise would cost more than the rest."""
    noise = np.random.default_rng(0).standard_normal((_NOISE_BANK, SIDE, SIDE, 3))
    return np.clip(NOISE_STD * noise, -30, 30).round().astype(np.int16)


def _smooth(rng: np.random.Generator, side: int, knots: int, amplitude: float) -> np.ndarray:
    """`[side, side, 3] float32`, a smooth random texture within ± `amplitude`."""
    coarse = rng.uniform(-amplitude, amplitude, (knots, knots, 3)).astype(np.float32)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_LINEAR)


def _draw_thing(frames: np.ndarray, thing: Thing, rng: np.random.Generator) -> None:
    """Draws a thing, which floats a little within its cell."""
    colour = _PALETTE[thing.colour] + rng.integers(-12, 13, 3)
    from_, to = rng.uniform(-2.4, 2.4, (2, 2))
    rows, columns = np.nonzero(shape_masks()[thing.shape])
    top, left = (CELL * i for i in divmod(thing.cell, GRID))
    for t in range(thing.start * FRAMES_PER_STEP, thing.stop * FRAMES_PER_STEP):
        dy, dx = (from_ + (to - from_) * t / len(frames)).round().astype(int)
        inside_y, inside_x = np.clip(rows + dy, 0, CELL - 1), np.clip(columns + dx, 0, CELL - 1)
        frames[t, top + inside_y, left + inside_x] = colour


def _draw_distractor(frames: np.ndarray, distractor: Distractor, rng: np.random.Generator) -> None:
    """Draws a mosaic or a scribble, for each step a new one if it flickers."""
    top, left = (CELL * i + 2 for i in divmod(distractor.cell, GRID))
    side = CELL - 4
    pattern = _pattern(rng, distractor.family, side)
    for step in range(distractor.start, distractor.stop):
        if distractor.flickers:
            pattern = _pattern(rng, distractor.family, side)
        span = slice(step * FRAMES_PER_STEP, (step + 1) * FRAMES_PER_STEP)
        frames[span, top : top + side, left : left + side] = pattern


def _pattern(rng: np.random.Generator, family: int, side: int) -> np.ndarray:
    """`[side, side, 3] int16`, in muted colours, so that it is no shape's."""
    if family:
        return (128 + _smooth(rng, side, 5, 75.0)).astype(np.int16)
    tiles = rng.integers(50, 206, (4, 4, 3)).astype(np.int16)
    return tiles.repeat(side // 4, 0).repeat(side // 4, 1)
