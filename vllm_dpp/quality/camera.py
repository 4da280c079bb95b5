"""How a scene is filmed: a camera that pans, zooms, shakes, cuts, or lets in more light.

The scene wraps around, as on a torus: what leaves the picture on one side comes in on the other.
So nothing that is asked about is ever out of sight, and its place in the scene, which the light
shows, stays what it was.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np


@dataclass(frozen=True)
class View:
    """How one frame shows the scene. As given, it shows it as it is.

    Args:
        down: shift of the scene within the picture, in parts of its height.
        right: the same, in parts of its width.
        zoom: magnification about the middle of the picture.
        gain: factor of all colours.
    """

    down: float = 0.0
    right: float = 0.0
    zoom: float = 1.0
    gain: float = 1.0


STILL = "still"


def make_views(camera: str, num_frames: int, rng: np.random.Generator) -> tuple[View, ...]:
    """Returns the view of each frame.

    Args:
        camera: one of `CAMERAS`.
        num_frames: of the video, even.
        rng: of the camera alone.

    Returns:
        `num_frames` views; none if the camera is still.
    """
    return () if camera == STILL else tuple(_MAKERS[camera](num_frames, rng))


def _pan(num_frames: int, rng: np.random.Generator) -> list[View]:
    """In one direction, a cell of four on a side every step or every second or third."""
    angle = int(rng.integers(8)) * np.pi / 4
    down, right = np.sign(np.round((np.sin(angle), np.cos(angle)), 3))
    every, off = int(rng.integers(1, 4)), rng.uniform(-_SHAKE, _SHAKE, 2)
    moved = [_CELL * (t // 2 // every) for t in range(num_frames)]
    return [View(float(down * x + off[0]), float(right * x + off[1])) for x in moved]


def _zoom(num_frames: int, rng: np.random.Generator) -> list[View]:
    """Into the middle or out of it."""
    zooms = np.linspace(1, rng.uniform(1.08, 1.22), num_frames)
    return [View(zoom=float(zoom)) for zoom in (zooms if rng.random() < 0.5 else zooms[::-1])]


def _hand(num_frames: int, rng: np.random.Generator) -> list[View]:
    """Held by hand: a wandering of some pixels, less than a quarter of a cell."""
    shift, views = rng.normal(0, _SHAKE, 2), []
    for _ in range(num_frames):
        shift = np.clip(0.7 * shift + rng.normal(0, 0.7 * _SHAKE, 2), -2 * _SHAKE, 2 * _SHAKE)
        views.append(View(float(shift[0]), float(shift[1])))
    return views


def _cut(num_frames: int, rng: np.random.Generator) -> list[View]:
    """Another camera takes over, once or twice: all is elsewhere and in another light."""
    steps = num_frames // 2
    cuts = rng.choice(np.arange(1, steps), int(rng.integers(1, 3)), replace=False)
    view, views = View(), []
    for step in range(steps):
        if step in cuts:
            down, right = _CELL * rng.integers(0, 4, 2) + rng.uniform(-_SHAKE, _SHAKE, 2)
            view = View(float(down), float(right), gain=float(rng.uniform(0.8, 1.2)))
        views += [view, view]
    return views


def _exposure(num_frames: int, rng: np.random.Generator) -> list[View]:
    """The light of all changes at once: a flash, a shadow, or slowly."""
    last, gains = float(rng.uniform(0.65, 1.35)), np.ones(num_frames)
    if rng.random() < 0.5:
        gains = np.linspace(1, last, num_frames)
    for start in 2 * rng.choice(num_frames // 2, 2, replace=False):
        gains[start : start + 2] = rng.uniform(0.65, 1.35)
    return [View(gain=float(gain)) for gain in gains]


_CELL = 0.25
"""Of four on a side. Pans and cuts go by whole cells, and a little off: the small encoder hardly
reads a shape of which every token sees half."""
_SHAKE = 0.025

_MAKERS: dict[str, Callable[[int, np.random.Generator], list[View]]] = {
    "pan": _pan,
    "zoom": _zoom,
    "hand": _hand,
    "cut": _cut,
    "exposure": _exposure,
}

MOVING = tuple(_MAKERS)
CAMERAS = (STILL, *MOVING)


def film(frames: np.ndarray, views: Sequence[View]) -> None:
    """Makes `frames`, [T, H, W, 3] int16, what the camera sees. No views change nothing."""
    height, width = frames.shape[1:3]
    for frame, view in zip(frames, views, strict=False):
        if replace(view, gain=1.0) != View():
            middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
            back = np.array(  # from the picture to the scene
                [
                    [1 / view.zoom, 0, middle_x - middle_x / view.zoom - view.right * width],
                    [0, 1 / view.zoom, middle_y - middle_y / view.zoom - view.down * height],
                ]
            )
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            frame[:] = cv2.warpAffine(
                frame, back, (width, height), flags=flags, borderMode=cv2.BORDER_WRAP
            )
        if view.gain != 1:
            frame[:] = (frame * view.gain).round().astype(np.int16)


def seen_cells(views: Sequence[View], num_steps: int, grid: int) -> np.ndarray:
    """[num_steps, grid * grid] int64, the scene's cell at the middle of each cell of the picture.

    Args:
        views: two to a step; none if the camera is still.
        num_steps: of the video.
        grid: cells on a side.
    """
    still = np.tile(np.arange(grid * grid), (num_steps, 1))
    if not views:
        return still
    middles = (np.arange(grid) + 0.5) / grid - 0.5
    for step in range(num_steps):
        pair = views[2 * step : 2 * step + 2]
        zoom = np.mean([view.zoom for view in pair])
        rows, columns = (
            np.floor(grid * (middles / zoom + 0.5 - np.mean(shifts)) + 1e-6).astype(int) % grid
            for shifts in ([v.down for v in pair], [v.right for v in pair])
        )
        still[step] = (rows[:, None] * grid + columns).ravel()
    return still
