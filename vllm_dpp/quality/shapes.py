"""The shapes as masks, one cell large."""

from functools import cache

import cv2
import numpy as np

from vllm_dpp.quality.words import SHAPES

CELL = 28
"""Pixels on a side of a cell: two patches of 14, which the encoder merges into one token."""

_CENTRE = (CELL - 1) / 2
_RADIUS = 10.0


@cache
def shape_masks() -> np.ndarray:
    """Returns `[len(SHAPES), CELL, CELL] bool`, in the order of `SHAPES`, centred."""
    y, x = np.mgrid[:CELL, :CELL] - _CENTRE
    distance, square = np.hypot(x, y), np.maximum(abs(x), abs(y))
    masks = {
        "circle": distance < _RADIUS - 0.5,
        "square": square < _RADIUS,
        "triangle": _polygon(_corners(3, _RADIUS + 1)),
        "cross": ((abs(x) < 3) | (abs(y) < 3)) & (square < _RADIUS),
        "ring": (distance < _RADIUS) & (distance > _RADIUS - 4),
        "diamond": abs(x) + abs(y) < _RADIUS + 0.5,
        "star": _polygon(_corners(10, _RADIUS + 1, 0.4)),
        "heart": _heart(x, y),
        "arrow": _arrow(x, y),
        "moon": (distance < _RADIUS) & (np.hypot(x - 5, y + 2) > _RADIUS - 1.5),
    }
    return np.stack([masks[name] for name in SHAPES])


def _corners(count: int, radius: float, inner: float = 1.0) -> np.ndarray:
    """`[count, 2]` points (x, y) around the centre, from the top; odd ones at `inner` radius."""
    angles = 2 * np.pi * np.arange(count) / count - np.pi / 2
    radii = radius * np.where(np.arange(count) % 2, inner, 1.0)
    if inner == 1.0:
        radii = np.full(count, radius)
    return _CENTRE + np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)


def _polygon(corners: np.ndarray) -> np.ndarray:
    """`[CELL, CELL] bool`, the inside of a polygon."""
    canvas = np.zeros((CELL, CELL), np.uint8)
    cv2.fillPoly(canvas, [corners.round().astype(np.int32)], 1)
    return canvas.astype(bool)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    lobes = np.hypot(abs(x) - 4.7, y + 3.5) < 5.3
    point = (y > -3) & (abs(x) < 0.78 * (_RADIUS - y))
    return lobes | (point & (abs(x) < 9.5))


def _arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """An arrow to the right."""
    shaft = (abs(y) < 2.5) & (x > -_RADIUS) & (x < 3)
    head = (x >= 0) & (abs(y) < _RADIUS - x)
    return shaft | head
