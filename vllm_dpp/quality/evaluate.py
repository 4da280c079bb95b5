"""Accuracy on held-out videos, per kind of question, in plain torch.

python -m vllm_dpp.quality.evaluate --model DIR [--split moving | film] [--turn 1]
    [--cells 2 3] [--videos N] [--floors] [--keep SHARE]
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_dpp.quality import network
from vllm_dpp.quality.batches import (
    TEST_SEEDS,
    Batch,
    BatchSize,
    draw_questions,
    fewer_films,
    make_batch,
    make_film_batch,
)
from vllm_dpp.quality.film import make_film, moment_questions
from vllm_dpp.quality.labels import NO_SHAPE
from vllm_dpp.quality.learner import embed, to_tensors
from vllm_dpp.quality.model import load_model
from vllm_dpp.quality.questions import KINDS, chance_levels
from vllm_dpp.quality.scene import DENSE, GRID, MOVED, STANDARD, Cells, SceneSpec, make_scene

SPLITS = {"standard": STANDARD, "moving": MOVED, "dense": DENSE}
_FILM = "film"
_SIZE = BatchSize()
_WHOLE = [GRID, GRID]


@dataclass(frozen=True)
class Score:
    """Right answers of a number of questions."""

    right: int
    asked: int

    @property
    def accuracy(self) -> float:
        """Share of right answers; NaN without questions."""
        return self.right / self.asked if self.asked else math.nan

    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy (Wilson)."""
        if not self.asked:
            return 0.0, 1.0
        z, n, p = 1.959964, self.asked, self.accuracy
        centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
        return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)

    def __add__(self, other: "Score") -> "Score":
        return Score(self.right + other.right, self.asked + other.asked)


Scores = dict[str, Score]
"""Per kind, without kinds that were not asked."""


def held_out_batches(
    spec: SceneSpec,
    num_videos: int,
    size: BatchSize = _SIZE,
    turn: int = 0,
    cells: Cells = (GRID, GRID),
) -> Iterator[Batch]:
    """Batches of the first `num_videos` test videos, all kinds asked equally often if possible.

    Args:
        spec: of the videos.
        num_videos: at least one.
        size: of a batch.
        turn: how many other questions are asked and answered before each.
        cells: (rows, columns) of a frame.
    """
    equal = dict.fromkeys(KINDS, 1.0)
    seeds = TEST_SEEDS[:num_videos]
    for first in range(0, num_videos, size.num_videos):
        scenes = [make_scene(seed, spec) for seed in seeds[first : first + size.num_videos]]
        drawn = [draw_questions(scene, equal, size.num_places) for scene in scenes]
        asked = [[tuple(q[i - turn : i + 1]) for i in range(turn, len(q))] for q in drawn]
        yield make_batch(scenes, asked, size, cells)


def held_out_films(num_films: int, size: BatchSize = _SIZE) -> Iterator[Batch]:
    """Batches of the first `num_films` films, asked about what is seen in them for a moment."""
    for seed in TEST_SEEDS[:num_films]:
        film = make_film(seed)
        asked = [(question,) for question in moment_questions(film)]
        yield make_film_batch([film], [asked], fewer_films(size))


@torch.inference_mode()
def score(
    model: Any, batches: Iterator[Batch], floors: bool = False, keep: float = 1.0
) -> dict[int, Scores]:
    """Asks `model` everything in `batches`.

    Args:
        model: a `Qwen2_5_VLForConditionalGeneration` of L layers.
        batches: of held-out videos.
        floors: also for every layer K < L, with all video tokens dropped before layer K.
        keep: share of the video tokens that enter the decoder, as if one knew what they show:
            those of things first, then others at random.

    Returns:
        Scores by K; L stands for nothing dropped.
    """
    depth = len(model.model.language_model.layers)
    drops = list(range(depth)) if floors else []
    totals: dict[int, Scores] = {drop: {} for drop in [*drops, depth]}
    for batch in batches:
        for drop, right in _answers(model, batch, drops, keep).items():
            _add(totals[drop], batch, right)
    return totals


def _answers(model: Any, batch: Batch, drops: Sequence[int], keep: float) -> dict[int, Tensor]:
    """By layer of the drop, [B, G] bool right answers."""
    device = model.device
    packs = to_tensors(batch.packs, device)
    frames = torch.from_numpy(batch.frames).to(device)
    cells = network.cells_of(frames)
    video = network.encode_videos(model, network.patchify(frames), len(frames), cells)
    hidden, turns, mask = embed(model, video, packs, batch.prefix)
    num_video = video.shape[1]
    if keep < 1:
        entering = _things_first(batch, round(keep * num_video)).to(device)
        hidden, turns, mask = _enter(hidden, turns, mask, num_video, entering)
        num_video = entering.shape[1]
    layers = model.model.language_model.layers
    text = _text_tokens(hidden.shape[1], num_video, packs["token_ids"].shape[1], device)
    results = {}
    for depth, layer in enumerate(layers):
        if depth in drops:
            short = hidden[:, text]
            short_turns = (turns[0][:, :, text], turns[1][:, :, text])
            short_mask = mask[..., text]
            for upper in layers[depth:]:
                short = network.decoder_layer(upper, short, short_turns, short_mask)
            results[depth] = _right(model, short, packs)
        hidden = network.decoder_layer(layer, hidden, turns, mask)
    results[len(layers)] = _right(model, hidden, packs)
    return results


