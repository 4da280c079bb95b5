"""Long videos: every question is about one moment of one shot, and has one answer."""

from collections import Counter

import pytest

pytest.importorskip("cv2")
pytest.importorskip("transformers")

from tests.quality.oracle import answers  # noqa: E402  (needs the modules above)
from vllm_dpp.quality.batches import FIRST_TRAINING_SEED  # noqa: E402
from vllm_dpp.quality.film import (  # noqa: E402
    NEEDLE_KINDS,
    NUM_NEEDLES,
    NUM_SHOTS,
    ORDINARY,
    SHOT,
    make_film,
    needle_questions,
    ordinary_questions,
    render_film,
)
from vllm_dpp.quality.render import render  # noqa: E402
from vllm_dpp.quality.words import COLOUR_NAMES, SHAPES  # noqa: E402

SEEDS = range(100_000, 100_200)


def test_a_needle_is_seen_once_and_briefly() -> None:
    for film in map(make_film, SEEDS):
        assert len(film.shots) == NUM_SHOTS and len(set(film.needles)) == NUM_NEEDLES
        for shot, shape in film.needles:
            seen = [(i, t) for i, s in enumerate(film.shots) for t in s.things if t.shape == shape]
            ((where, thing),) = seen
            assert where == shot and thing.is_brief


def test_every_question_has_one_answer() -> None:
    asked: Counter[str] = Counter()
    for film in map(make_film, SEEDS):
        questions = needle_questions(film)
        assert len({question.text for question in questions}) == len(questions)
        for question in questions:
            found = {answer for shot in film.shots for answer in answers(shot, question.text)}
            assert found == {question.answer}
            asked[question.kind] += 1
    assert asked == dict.fromkeys(NEEDLE_KINDS, NUM_NEEDLES * len(SEEDS))


def test_an_ordinary_needle_shares_its_shape_and_its_colour_with_others() -> None:
    asked: Counter[str] = Counter()
    for film in map(make_film, SEEDS):
        questions, all_times = ordinary_questions(film), ordinary_questions(film, briefly=False)
        assert set(questions) < set(all_times)
        for question in all_times:
            found = [answer for shot in film.shots for answer in answers(shot, question.text)]
            assert found == [question.answer] and question.kind == ORDINARY
            asked[question.answer] += 1
            colour, shape = question.text.strip("?").split()[3:]
            things = [thing for shot in film.shots for thing in shot.things]
            assert sum(SHAPES[thing.shape] == shape for thing in things) > 1
            assert sum(COLOUR_NAMES[thing.colour] == colour for thing in things) > 1
            (own,) = (
                t for t in things if (SHAPES[t.shape], COLOUR_NAMES[t.colour]) == (shape, colour)
            )
            assert own.is_brief == (question in questions)
    assert sum(asked.values()) > 3000
    assert max(asked.values()) < 1.2 * min(asked.values())


def test_the_rest_of_a_film_is_full_of_things_of_other_shapes() -> None:
    films = [make_film(seed) for seed in SEEDS]
    assert all(50 <= sum(len(shot.things) for shot in film.shots) <= 88 for film in films)
    shapes = Counter(shape for film in films for _, shape in film.needles)
    assert len(shapes) == len(SHAPES) and min(shapes.values()) > 0.6 * max(shapes.values())


def test_a_film_is_its_shots_and_none_is_trained_on() -> None:
    film = make_film(100_000)
    assert film == make_film(100_000) and film != make_film(100_001)
    assert all(shot.seed < FIRST_TRAINING_SEED for shot in film.shots)
    frames = render_film(film)
    assert len(frames) == NUM_SHOTS * SHOT.num_frames
    assert (frames[SHOT.num_frames : 2 * SHOT.num_frames] == render(film.shots[1])).all()
