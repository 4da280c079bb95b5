"""Batches of videos with packed chats: pure functions of seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_dpp.quality.film import (
    FILM_FPS,
    NUM_SHOTS,
    SHOT,
    Film,
    make_film,
    needle_questions,
    ordinary_questions,
    render_film,
)
from vllm_dpp.quality.labels import CellLabels, label_cells, stack_labels
from vllm_dpp.quality.network import cells_of
from vllm_dpp.quality.packing import (
    POSITIONS_PER_STEP,
    Chat,
    Pack,
    Prefix,
    make_prefix,
    pack_chats,
)
from vllm_dpp.quality.questions import KINDS, Question, make_questions
from vllm_dpp.quality.render import FPS, render, shrink
from vllm_dpp.quality.scene import (
    FRAMES_PER_STEP,
    GRID,
    STANDARD,
    Cells,
    Scene,
    SceneSpec,
    make_scene,
)

TEST_SEEDS = range(1_000_000)
"""Seeds of scenes that are never trained on."""

FIRST_TRAINING_SEED = 1_000_000_000
_SEEDS_PER_RUN = 1_000_000_000
_VIDEOS_PER_STEP = 1_000

FILM_POSITIONS_PER_STEP = POSITIONS_PER_STEP * FPS / FILM_FPS


@dataclass(frozen=True)
class Videos:
    """What the videos of a batch are like.

    Args:
        spec: of their scenes.
        cells: (rows, columns) of a frame.
        num_shots: more than one for films of so many.
    """

    spec: SceneSpec
    cells: Cells = (GRID, GRID)
    num_shots: int = 1


@dataclass(frozen=True)
class Batch:
    """B videos of one length with a pack of chats each.

    Args:
        frames: [B, T, H, W, 3] uint8.
        packs: each field of `Pack`, stacked: [B, Q] or [B, G].
        labels: each field of `CellLabels`, stacked: [B, V]; None for frames smaller than `SIDE`,
            where a token shows parts of several cells of the scene, and for films.
        positions_per_step: as in `packing`.
    """

    frames: np.ndarray
    packs: Pack
    labels: CellLabels | None
    positions_per_step: float = POSITIONS_PER_STEP

    @property
    def prefix(self) -> Prefix:
        """Of its videos."""
        num_steps = self.frames.shape[1] // FRAMES_PER_STEP
        return make_prefix(num_steps, cells_of(self.frames), self.positions_per_step)


@dataclass(frozen=True)
class BatchSize:
    """How large a batch is.

    Args:
        num_videos: B.
        num_tokens: Q, tokens of chats per video.
        num_places: G, most questions per video.
    """

    num_videos: int = 8
    num_tokens: int = 224
    num_places: int = 24


def training_seeds(run_seed: int, step: int, num_videos: int) -> list[int]:
    """Scene seeds of a training step; none is in `TEST_SEEDS` or in another step or run.

    Raises:
        ValueError: more videos a step, or more steps, than there are seeds for.
    """
    if num_videos > _VIDEOS_PER_STEP or step >= _SEEDS_PER_RUN // _VIDEOS_PER_STEP:
        raise ValueError(f"no seeds for {num_videos} videos in step {step}")
    first = FIRST_TRAINING_SEED + run_seed * _SEEDS_PER_RUN + step * _VIDEOS_PER_STEP
    return list(range(first, first + num_videos))


def training_batch(
    run_seed: int,
    step: int,
    videos: Videos,
    size: BatchSize,
    weights: Mapping[str, float],
) -> Batch:
    """Returns the batch of a training step.

    Args:
        run_seed: seed of the run.
        step: step of the run.
        videos: what they are like.
        size: of the batch.
        weights: per kind, how often to ask it, relative to the others; of films all is asked.
    """
    is_film = videos.num_shots > 1
    size = fewer_films(size, videos.num_shots) if is_film else size
    seeds = training_seeds(run_seed, step, size.num_videos)
    if is_film:
        batch = _batch_of_films(seeds, videos.num_shots, size)
    else:
        batch = _batch_of_scenes(seeds, videos, size, weights)
    num_steps = batch.frames.shape[1] // FRAMES_PER_STEP
    last = int(batch.positions_per_step * (num_steps - 1))
    batch.packs.offsets[:] += np.array([[_shift(seed, num_steps, last)] for seed in seeds])
    return batch


def _batch_of_scenes(
    seeds: Sequence[int], videos: Videos, size: BatchSize, weights: Mapping[str, float]
) -> Batch:
    scenes = [make_scene(seed, videos.spec) for seed in seeds]
    drawn = [draw_questions(scene, weights, size.num_places) for scene in scenes]
    asked = [
        _in_chats(own, scene.seed, scene.num_steps)
        for own, scene in zip(drawn, scenes, strict=True)
    ]
    return make_batch(scenes, asked, size, videos.cells)


def _batch_of_films(seeds: Sequence[int], num_shots: int, size: BatchSize) -> Batch:
    films = [make_film(seed, num_shots) for seed in seeds]
    drawn = [_film_questions(film, seed) for film, seed in zip(films, seeds, strict=True)]
    asked = [_in_chats(own, seed, num_shots) for own, seed in zip(drawn, seeds, strict=True)]
    return make_film_batch(films, asked, size)


def fewer_films(size: BatchSize, num_shots: int = NUM_SHOTS) -> BatchSize:
    """So many films of `num_shots` as hold about as many tokens, with all the room for chats."""
    factor = min(size.num_videos, max(1, num_shots * SHOT.num_steps // (2 * STANDARD.num_steps)))
    return BatchSize(size.num_videos // factor, factor * size.num_tokens, factor * size.num_places)


def _film_questions(film: Film, seed: int) -> list[Question]:
    """All that have one answer, in random order."""
    questions = needle_questions(film) + ordinary_questions(film, briefly=False)
    rng = np.random.default_rng((seed, len(film.shots), 3))
    return [questions[i] for i in rng.permutation(len(questions))]


def _in_chats(questions: Sequence[Question], seed: int, length: int) -> list[Chat]:
    """Half of the questions are asked alone, the others after another one."""
    rng = np.random.default_rng((seed, length, 7))
    before = [rng.choice(len(questions), int(rng.random() < 0.5)) for _ in questions]
    return [(*(questions[i] for i in old), new) for old, new in zip(before, questions, strict=True)]


def _shift(seed: int, num_steps: int, last: int) -> int:
    """How far a video's chats stand from where they belong, in positions.

    Half of them stand elsewhere, so that the model also answers about longer videos, whose
    chats stand further from the first steps. The least shift is that of transformers, which
    counts on from a video's height and width, where vLLM counts on from its `last` position.
    """
    rng = np.random.default_rng((seed, num_steps, 4))
    least = GRID - (last + 1)
    return int(rng.integers(least, _MOST_SHIFT + 1)) if rng.random() < 0.5 else 0


_MOST_SHIFT = 16


def make_batch(
    scenes: Sequence[Scene],
    asked: Sequence[Sequence[Chat]],
    size: BatchSize,
    cells: Cells = (GRID, GRID),
) -> Batch:
    """Renders `scenes` in so many cells and packs the chats `asked` about each, as many as fit."""
    drawn = [render(scene) for scene in scenes]
    is_whole = cells == (GRID, GRID)
    return Batch(
        frames=np.stack(drawn if is_whole else [shrink(frames, cells) for frames in drawn]),
        packs=_packed(asked, size),
        labels=stack_labels([label_cells(scene) for scene in scenes]) if is_whole else None,
    )


def make_film_batch(
    films: Sequence[Film], asked: Sequence[Sequence[Chat]], size: BatchSize
) -> Batch:
    """Renders `films` and packs the chats `asked` about each, as many as fit."""
    frames = np.stack([render_film(film) for film in films])
    return Batch(frames, _packed(asked, size), None, FILM_POSITIONS_PER_STEP)


def _packed(asked: Sequence[Sequence[Chat]], size: BatchSize) -> Pack:
    packs = [pack_chats(chats, size.num_tokens, size.num_places) for chats in asked]
    names = Pack.__dataclass_fields__
    return Pack(**{name: np.stack([getattr(pack, name) for pack in packs]) for name in names})


def draw_questions(scene: Scene, weights: Mapping[str, float], count: int) -> list[Question]:
    """Draws up to `count` different questions: a kind by its weight, then any of that kind.

    Kinds of weight 0 are not asked.
    """
    rng = np.random.default_rng((scene.seed, scene.num_steps, 3))
    by_kind: dict[str, list[Question]] = {}
    for question in make_questions(scene):
        if weights[question.kind]:
            by_kind.setdefault(question.kind, []).append(question)
    for questions in by_kind.values():
        rng.shuffle(questions)
    drawn: list[Question] = []
    while by_kind and len(drawn) < count:
        kinds = [kind for kind in KINDS if kind in by_kind]
        odds = np.array([weights[kind] for kind in kinds])
        kind = kinds[int(rng.choice(len(kinds), p=odds / odds.sum()))]
        drawn.append(by_kind[kind].pop())
        if not by_kind[kind]:
            del by_kind[kind]
    return drawn
