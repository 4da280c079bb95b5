"""Draw which tokens of a video were kept, over its frames.

A record says where the kept tokens are, not which frames of the file the server looked at. vLLM's
loader for Qwen2.5-VL spreads its frames evenly from the first on, so the number of slices gives
them. With another loader a picture may be a few frames off.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE_WIDTH = 400  # pixels of one picture, about
MARGIN, GAP, CAPTION, HEADER = 28, 16, 26, 78
DARKENED = 0.3  # brightness of a cell that did not enter or, if all did, was dropped; it is grey
ENTERED = 0.6  # of one that entered the decoder and was dropped in its middle, which is grey, too
BACKGROUND, FOREGROUND, MUTED, ACCENT = "#14161a", "#f2f3f5", "#9aa0aa", (255, 196, 61)


@dataclass(frozen=True)
class KeptVideo:
    """One video of a record.

    Args:
        kept: [slices, rows, columns] bool.
        title: What the record calls the request.
        entered: Of the same shape, what entered the decoder; ``None`` where everything did.
    """

    kept: np.ndarray
    title: str
    entered: np.ndarray | None = None

    @classmethod
    def load(cls, path: str | Path, index: int = 0) -> "KeptVideo":
        """Read video `index` of a `.kept.json`.

        Raises:
            ValueError: The file is no such record, or has no such video.
        """
        try:
            record = json.loads(Path(path).read_text())
            videos: list[Any] = sorted(record["videos"], key=lambda video: video["start"])
            if not 0 <= index < len(videos):
                raise ValueError(f"it has {len(videos)} videos, so there is no video {index}")
            if videos[index].get("from_cache"):
                raise ValueError(
                    f"video {index} came from the prefix cache, so that nothing was selected: the "
                    "record of the request that sent it first has what was kept"
                )
            kept, entered = _masks(videos[index])
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise ValueError(f"{path} is not a record of kept tokens: {error}") from error
        which = "" if len(videos) == 1 else f", video {index + 1} of {len(videos)}"
        return cls(kept, record["request_id"] + which, entered)


def _masks(video: dict[str, Any]) -> tuple[np.ndarray, np.ndarray | None]:
    """[slices, rows, columns] bool each: what was kept, and what entered if not all did."""
    kept = np.zeros(video["grid"], dtype=bool)
    if "entered" not in video:
        kept.reshape(-1)[video["keep"]] = True
        return kept, None
    indices = np.array(video["entered"], dtype=int)
    if len(indices) != video["num_entered"]:
        raise ValueError(
            f"{video['num_entered'] - len(indices)} of its tokens came from the prefix cache: the "
            "record of the request that sent it first has what entered"
        )
    entered = np.zeros_like(kept)
    entered.reshape(-1)[indices] = True
    kept.reshape(-1)[indices[video["keep"]] if "keep" in video else indices] = True
    return kept, entered


def main(argv: Sequence[str]) -> int:
    """`vllm-dpp show`."""
    parser = argparse.ArgumentParser(
        prog="vllm-dpp show",
        description="Draw which tokens of a video were kept: one picture for each temporal slice "
        "(its first frame), with dropped tokens dark. Records are written by a server with "
        "--record-dir for requests with the extra argument dpp_record.",
        epilog="The record names no frames: slices are taken to lie evenly over the video, as "
        "vLLM samples for Qwen2.5-VL. With another video loader a picture may be a few frames off.",
    )
    parser.add_argument("--record", required=True, metavar="FILE", help="a .kept.json")
    parser.add_argument("--video", required=True, metavar="FILE", help="the video that was sent")
    parser.add_argument("--output", required=True, metavar="FILE", help="the picture to write")
    parser.add_argument("--columns", type=int, metavar="N", help="slices side by side")
    parser.add_argument(
        "--index", type=int, default=0, metavar="N", help="which video of the record (default: 0)"
    )
    args = parser.parse_args(argv)
    if args.columns is not None and args.columns < 1:
        parser.error(f"--columns must be at least 1, got {args.columns}")
    video = KeptVideo.load(args.record, args.index)
    picture = draw(video, read_frames(args.video, len(video.kept)), args.columns)
    picture.save(args.output)
    print(args.output)
    return 0


def read_frames(path: str | Path, num_slices: int) -> list[np.ndarray]:
    """The first frame of each slice, `[H, W, 3] uint8` RGB.

    Raises:
        OSError: The video cannot be read.
    """
    capture = cv2.VideoCapture(str(path))
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    frames: list[np.ndarray] = []
    for wanted in slice_positions(total, num_slices):
        capture.set(cv2.CAP_PROP_POS_FRAMES, wanted)
        found, frame = capture.read()
        if not found:
            break
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    capture.release()
    if len(frames) < num_slices:
        raise OSError(f"cannot read {num_slices} frames of the video {path}")
    return frames


def slice_positions(num_frames: int, num_slices: int) -> list[int]:
    """The first frame of each slice, where `2 * num_slices` frames are spread evenly."""
    return [i * num_frames // num_slices for i in range(num_slices)]


def draw(video: KeptVideo, frames: Sequence[np.ndarray], columns: int | None = None) -> Image.Image:
    """One picture of all slices.

    Args:
        video: What was kept.
        frames: `[H, W, 3] uint8` RGB of any size, one for each slice.
        columns: slices side by side; `None` chooses.
    """
    num_slices = len(video.kept)
    columns = min(columns or 4, num_slices)
    entered = video.kept if video.entered is None else video.entered
    tiles = [draw_slice(*each) for each in zip(frames, video.kept, entered, strict=True)]
    width, height = tiles[0].size
    lines = -(-num_slices // columns)
    canvas = Image.new(
        "RGB",
        (
            max(2 * MARGIN + columns * (width + GAP) - GAP, 560),
            MARGIN + HEADER + lines * (height + CAPTION + GAP) - GAP + MARGIN,
        ),
        BACKGROUND,
    )
    pen = ImageDraw.Draw(canvas)
    _draw_header(pen, video)
    for i, tile in enumerate(tiles):
        x = MARGIN + i % columns * (width + GAP)
        y = MARGIN + HEADER + i // columns * (height + CAPTION + GAP)
        canvas.paste(tile, (x, y + CAPTION))
        _draw_caption(pen, x, y, width, i, video.kept[i])
    return canvas


def draw_slice(
    frame: np.ndarray, kept: np.ndarray, entered: np.ndarray | None = None
) -> Image.Image:
    """One frame with dropped cells dark and a line around kept ones.

    Args:
        frame: `[H, W, 3] uint8` RGB.
        kept: `[rows, columns] bool`.
        entered: of the same shape, cells that are less dark if they are dropped.
    """
    rows, columns = kept.shape
    cell = max(6, round(TILE_WIDTH / columns))
    picture = cv2.resize(frame, (columns * cell, rows * cell), interpolation=cv2.INTER_AREA)
    square = np.ones((cell, cell), dtype=bool)
    bright = np.kron(kept, square)
    light = np.where(False if entered is None else np.kron(entered, square), ENTERED, DARKENED)
    dark = (cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY) * light).astype(np.uint8)
    picture = np.where(bright[..., None], picture, dark[..., None])
    picture[_border(bright)] = ACCENT
    return Image.fromarray(picture)


def _border(bright: np.ndarray) -> np.ndarray:
    """The outermost pixels of every bright area."""
    padded = np.pad(bright, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return bright & ~inner


def _draw_header(pen: ImageDraw.ImageDraw, video: KeptVideo) -> None:
    slices, rows, columns = video.kept.shape
    kept, total = int(video.kept.sum()), video.kept.size
    entering = ""
    if video.entered is not None:
        entering = f", {int(video.entered.sum()):,} entered the decoder"
    pen.text(
        (MARGIN, MARGIN - 6),
        f"{kept:,} of {total:,} video tokens kept ({kept / total:.0%}){entering}",
        font=_font(25),
        fill=FOREGROUND,
    )
    pen.text(
        (MARGIN, MARGIN + 30),
        f"{slices} slices of {rows} x {columns} tokens   ·   {video.title}",
        font=_font(15),
        fill=MUTED,
    )


def _draw_caption(
    pen: ImageDraw.ImageDraw, x: int, y: int, width: int, number: int, kept: np.ndarray
) -> None:
    pen.text((x, y + 18), f"slice {number}", font=_font(15), fill=FOREGROUND, anchor="ls")
    pen.text(
        (x + width, y + 18),
        f"{int(kept.sum())} / {kept.size} kept",
        font=_font(15),
        fill=MUTED,
        anchor="rs",
    )


def _font(size: int) -> Any:
    return ImageFont.load_default(size)
