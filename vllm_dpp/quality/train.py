"""Trains the small model on the task.

python -m vllm_dpp.quality.train --out DIR [--start MODEL] [--seed S] [--steps N] [--minutes M]
    [--resume]

DIR/model is the checkpoint, DIR/log the progress, DIR/log.jsonl the same for programs,
DIR/curves.png the curves, DIR/state.pt what `--resume` needs.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_dpp.quality import schedule
from vllm_dpp.quality.batches import BatchSize
from vllm_dpp.quality.curves import draw_curves
from vllm_dpp.quality.evaluate import (
    Scores,
    held_out_batches,
    held_out_films,
    overall,
    score,
)
from vllm_dpp.quality.feed import Feed
from vllm_dpp.quality.learner import Heads, Step, answer_step, vision_step
from vllm_dpp.quality.model import load_model, make_model, save_model
from vllm_dpp.quality.packing import tokenizer
from vllm_dpp.quality.questions import KINDS
from vllm_dpp.quality.scene import TRAINING

LONGEST_STEP = 30.0
"""Seconds. What a step takes beyond that, the process was stopped; it does not count."""

_MAX_GRADIENT = 1.0


@dataclass(frozen=True)
class TrainOptions:
    """How long and how large.

    Args:
        seed: of weights, videos and questions.
        steps: length of the training.
        minutes: its end if that comes first; None for none.
        size: of a batch.
        report_every: steps between two lines of the log.
        score_every: steps between two held-out scores.
        score_videos: videos of each.
        save_every: seconds between two saved states.
        without: kinds of question that are not asked in training.
        start: folder of a model that is trained further; None to start from nothing.
        all_videos: show films, too, and some videos in fewer pixels.
    """

    seed: int = 1
    steps: int = 12_000
    minutes: float | None = None
    size: BatchSize = BatchSize()
    report_every: int = 20
    score_every: int = 500
    score_videos: int = 64
    save_every: float = 180.0
    without: tuple[str, ...] = ()
    start: Path | None = None
    all_videos: bool = False


class Trainer:
    """Model, optimizer and all that the next step depends on.

    Args:
        options: as given.
        device: of the model.
    """

    def __init__(self, options: TrainOptions, device: torch.device) -> None:
        self.options = options
        self.model: Any = (
            load_model(options.start)[0].train()
            if options.start
            else make_model(tokenizer(), options.seed)
        ).to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.heads = Heads(self.model.config.text_config.hidden_size).to(device)
        self.parameters = [*self.model.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for p in module.parameters() if (p.dim() > 1) == is_matrix],
                    "weight_decay": 0.02 * is_matrix,
                    "is_model": module is self.model,
                }
                for module in (self.model, self.heads)
                for is_matrix in (True, False)
            ],
            betas=(0.9, 0.98),
        )
        self.step = 0
        self.seconds = 0.0
        self.accuracies = schedule.first_accuracies()
        videos = schedule.all_videos if options.all_videos else schedule.short_videos
        self.feed = Feed(options.seed, options.size, videos)

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        minutes = self.options.minutes
        by_time = self.seconds / (60 * minutes) if minutes else 0.0
        return min(1.0, max(self.step / self.options.steps, by_time))

    def train_step(self) -> Step:
        """Does one step and counts its time."""
        began = time.monotonic()
        weights = schedule.question_weights(self.accuracies)
        weights |= dict.fromkeys(self.options.without, 0.0)
        batch = self.feed.take(self.step, weights)
        rate, starts = schedule.learning_rate, not self.options.start
        for group in self.optimizer.param_groups:
            group["lr"] = (
                rate(self.step, self.progress)
                if starts
                else schedule.further_rate(self.step, self.progress, group["is_model"])
            )
        if starts and self.step < schedule.VISION_STEPS:
            result = vision_step(self.model, self.heads, batch)
        else:
            result = answer_step(
                self.model, self.heads, batch, schedule.hides_video(self.options.seed, self.step)
            )
            if batch.labels is not None:  # not of films or fewer pixels, which are harder
                self.accuracies = schedule.update_accuracies(
                    self.accuracies, result.right.cpu().numpy(), batch.packs.kinds
                )
        self.optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, _MAX_GRADIENT)
        self.optimizer.step()
        self.step += 1
        self.seconds += min(LONGEST_STEP, time.monotonic() - began)
        return result

    def save_state(self, path: Path) -> None:
        """Writes all that the next step depends on, whole or not at all."""
        state = {
            "same_batches": self._batches_are_of(),
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "accuracies": self.accuracies,
            "ordered": self.feed.ordered,
        }
        unfinished = path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    def _batches_are_of(self) -> dict[str, int]:
        """What must not change within a run; its length and the kinds asked may."""
        return {
            "seed": self.options.seed,
            **asdict(self.options.size),
            "all_videos": self.options.all_videos,
        }

    def load_state(self, path: Path) -> None:
        """Continues from `path`.

        Raises:
            ValueError: the run there is of another seed or batch size.
        """
        state = torch.load(path, map_location=self.model.device, weights_only=True)
        theirs, ours = state["same_batches"], self._batches_are_of()
        if theirs != ours:
            raise ValueError(f"{path} is of {theirs}, not {ours}: resume with the same options")
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.accuracies = state["accuracies"]
        self.feed.reorder(state["ordered"])


class Log:
    """DIR/log for people, which is also printed, and DIR/log.jsonl for programs."""

    def __init__(self, folder: Path) -> None:
        self.text, self.lines = folder / "log", folder / "log.jsonl"

    def started(self, trainer: Trainer) -> None:
        """With which options, and where it went on."""
        options = trainer.options
        given: dict[str, Any] = {
            "seed": options.seed,
            "steps": options.steps,
            "minutes": options.minutes,
            "without": list(options.without),
            "start": options.start and options.start.name,
            "all_videos": options.all_videos,
        }
        line = " ".join(f"{name} {value}" for name, value in given.items() if value)
        self._write(
            f"step {trainer.step} started with {line}", {"step": trainer.step, "started": given}
        )

    def report(self, trainer: Trainer, result: Step) -> None:
        """Progress of the training itself."""
        record: dict[str, Any] = {
            "step": trainer.step,
            "seconds": round(trainer.seconds, 1),
            "rate": trainer.optimizer.param_groups[0]["lr"],
            "losses": {name: round(part.item(), 4) for name, part in result.parts.items()},
            "running": {kind: round(x, 4) for kind, x in trainer.accuracies.items()},
        }
        losses = " ".join(f"{name} {value:.3f}" for name, value in record["losses"].items())
        right = " ".join(f"{kind} {100 * x:.0f}" for kind, x in record["running"].items())
        self._write(
            f"step {trainer.step} {trainer.seconds / 60:.1f} min {losses} | {right}", record
        )

    def scores(self, trainer: Trainer, scores: Scores, films: Scores) -> None:
        """Accuracy on held-out videos, and on films."""
        total = overall(scores)
        scores = scores | {f"film {kind}": own for kind, own in films.items()}
        right = " ".join(f"{kind} {100 * own.accuracy:.1f}" for kind, own in scores.items())
        line = f"step {trainer.step} HELD-OUT {100 * total.accuracy:.1f} of {total.asked} | {right}"
        record = {kind: own.accuracy for kind, own in scores.items()} | {"all": total.accuracy}
        self._write(line, {"step": trainer.step, "seconds": trainer.seconds, "held_out": record})

    def _write(self, line: str, record: dict[str, Any]) -> None:
        print(line, flush=True)
        with self.text.open("a") as text, self.lines.open("a") as lines:
            text.write(line + "\n")
            lines.write(json.dumps(record) + "\n")


def train(folder: Path, options: TrainOptions, device: torch.device, resume: bool) -> None:
    """Trains until the end, or further if `folder` holds a state, and writes the checkpoint.

    Raises:
        ValueError: `folder` holds a state and `resume` is not set, or the other way round.
    """
    state = folder / "state.pt"
    if state.exists() != resume:
        raise ValueError(f"{state} {'exists: give --resume' if state.exists() else 'is missing'}")
    folder.mkdir(parents=True, exist_ok=True)
    trainer, log = Trainer(options, device), Log(folder)
    if resume:
        trainer.load_state(state)
    log.started(trainer)
    with trainer.feed:
        saved = time.monotonic()
        while trainer.progress < 1:
            result = trainer.train_step()
            if trainer.step % options.report_every == 0:
                log.report(trainer, result)
            if trainer.step % options.score_every == 0:
                log.scores(trainer, *_score(trainer))
            if time.monotonic() - saved > options.save_every:
                trainer.save_state(state)
                saved = time.monotonic()
    trainer.save_state(state)
    log.scores(trainer, *_score(trainer))
    save_model(trainer.model.cpu(), tokenizer(), folder / "model")
    draw_curves(log.lines, folder / "curves.png")


def _score(trainer: Trainer) -> tuple[Scores, Scores]:
    """Of videos as in training, and of films if they are part of it."""
    options = trainer.options
    videos = held_out_batches(TRAINING, options.score_videos)
    films = held_out_films(options.score_videos // 4 * options.all_videos)
    of_videos, of_films = (score(trainer.model, batches) for batches in (videos, films))
    return of_videos[max(of_videos)], of_films[max(of_films)]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of the module."""
    parser = argparse.ArgumentParser(prog="python -m vllm_dpp.quality.train")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--start", type=Path, help="folder of a model to be trained further")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=TrainOptions.steps)
    parser.add_argument("--minutes", type=float, help="end earlier, after so much training")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--videos", type=int, default=BatchSize.num_videos, help="per step")
    parser.add_argument("--without", nargs="+", default=[], choices=KINDS, metavar="KIND")
    parser.add_argument(
        "--all-videos", action="store_true", help="with --start: films, too, and fewer pixels"
    )
    parser.add_argument("--threads", type=int, help="of the training process")
    given = parser.parse_args(arguments)
    if given.all_videos and not given.start:
        parser.error("--all-videos trains a model further that has learned to see: give --start")
    if given.threads:
        torch.set_num_threads(given.threads)
    options = TrainOptions(
        seed=given.seed,
        steps=given.steps,
        minutes=given.minutes,
        size=BatchSize(num_videos=given.videos),
        without=tuple(given.without),
        start=given.start,
        all_videos=given.all_videos,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the feed's process ends, too
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train(given.out, options, device, given.resume)


if __name__ == "__main__":
    main()
