"""Does real footage look to the rules as the task's own videos do?

    vllm-dpp bench footage VIDEO... [--output FILE]

The constants of the rule ``change`` were chosen on rendered videos. Here is what they are about, of
real videos beside rendered ones: how much tokens change (its floor and range), how many directions
they span (the share of S⁴), and how many add anything to the others (the least gain). Features are
those of the project's small model, which was trained on rendered shapes, and plain pixels, which
are nobody's. The vision encoder of a large model is neither: what holds for both of these may hold
for it.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from vllm_dpp.bench.provenance import one_line, provenance
from vllm_dpp.bench.summary import table
from vllm_dpp.pruning import PruningConfig, keep_indices
from vllm_dpp.pruning.budget import num_kept
from vllm_dpp.pruning.dpp.greedy_map import greedy_map
from vllm_dpp.pruning.dpp.kernel import conditioned_kernel
from vllm_dpp.pruning.rows import unit_rows
from vllm_dpp.pruning.rules.change import OBJECTIVE, change, quality
from vllm_dpp.pruning.video import VideoTokens
from vllm_dpp.quality import network
from vllm_dpp.quality.evaluate import SPLITS
from vllm_dpp.quality.model import TRAINED, load_model
from vllm_dpp.quality.render import FPS, SIDE, render
from vllm_dpp.quality.scene import FRAMES_PER_STEP, NUM_CELLS, make_scene
from vllm_dpp.quality.shapes import CELL

MODULE = "vllm_dpp.bench.footage"
FIRST_SEED, NUM_RENDERED = 600_000, 8
"""Of the rendered videos: held out, and of no test set."""
MOST_SLICES = 16
"""A segment by default."""
SHARE = 0.4


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns 0.

    Raises:
        ValueError: A video cannot be read, or has fewer than two slices.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="vllm-dpp bench footage", description=__doc__)
    parser.add_argument("videos", nargs="+", type=Path, metavar="VIDEO", help="an mp4")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON of the figures")
    options = parser.parse_args(arguments)
    model, _ = load_model(TRAINED)
    rows = []
    with torch.inference_mode():
        for name, clips in _clips(options.videos):
            for kind in ("encoder", "pixels"):
                found = [measure(features(model, clip, kind), len(clip) // 2) for clip in clips]
                rows.append(
                    {"video": name, "features": kind, "tokens": len(clips[0]) // 2 * NUM_CELLS}
                    | {key: float(np.mean([one[key] for one in found])) for key in found[0]}
                )
    document: dict[str, Any] = {"provenance": provenance(MODULE, arguments), "rows": rows}
    header = list(rows[0])
    print(one_line(document["provenance"]) + "\n")
    print(table(header, [[_shown(row[key]) for key in header] for row in rows]))
    if options.output:
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def measure(tokens: Tensor, num_slices: int) -> dict[str, float]:
    """What the rule sees of a video.

    Args:
        tokens: [N, D] float32.
        num_slices: Of the video, at least 2.

    Returns:
        Deciles of change, the mean quality, how many directions hold 90 and 99 % of the tokens'
        energy, the median likeness of two tokens, the share of the first slice that is kept, and
        the share of all tokens that the rule would take for what they add, before it goes by time.
    """
    budget = num_kept(len(tokens), SHARE)
    video = VideoTokens(tokens, None, budget, num_slices)
    moved = change(video)
    later = moved[len(tokens) // num_slices :]
    likeness = unit_rows(tokens) @ unit_rows(tokens).T
    energy = torch.linalg.eigvalsh(likeness.double()).flip(0).clamp(min=0).cumsum(0)
    energy = energy / energy[-1]
    config = PruningConfig(rule="change", relevance="none", segment_by="one")
    (kept,) = keep_indices([video], config)
    worth = quality(moved)[None]
    kernel = conditioned_kernel(tokens[None], worth, OBJECTIVE.quartic)
    every, budgets = torch.ones_like(worth, dtype=torch.bool), torch.tensor([len(tokens)])
    greedy = greedy_map(kernel, worth, every, budgets, len(tokens), OBJECTIVE)
    return {
        **{f"change p{p}": float(later.quantile(p / 100)) for p in (10, 50, 90)},
        "quality": float(worth.mean()),
        "directions 90 %": int((energy < 0.9).sum()) + 1,
        "directions 99 %": int((energy < 0.99).sum()) + 1,
        "likeness p50": float(likeness.flatten().quantile(0.5)),
        "first slice kept": float((kept < len(tokens) // num_slices).float().sum())
        / (len(tokens) // num_slices),
        "taken by gain": float((greedy.order >= 0).sum()) / len(tokens),
    }


def features(model: Any, frames: np.ndarray, kind: str) -> Tensor:
    """[N, D] float32 tokens of `[T, SIDE, SIDE, 3] uint8` frames."""
    if kind == "encoder":
        return network.encode_videos(model, network.patchify(torch.from_numpy(frames)[None]), 1)[0]
    side = SIDE // CELL
    cut = torch.from_numpy(frames).float() / 127.5 - 1
    cut = cut.view(-1, FRAMES_PER_STEP, side, CELL, side, CELL, 3).permute(0, 2, 4, 1, 3, 5, 6)
    return cut.reshape(len(frames) // FRAMES_PER_STEP * NUM_CELLS, -1)


def _clips(paths: Sequence[Path]) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Real videos, each as all pieces of a frame that are as large as the task's, and rendered."""
    for split in ("standard", "moving"):
        seeds = range(FIRST_SEED, FIRST_SEED + NUM_RENDERED)
        yield f"rendered, {split}", [render(make_scene(seed, SPLITS[split])) for seed in seeds]
    for path in paths:
        yield path.name, _pieces(_read(path))


def _read(path: Path) -> np.ndarray:
    """[T, H, W, 3] uint8 RGB at 2 frames a second, an even number, `SIDE` pixels high."""
    capture = cv2.VideoCapture(str(path))
    every = max(1.0, capture.get(cv2.CAP_PROP_FPS) / FPS)
    frames: list[np.ndarray] = []
    number = 0
    while (read := capture.read())[0]:
        if number >= round(len(frames) * every):
            height, width, _ = read[1].shape
            size = (max(SIDE, round(width * SIDE / height)), SIDE)
            scaled = cv2.resize(read[1], size, interpolation=cv2.INTER_AREA)
            frames.append(cv2.cvtColor(scaled, cv2.COLOR_BGR2RGB))
        number += 1
    capture.release()
    count = min(len(frames) // FRAMES_PER_STEP, MOST_SLICES) * FRAMES_PER_STEP
    if count < 2 * FRAMES_PER_STEP:
        raise ValueError(f"{path}: expected a video of two seconds or more")
    return np.stack(frames[:count])


def _pieces(frames: np.ndarray) -> list[np.ndarray]:
    """Squares of `SIDE` pixels side by side."""
    width = frames.shape[2]
    return [
        np.ascontiguousarray(frames[:, :, left : left + SIDE])
        for left in range(0, width - SIDE + 1, SIDE)
    ]


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


if __name__ == "__main__":
    sys.exit(main())
