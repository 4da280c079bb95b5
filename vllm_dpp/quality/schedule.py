"""What changes during training: rate, lengths and sizes of videos, odds of questions, sight."""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from vllm_dpp.quality.batches import Videos
from vllm_dpp.quality.film import NUM_SHOTS, SHOT
from vllm_dpp.quality.questions import KINDS
from vllm_dpp.quality.scene import GRID, LONGER, SHORTER, TRAINING

PEAK_RATE = 1e-3
WARM_UP_STEPS = 100
DECAY_FROM = 0.3
FINAL_SHARE = 0.01

VISION_STEPS = 300
VISION_RATE = 2e-3
"""The vision encoder learns alone first: answers cannot be learned from what is not seen."""

HEADS_STEPS = 150
"""Where a model is trained further, the read-outs are new and learn alone first."""

FURTHER_RATE = 5e-4

_LENGTHS = (TRAINING, SHORTER, TRAINING, LONGER)
_WHOLE = (GRID, GRID)
_SIZES = (_WHOLE, (3, 3), _WHOLE, (2, 3), _WHOLE, (2, 2), _WHOLE)
_FILM_EVERY = 3
_SHOTS = (2, NUM_SHOTS, 3, 4)
_MEMORY = 0.97
_LEAST_ERROR = 0.03
_LOOK_UPS = ("colour", "shape", "where")
_LEARNED = 0.7
_RARELY = 0.15


def learning_rate(step: int, progress: float) -> float:
    """Warm-up, then constant, then a cosine from `DECAY_FROM` of the training to its end.

    The steps of the vision encoder alone come before, with a rate and a warm-up of their own.

    Args:
        step: counted from 0.
        progress: share of the training that is done, in [0, 1].
    """
    if step < VISION_STEPS:
        return VISION_RATE * _warmed_up(step)
    return PEAK_RATE * _warmed_up(step - VISION_STEPS) * _decayed(progress)


def further_rate(step: int, progress: float, is_model: bool) -> float:
    """The rate where a model is trained further, of the model or of its new read-outs."""
    if step < HEADS_STEPS:
        return 0.0 if is_model else VISION_RATE
    return FURTHER_RATE * _warmed_up(step - HEADS_STEPS) * _decayed(progress)


def _warmed_up(step: int) -> float:
    return min(1.0, (step + 1) / WARM_UP_STEPS)


def _decayed(progress: float) -> float:
    decayed = max(0.0, (progress - DECAY_FROM) / (1 - DECAY_FROM))
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, decayed)))
    return FINAL_SHARE + (1 - FINAL_SHARE) * cosine


def short_videos(step: int) -> Videos:
    """Those of a step: half of them standard, the others shorter and longer."""
    return Videos(_LENGTHS[step % len(_LENGTHS)])


def all_videos(step: int) -> Videos:
    """The same where more is learned: a third are films, three of seven others have fewer pixels.

    The three cycles have no common factor, so that each length is seen in each size.
    """
    turn, rest = divmod(step, _FILM_EVERY)
    if rest == _FILM_EVERY - 1:
        return Videos(SHOT, num_shots=_SHOTS[turn % len(_SHOTS)])
    return replace(short_videos(step), cells=_SIZES[step % len(_SIZES)])


def hides_video(run_seed: int, step: int) -> bool:
    """Whether the first layers hide the video from the questions, as in half of the steps.

    So look-ups are learned in later layers, where large models do them. In the other steps the
    questions see it everywhere, as they do when the model is used, and learn not to look.
    """
    return bool(np.random.default_rng((run_seed, step)).random() < 0.5)


def first_accuracies() -> dict[str, float]:
    """Running accuracies before training."""
    return dict.fromkeys(KINDS, 0.0)


def update_accuracies(
    accuracies: Mapping[str, float], right: np.ndarray, kinds: np.ndarray
) -> dict[str, float]:
    """Running accuracies after another step.

    Args:
        accuracies: before it, by kind.
        right: [B, G] bool.
        kinds: [B, G] int64, index into `KINDS` or below 0.
    """
    updated = dict(accuracies)
    for index, kind in enumerate(KINDS):
        asked = kinds == index
        if asked.any():
            share = _MEMORY ** float(asked.sum() / len(kinds))
            updated[kind] = share * updated[kind] + (1 - share) * float(right[asked].mean())
    return updated


def question_weights(accuracies: Mapping[str, float]) -> dict[str, float]:
    """How often to ask each kind, relative to the others: the more, the worse it is answered.

    Until look-ups are learned, the kinds that build on them are asked rarely.
    """
    weights = {kind: 1 - accuracy + _LEAST_ERROR for kind, accuracy in accuracies.items()}
    if min(accuracies[kind] for kind in _LOOK_UPS) > _LEARNED:
        return weights
    return {kind: w if kind in _LOOK_UPS else _RARELY * w for kind, w in weights.items()}
