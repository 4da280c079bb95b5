"""Synthetic videos: frames, an mp4 of them, and the forms in which vLLM takes either."""

import base64
from pathlib import Path
from typing import Any

import cv2
import numpy as np

Frames = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]

NUM_SHAPES = 4
NOISE_LEVELS = 33  # of 256


def render_frames(seed: int, num_frames: int, height: int, width: int) -> Frames:
    """Renders coloured shapes that move, appear and vanish over a drifting background.

    Noise lies over every pixel of every frame, so no two patches are equal. The same
    arguments give the same frames.

    Args:
        seed: of the colours, the paths and the noise.
        num_frames: T.
        height: H, in pixels.
        width: W, in pixels.

    Returns:
        `[T, H, W, 3] uint8`, RGB.
    """
    rng = np.random.default_rng(seed)
    frames = _background(rng, num_frames, height, width)
    for i in range(NUM_SHAPES):
        _draw_shape(frames, rng, is_disc=i % 2 == 0)
    noise = rng.integers(0, NOISE_LEVELS, frames.shape, dtype=np.int16)
    return np.clip(frames + noise - NOISE_LEVELS // 2, 0, 255).astype(np.uint8)


def _background(rng: np.random.Generator, num_frames: int, height: int, width: int) -> np.ndarray:
    """Returns a smooth random texture that drifts. `[T, H, W, 3] int16`, 64 to 192."""
    coarse = rng.random((8, 8, 3), dtype=np.float32)
    texture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    texture = (64 + 128 * texture).astype(np.int16)
    step = rng.integers(1, 4, 2)
    return np.stack([np.roll(texture, tuple(t * step), (0, 1)) for t in range(num_frames)])


def _draw_shape(frames: np.ndarray, rng: np.random.Generator, is_disc: bool) -> None:
    """Draws a disc or a square along a straight path, for at least half of the frames.

    Args:
        frames: `[T, H, W, 3] int16`, drawn into.
        rng: for the colour, the path, the size and the time.
        is_disc: a disc, else a square.
    """
    num_frames, height, width, _ = frames.shape
    colour = rng.choice([16, 128, 240], 3)
    radius = rng.uniform(0.08, 0.16) * min(height, width)
    start, end = rng.uniform(0, [height, width], (2, 2))
    first = int(rng.integers(0, num_frames // 2 + 1))
    last = min(num_frames, first + (num_frames + 1) // 2)
    rows, columns = np.ogrid[:height, :width]
    for t in range(first, last):
        y, x = start + (end - start) * t / max(1, num_frames - 1)
        dy, dx = abs(rows - y), abs(columns - x)
        inside = dy**2 + dx**2 < radius**2 if is_disc else np.maximum(dy, dx) < radius
        frames[t][inside] = colour


def write_mp4(path: str | Path, frames: Frames, fps: float) -> Path:
    """Writes `frames`, `[T, H, W, 3] uint8` RGB, as an mp4 (lossy) at `fps` frames a second.

    Returns:
        `path`.

    Raises:
        OSError: OpenCV cannot write there.
    """
    _, height, width, _ = frames.shape
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (width, height))
    if not writer.isOpened():
        raise OSError(f"OpenCV cannot write {path}")
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
    return Path(path)


def as_data_url(path: str | Path) -> str:
    """Returns the mp4 at `path` as a URL for the `video_url` of a chat message."""
    return "data:video/mp4;base64," + base64.b64encode(Path(path).read_bytes()).decode()


def vllm_video(frames: Frames, fps: float) -> tuple[Frames, dict[str, Any]]:
    """Returns one video for `multi_modal_data={"video": …}` of vLLM's offline `LLM`.

    Args:
        frames: `[T, H, W, 3] uint8`, used as they are, none sampled away.
        fps: frames a second, from which the model derives the positions in time.
    """
    return frames, {
        "fps": fps,
        "duration": len(frames) / fps,
        "total_num_frames": len(frames),
        "frames_indices": list(range(len(frames))),
        "video_backend": "opencv",
        "do_sample_frames": False,
    }
