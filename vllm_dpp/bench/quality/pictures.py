"""Pictures of what methods keep of a video for a question."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from PIL import Image

from vllm_dpp import show
from vllm_dpp.bench.quality.arms import Arm
from vllm_dpp.bench.quality.runs import Run

_WIDTH = 1200


def draw_kept(run: Run, arms: Sequence[Arm], indices: Sequence[int], path: Path) -> None:
    """Writes one picture: for each question and arm, the slices with dropped tokens dark.

    Args:
        run: model and test set.
        arms: methods that choose tokens through our plugin.
        indices: of questions in the test set.
        path: of the picture.
    """
    test_set, rows = run.test_set(), []
    context = multiprocessing.get_context("spawn")
    for arm in arms:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            found = pool.submit(_kept, run, arm, list(indices)).result()
        for index, (video, answer) in zip(indices, found, strict=True):
            asked = test_set.asked[index]
            mark = "right" if answer == asked.question.answer else "wrong"
            title = (
                f"{asked.question.text}  {answer} ({mark})   [{arm.method.name}, {arm.budget:g}]"
            )
            frames = list(test_set.videos[asked.video][::2])
            picture = show.draw(replace(video, title=title), frames, columns=8)
            rows.append((index, picture))
    rows.sort(key=lambda row: indices.index(row[0]))  # stable: arms in their order
    _stack([picture for _, picture in rows]).save(path)


def _kept(run: Run, arm: Arm, indices: list[int]) -> list[tuple[show.KeptVideo, str]]:
    """In a process of its own."""
    from vllm_dpp.bench.quality.engine import QualityEngine

    engine = QualityEngine(run.checkpoint, arm.engine, run.test_set())
    return [engine.kept(arm, index) for index in indices]


def _stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """One above the other, at one width."""
    sized = [p.resize((_WIDTH, round(p.height * _WIDTH / p.width))) for p in pictures]
    whole = Image.new("RGB", (_WIDTH, sum(p.height for p in sized)))
    top = 0
    for picture in sized:
        whole.paste(picture, (0, top))
        top += picture.height
    return whole
