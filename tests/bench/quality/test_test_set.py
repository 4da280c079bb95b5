"""The questions of the benchmark."""

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("cv2")
pytest.importorskip("transformers")

from vllm_dpp.bench.quality.test_set import (  # noqa: E402
    SCENE_KINDS,
    fewer_frames,
    make_test_set,
    smaller_frames,
)
from vllm_dpp.quality.film import NEEDLE_KINDS, NUM_SHOTS, ORDINARY, SHOT  # noqa: E402
from vllm_dpp.quality.model import LEARNED  # noqa: E402
from vllm_dpp.quality.packing import POSITIONS_PER_STEP  # noqa: E402
from vllm_dpp.quality.render import FPS, render  # noqa: E402
from vllm_dpp.quality.scene import DENSE, LONGER, STANDARD, make_scene  # noqa: E402
from vllm_dpp.quality.words import COLOUR_NAMES, SHAPES  # noqa: E402


def test_as_many_of_each_kind_and_the_same_again() -> None:
    test_set, again = (make_test_set("standard", 5, SCENE_KINDS) for _ in range(2))
    assert Counter(test_set.kinds) == dict.fromkeys(SCENE_KINDS, 5)
    assert test_set.asked == again.asked
    assert all((a == b).all() for a, b in zip(test_set.videos, again.videos, strict=True))
    pairs = Counter(zip(test_set.groups, test_set.kinds, strict=True))
    assert max(pairs.values()) == 1
    assert sorted(set(test_set.groups)) == list(range(len(test_set.videos)))


def test_later_questions_are_the_same_ones_after_others() -> None:
    alone, later = (make_test_set(name, 4, LEARNED) for name in ("moving", "moving-later"))
    assert [item.question for item in alone.asked] == [item.question for item in later.asked]
    assert all((a == b).all() for a, b in zip(alone.videos, later.videos, strict=True))
    assert {len(item.chat) for item in alone.asked} == {1}
    things = {*SHAPES, *COLOUR_NAMES}
    for item in later.asked:
        first, last = ({*q.text.lower().strip("?").split(), q.answer} & things for q in item.chat)
        assert not first & last and item.chat[0].text != item.chat[1].text


def test_things_that_are_not_there() -> None:
    test_set = make_test_set("standard-absent", 2, LEARNED)
    assert len(test_set.asked) == 2 * len({*LEARNED} & {*SCENE_KINDS}) == len(test_set.videos)
    assert {item.question.answer for item in test_set.asked} == {"no"}
    scenes = [make_scene(100_000 + i, STANDARD) for i in range(len(test_set.videos))]
    for scene, item in zip(scenes, test_set.asked, strict=True):  # no video is passed over
        shown = {SHAPES[thing.shape] for thing in scene.things}
        assert not shown & set(item.question.text.strip("?").split())
    assert len({item.question.text for item in test_set.asked}) > 5


def test_settings_are_chosen_on_other_videos() -> None:
    for name in ("moving", "moving-later"):
        reported, tuning = (make_test_set(name + suffix, 2, LEARNED) for suffix in ("", "-tuning"))
        assert Counter(reported.kinds) == Counter(tuning.kinds)
        assert {len(item.chat) for item in tuning.asked} == {len(reported.asked[0].chat)}
        videos = [video.tobytes() for video in (*reported.videos, *tuning.videos)]
        assert len(set(videos)) == len(videos)


@pytest.mark.parametrize(
    ("name", "kinds", "by_video"), [("film", NEEDLE_KINDS, None), ("ordinary", (ORDINARY,), [3, 1])]
)
def test_films(name: str, kinds: tuple[str, ...], by_video: list[int] | None) -> None:
    alone, later = (make_test_set(name + suffix, 4, LEARNED) for suffix in ("", "-later"))
    assert Counter(alone.kinds) == dict.fromkeys(kinds, 4)  # of the rest nothing is asked
    assert by_video in (None, [*Counter(alone.groups).values()])
    assert len({(item.video, item.question.text) for item in alone.asked}) == len(alone.asked)
    assert [item.question for item in alone.asked] == [item.question for item in later.asked]
    for item in later.asked:  # about another needle first
        shapes = [set(q.text.lower().strip("?").split()) & {*SHAPES} for q in item.chat]
        assert len(shapes) == 2 and shapes[0] != shapes[1]
    assert {len(video) for video in alone.videos} == {NUM_SHOTS * SHOT.num_frames}
    positions = len(alone.videos[0]) / alone.fps * POSITIONS_PER_STEP
    assert positions < POSITIONS_PER_STEP * LONGER.num_steps  # of the longest of the training


def test_videos_went_through_an_mp4() -> None:
    test_set = make_test_set("dense", 1, ["colour"])
    (frames,) = test_set.videos
    assert frames.shape == (DENSE.num_frames, 112, 112, 3)
    drawn = render(make_scene(100_000, DENSE)).astype(int)
    error = np.abs(frames - drawn).mean()
    assert 0.5 < error < 12


@pytest.mark.parametrize(("share", "count"), [(0.6, 10), (0.4, 6), (0.3, 4), (0.2, 4), (0.01, 2)])
def test_fewer_frames(share: float, count: int) -> None:
    frames = render(make_scene(0, STANDARD))
    fewer, fps = fewer_frames(frames, FPS, share)
    assert len(fewer) == count
    assert len(fewer) / fps == len(frames) / FPS  # of the same duration
    where = [int(np.argmin([np.abs(a - b).sum() for b in frames.astype(int)])) for a in fewer]
    assert where == sorted(set(where))
    assert abs(np.mean(where) - 7.5) <= 1


@pytest.mark.parametrize(("share", "size"), [(0.6, (84, 84)), (0.4, (56, 84)), (0.2, (56, 56))])
def test_smaller_frames(share: float, size: tuple[int, int]) -> None:
    frames = render(make_scene(0, STANDARD))
    assert smaller_frames(frames, share).shape == (len(frames), *size, 3)
