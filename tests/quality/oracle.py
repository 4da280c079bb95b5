"""Answers the questions of the task from the facts of a scene, and says how many answers fit.

Written from the meaning of the words, not from `questions`: it parses the text.
"""

import re

from vllm_dpp.quality.scene import GRID, Scene, Thing
from vllm_dpp.quality.words import COLOUR_NAMES, NUMBERS, SHAPES


def answers(scene: Scene, text: str) -> list[str]:
    """Every right answer to `text`; a question is fair if there is exactly one."""
    for pattern, answer in _RULES.items():
        match = re.fullmatch(pattern, text)
        if match:
            return sorted(set(answer(scene, *match.groups())))
    raise ValueError(f"what does {text!r} mean?")


def _named(scene: Scene, word: str) -> list[Thing]:
    word = word.lower()
    return [t for t in scene.things if word in (SHAPES[t.shape], COLOUR_NAMES[t.colour])]


def _colours(things: list[Thing]) -> list[str]:
    return [COLOUR_NAMES[thing.colour] for thing in things]


def _shapes(things: list[Thing]) -> list[str]:
    return [SHAPES[thing.shape] for thing in things]


def _both(scene: Scene, colour: str, shape: str) -> list[Thing]:
    return [thing for thing in _named(scene, colour) if thing in _named(scene, shape)]


def _quadrant(thing: Thing) -> str:
    row, column = divmod(thing.cell, GRID)
    return ("north" if 2 * row < GRID else "south") + ("west" if 2 * column < GRID else "east")


def _halves(scene: Scene, thing: Thing) -> list[str]:
    steps = range(thing.start, thing.stop)
    return ["first" if 2 * step < scene.num_steps else "second" for step in steps]


def _briefs(scene: Scene) -> list[Thing]:
    """What comes, goes, and is there for less time than anything that does not."""
    return [t for t in scene.things if t.stop - t.start < 3]


def _first(scene: Scene, *words: str) -> list[str]:
    things = [thing for word in words for thing in _named(scene, word)]
    start = min(thing.start for thing in things)
    return _shapes([thing for thing in things if thing.start == start])


def _after(scene: Scene, word: str) -> list[Thing]:
    (gone,) = _named(scene, word)
    return [t for t in scene.things if t.cell == gone.cell and t.start >= gone.stop]


def _twins(scene: Scene, word: str) -> list[Thing]:
    (one,) = _named(scene, word)
    return [t for t in scene.things if t.colour == one.colour and t.shape != one.shape]


_RULES = {
    r"what colour is the (\w+)\?": lambda s, w: _colours(_named(s, w)),
    r"what shape is (\w+)\?": lambda s, w: _shapes(_named(s, w)),
    r"where is the (\w+)\?": lambda s, w: [_quadrant(t) for t in _named(s, w)],
    r"where is the (\w+) (\w+)\?": lambda s, *w: [_quadrant(t) for t in _both(s, *w)],
    r"in which half is the (\w+)\?": lambda s, w: [
        half for t in _named(s, w) for half in _halves(s, t)
    ],
    r"what shape appeared briefly\?": lambda s: _shapes(_briefs(s)),
    r"what colour appeared briefly\?": lambda s: _colours(_briefs(s)),
    r"which came first the (\w+) or the (\w+)\?": _first,
    r"what replaced the (\w+)\?": lambda s, w: _shapes(_after(s, w)),
    r"what colour replaced the (\w+)\?": lambda s, w: _colours(_after(s, w)),
    r"what else has the colour of the (\w+)\?": lambda s, w: _shapes(_twins(s, w)),
    r"is there a (\w+)\?": lambda s, w: ["yes" if _named(s, w) else "no"],
    r"how many shapes are there\?": lambda s: [NUMBERS[len(s.things)]],
}
