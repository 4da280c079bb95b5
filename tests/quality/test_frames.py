"""Frames: of a seed, real enough to pass through an mp4, and one thing to a cell."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")
pytest.importorskip("transformers")

from vllm_dpp.quality.camera import CAMERAS, MOVING  # noqa: E402
from vllm_dpp.quality.labels import (  # noqa: E402  (needs the modules above)
    LEFT_BRIEFLY,
    NEW,
    NO_SHAPE,
    OLD,
    label_cells,
)
from vllm_dpp.quality.questions import make_questions  # noqa: E402
from vllm_dpp.quality.render import FPS, SIDE, render  # noqa: E402
from vllm_dpp.quality.scene import (  # noqa: E402
    DENSE,
    FRAMES_PER_STEP,
    GRID,
    NUM_CELLS,
    STANDARD,
    TRAINING,
    Scene,
    Thing,
    make_scene,
)
from vllm_dpp.quality.shapes import CELL, shape_masks  # noqa: E402
from vllm_dpp.quality.words import COLOURS, SHAPES  # noqa: E402
from vllm_dpp.toy.video import Frames, write_mp4  # noqa: E402


def read_mp4(path: Path) -> Frames:
    reader, frames = cv2.VideoCapture(str(path)), []
    while True:
        there, frame = reader.read()
        if not there:
            return np.stack(frames)
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))


@pytest.mark.parametrize("spec", [STANDARD, DENSE], ids=["standard", "dense"])
def test_frames_are_of_a_seed(spec) -> None:  # type: ignore[no-untyped-def]
    frames = render(make_scene(5, spec))
    assert frames.shape == (spec.num_frames, SIDE, SIDE, 3)
    assert frames.dtype == np.uint8
    np.testing.assert_array_equal(frames, render(make_scene(5, spec)))
    assert (frames != render(make_scene(6, spec))).mean() > 0.5


def test_background_is_redundant_but_never_still() -> None:
    frames = render(Scene(0, 8, (), ())).astype(int)
    steps = abs(np.diff(frames, axis=0))
    assert 2 < steps.mean() < 12
    assert (steps == 0).mean() < 0.2


def test_mp4_keeps_the_frames(tmp_path: Path) -> None:
    for seed in range(4):
        frames = render(make_scene(seed))
        back = read_mp4(write_mp4(tmp_path / f"{seed}.mp4", frames, FPS))
        assert back.shape == frames.shape
        assert abs(back.astype(int) - frames).mean() < 8  # the noise has 5
        smooth, smooth_back = (cv2.blur(x[3].astype(np.float32), (7, 7)) for x in (frames, back))
        assert abs(smooth - smooth_back).mean() < 3


def test_shapes_are_different_and_fit() -> None:
    masks = shape_masks()
    assert masks.shape == (len(SHAPES), CELL, CELL)
    assert not masks[:, [0, 1, -2, -1]].any()  # room to float
    assert not masks[:, :, [0, 1, -2, -1]].any()
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert (one ^ other).sum() > 0.2 * max(one.sum(), other.sum())


def test_a_thing_is_seen_when_and_where_the_scene_says() -> None:
    thing = Thing(shape=1, colour=list(COLOURS).index("blue"), cell=6, start=2, stop=4)
    frames = render(Scene(3, 8, (thing,), ())).astype(int)
    bluish = frames[..., 2] - frames[..., 0] > 120
    cells = bluish.reshape(len(frames), GRID, CELL, GRID, CELL).sum((2, 4))
    seen = cells.reshape(len(frames), NUM_CELLS) > 0.8 * shape_masks()[1].sum()
    expected = np.zeros_like(seen)
    expected[2 * FRAMES_PER_STEP : 4 * FRAMES_PER_STEP, 6] = True
    np.testing.assert_array_equal(seen, expected)


def test_distractors_change_where_they_flicker() -> None:
    scenes = (make_scene(seed) for seed in range(200))
    scene, flickering = next(
        (scene, d) for scene in scenes for d in scene.distractors if d.flickers and d.start == 0
    )
    row, column = (CELL * i for i in divmod(flickering.cell, GRID))
    patch = render(scene)[:, row : row + CELL, column : column + CELL].astype(int)
    assert abs(patch[0] - patch[1]).mean() < 12 < abs(patch[1] - patch[2]).mean()


@pytest.mark.parametrize("camera", CAMERAS)
def test_a_label_stands_where_the_camera_sees_it(camera: str) -> None:
    """A thing's colour lies about the cells whose labels have its shape, and nowhere else."""
    thing = Thing(shape=1, colour=list(COLOURS).index("blue"), cell=6, start=0, stop=8)
    for seed in range(6):
        views = make_scene(seed, replace(STANDARD, cameras=(camera,))).views
        scene = Scene(3, 8, (thing,), (), views)
        frames = render(scene).astype(int)
        bluish = (frames[..., 2] - frames[..., 0] > 110).reshape(8, 2, SIDE, SIDE).any(1)
        labels = label_cells(scene)
        where = labels.shape.reshape(8, GRID, GRID) == 1
        assert where.sum((1, 2)).tolist() == 8 * [1]
        inside = bluish & where.repeat(CELL, 1).repeat(CELL, 2)
        assert (inside.sum((1, 2)) > 0.25 * bluish.sum((1, 2))).all()
        assert (bluish.sum((1, 2)) > 0.6 * shape_masks()[1].sum()).all()
        row, column = (x.reshape(8, GRID, GRID)[where] for x in (labels.row, labels.column))
        assert (row == 1).all() and (column == 2).all()  # the scene's own


def test_cameras_move_the_picture_and_not_the_scene() -> None:
    still = make_scene(5)
    assert still.views == ()
    for camera in MOVING:
        moved = make_scene(5, replace(STANDARD, cameras=(camera,)))
        assert (moved.things, moved.distractors) == (still.things, still.distractors)
        assert make_questions(moved) == make_questions(still)
        assert abs(render(moved).astype(int) - render(still)).mean() > 1, camera
    drawn = {len(make_scene(seed, TRAINING).views) for seed in range(20)}
    assert drawn == {0, TRAINING.num_frames}


def test_labels_tell_what_happens_in_a_cell() -> None:
    first = Thing(shape=2, colour=1, cell=9, start=0, stop=3)
    second = Thing(shape=4, colour=0, cell=9, start=3, stop=8)
    brief = Thing(shape=7, colour=3, cell=2, start=5, stop=6)
    labels = label_cells(Scene(0, 8, (second, brief, first), ()))
    shape, last, visit = (
        x.reshape(8, NUM_CELLS) for x in (labels.shape, labels.last_shape, labels.visit)
    )
    assert shape[:, 9].tolist() == [2] * 3 + [4] * 5
    assert last[:, 9].tolist() == [NO_SHAPE] * 3 + [2] * 5
    assert visit[:, 9].tolist() == [OLD] * 3 + [NEW] + [OLD] * 4
    assert visit[5:, 2].tolist() == [NEW, LEFT_BRIEFLY, LEFT_BRIEFLY]
    assert labels.row.reshape(8, NUM_CELLS)[0, 9] == 2
    assert labels.column.reshape(8, NUM_CELLS)[0, 9] == 1
    assert labels.time.reshape(8, NUM_CELLS)[[0, 7], 0].tolist() == [0, 5]
