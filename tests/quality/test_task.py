"""The task: every question is fair, every answer balanced, and a seed is a video."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("cv2")
pytest.importorskip("transformers")

from tests.quality.oracle import answers  # noqa: E402  (needs the modules above)
from vllm_dpp.quality.batches import TEST_SEEDS, training_seeds  # noqa: E402
from vllm_dpp.quality.questions import KINDS, chance_levels, make_questions  # noqa: E402
from vllm_dpp.quality.scene import (  # noqa: E402
    DENSE,
    LONGER,
    NUM_CELLS,
    SHORTER,
    STANDARD,
    Scene,
    SceneSpec,
    make_scene,
)
from vllm_dpp.quality.words import ANSWERS, COLOUR_NAMES, SHAPES  # noqa: E402

SPECS = {"standard": STANDARD, "shorter": SHORTER, "longer": LONGER, "dense": DENSE}
all_specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@all_specs
def test_same_seed_same_scene(spec: SceneSpec) -> None:
    for seed in range(50):
        assert make_scene(seed, spec) == make_scene(seed, spec)
        assert make_questions(make_scene(seed, spec)) == make_questions(make_scene(seed, spec))
    assert len({make_scene(seed, spec).things for seed in range(50)}) == 50


@all_specs
def test_scene_is_as_its_spec_says(spec: SceneSpec) -> None:
    for seed in range(500):
        scene = make_scene(seed, spec)
        assert scene.num_steps == spec.num_steps
        assert spec.num_things[0] <= len(scene.things) <= spec.num_things[1]
        assert len(scene.distractors) <= spec.num_distractors[1]
        briefs = sum(thing.is_brief for thing in scene.things)
        assert spec.num_briefs[0] <= briefs <= spec.num_briefs[1]
        assert len({thing.shape for thing in scene.things}) == len(scene.things)
        assert max(Counter(thing.colour for thing in scene.things).values()) <= 2


@all_specs
def test_a_cell_holds_one_thing_at_a_time(spec: SceneSpec) -> None:
    for seed in range(500):
        scene = make_scene(seed, spec)
        occupied = np.zeros((spec.num_steps, NUM_CELLS), int)
        for item in (*scene.things, *scene.distractors):
            assert 0 <= item.start < item.stop <= spec.num_steps
            occupied[item.start : item.stop, item.cell] += 1
        assert occupied.max() == 1
        cells = {thing.cell for thing in scene.things}
        assert not cells & {distractor.cell for distractor in scene.distractors}


def test_brief_things_come_and_go() -> None:
    for seed in range(500):
        scene = make_scene(seed)
        for thing in scene.things:
            if thing.is_brief:
                assert thing.start > 0 and thing.stop < scene.num_steps
            else:
                assert thing.stop - thing.start >= 3


@all_specs
def test_every_question_has_one_answer(spec: SceneSpec) -> None:
    asked: Counter[str] = Counter()
    for seed in range(500):
        scene = make_scene(seed, spec)
        texts = [question.text for question in make_questions(scene)]
        assert len(set(texts)) == len(texts)
        for question in make_questions(scene):
            assert answers(scene, question.text) == [question.answer], (seed, question)
            assert question.answer in ANSWERS
            asked[question.kind] += 1
    assert set(asked) == set(KINDS)
    assert min(asked.values()) > 100


def test_oracle_sees_ambiguity() -> None:
    """Else the test above would prove nothing."""
    scene = next(s for s in map(make_scene, range(100)) if len(s.things) >= 4)
    same = [replace(thing, colour=0) for thing in scene.things]
    crowded = Scene(scene.seed, scene.num_steps, tuple(same), ())
    assert len(answers(crowded, f"what shape is {COLOUR_NAMES[0]}?")) == len(same)
    together = [replace(thing, start=2, stop=7, cell=i) for i, thing in enumerate(scene.things)]
    crowded = Scene(scene.seed, scene.num_steps, tuple(together), ())
    a, b = (SHAPES[thing.shape] for thing in together[:2])
    assert len(answers(crowded, f"which came first the {a} or the {b}?")) == 2
    assert len(answers(crowded, f"in which half is the {a}?")) == 2
    assert answers(crowded, "what shape appeared briefly?") == []


def test_answers_are_balanced() -> None:
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for seed in range(3000):
        for question in make_questions(make_scene(seed)):
            given[question.text.split()[1] + question.kind][question.answer] += 1
    for name, counts in given.items():
        share = 1 / len(counts)
        spread = 5 * np.sqrt(share / counts.total()) + 0.02  # answers of one video hang together
        for answer, count in counts.items():
            assert abs(count / counts.total() - share) < spread, (name, answer)


def test_chance_is_what_a_blind_guesser_gets() -> None:
    chance = chance_levels(STANDARD, range(12_000))
    by_answers = {
        "where": 1 / 4,
        "pair": 1 / 4,
        "when": 1 / 2,
        "exists": 1 / 2,
        "count": 1 / 5,
        "order": 1 / 2,
    }
    by_answers |= {"colour": 1 / 8, "spelled": 1 / 8, "shape": 1 / 10, "twin": 1 / 9}
    for kind, expected in by_answers.items():
        assert chance[kind] == pytest.approx(expected, abs=0.03), kind
    assert set(chance) == set(KINDS)


def test_seeds_of_training_and_test_are_disjoint() -> None:
    seeds = [
        seed for run in (0, 1) for step in (0, 1, 99_999) for seed in training_seeds(run, step, 8)
    ]
    assert len(set(seeds)) == len(seeds)
    assert not any(seed in TEST_SEEDS for seed in seeds)
    with pytest.raises(ValueError, match="no seeds"):
        training_seeds(0, 10_000_000, 8)