def _things_first(batch: Batch, count: int) -> Tensor:
    """[B, count] int64, ascending: which video tokens stay."""
    if batch.labels is None:
        raise ValueError("what a token shows is known of whole frames alone")
    shown = torch.from_numpy(batch.labels.shape != NO_SHAPE)
    order = shown + torch.rand(shown.shape, generator=torch.Generator().manual_seed(0))
    return order.topk(count).indices.sort().values


def _enter(
    hidden: Tensor, turns: tuple[Tensor, Tensor], mask: Tensor, num_video: int, index: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Input of the decoder with the video tokens at `index`, [B, k], alone."""
    rows = torch.arange(len(hidden), device=hidden.device)[:, None]
    stop = hidden.shape[1] - mask.shape[2] - 1  # as in `_text_tokens`
    tokens = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
    start = stop - num_video
    places = torch.cat([tokens[:, :start], start + index, tokens[:, stop:]], 1)
    cos, sin = (turn[:, 0][rows, places][:, None] for turn in turns)
    return hidden[rows, places], (cos, sin), mask[:, 0].mT[rows, places].mT[:, None]


def _text_tokens(length: int, num_video: int, num_questions: int, device: Any) -> Tensor:
    """Indices of all tokens but the video's, which end one before the questions."""
    tokens = torch.arange(length, device=device)
    stop = length - num_questions - 1
    return tokens[(tokens < stop - num_video) | (tokens >= stop)]


def _right(model: Any, hidden: Tensor, packs: dict[str, Tensor]) -> Tensor:
    own = hidden[:, -packs["token_ids"].shape[1] :]
    rows = torch.arange(len(own), device=own.device)[:, None]
    logits = network.final_logits(model, own[rows, packs["ask_at"]])
    return logits.argmax(-1) == packs["answers"]


def _add(scores: Scores, batch: Batch, right: Tensor) -> None:
    for index, kind in enumerate(KINDS):
        asked = batch.packs.kinds == index
        if asked.any():
            new = Score(int(right.cpu().numpy()[asked].sum()), int(asked.sum()))
            scores[kind] = scores.get(kind, Score(0, 0)) + new


def overall(scores: Scores) -> Score:
    """All questions together."""
    return sum(scores.values(), Score(0, 0))


def table(scores: dict[int, Scores], chance: dict[str, float]) -> str:
    """Text: a row per kind; chance, accuracy with its interval, and floors by layer, in %."""
    full = max(scores)
    floors = [drop for drop in sorted(scores) if drop != full]
    lines = [f"{'kind':10}{'n':>6}{'chance':>8}{'right':>8}  95 %        "]
    lines[0] += "".join(f"{f'K={drop}':>6}" for drop in floors)
    for kind, own in [*scores[full].items(), ("all", overall(scores[full]))]:
        low, high = own.interval()
        guess = f"{100 * chance[kind]:8.1f}" if kind in chance else " " * 8
        line = f"{kind:10}{own.asked:6}{guess}{100 * own.accuracy:8.1f}"
        line += f"  {100 * low:5.1f}-{100 * high:5.1f} "
        for drop in floors:
            at = overall(scores[drop]) if kind == "all" else scores[drop][kind]
            line += f"{100 * at.accuracy:6.0f}"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of the module."""
    parser = argparse.ArgumentParser(prog="python -m vllm_dpp.quality.evaluate")
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--split", choices=[*SPLITS, _FILM], default="standard")
    parser.add_argument("--videos", type=int, default=200)
    parser.add_argument("--turn", type=int, default=0, help="questions asked before each")
    parser.add_argument("--floors", action="store_true", help="drop the video at every layer")
    parser.add_argument(
        "--cells",
        type=int,
        nargs=2,
        default=_WHOLE,
        metavar=("ROWS", "COLUMNS"),
        help="of a frame (%(default)s)",
    )
    parser.add_argument(
        "--keep",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="of the video: tokens that show a thing first, by knowing, then others at random",
    )
    parser.add_argument("--json", type=Path, help="also write the scores here")
    options = parser.parse_args(arguments)
    if not all(2 <= side <= GRID for side in options.cells):
        parser.error(f"--cells must be 2 to {GRID} each")
    if not 0 < options.keep <= 1:
        parser.error("--keep is a share, in (0, 1]")
    if options.keep < 1 and options.cells != _WHOLE:
        parser.error("--keep knows what whole frames show: leave out --cells")
    if options.videos < 1:
        parser.error("--videos must be at least 1")
    if options.split == _FILM and (options.turn, options.cells, options.keep) != (0, _WHOLE, 1):
        parser.error("films are asked as they are: leave out --turn, --cells and --keep")
    model, _ = load_model(options.model)
    if options.split == _FILM:
        batches, chance = held_out_films(options.videos), {}
    else:
        spec, cells = SPLITS[options.split], tuple(options.cells)
        batches = held_out_batches(spec, options.videos, turn=options.turn, cells=cells)
        chance = chance_levels(spec, range(TEST_SEEDS.stop - 10_000, TEST_SEEDS.stop))
    scores = score(model, batches, options.floors, options.keep)
    print(table(scores, chance))
    if options.json:
        plain = {
            drop: {kind: asdict(x) for kind, x in kinds.items()} for drop, kinds in scores.items()
        }
        options.json.write_text(json.dumps({"chance": chance, "scores": plain}, indent=1) + "\n")


if __name__ == "__main__":
    main()
