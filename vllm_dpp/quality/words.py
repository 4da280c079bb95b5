"""The words of the task: names of shapes, colours, answers, and the tokenizer that knows them."""

from tokenizers import AddedToken
from transformers import Qwen2Tokenizer

from vllm_dpp.toy.tokenizer import make_tokenizer

SHAPES = (
    "circle",
    "square",
    "triangle",
    "cross",
    "ring",
    "diamond",
    "star",
    "heart",
    "arrow",
    "moon",
)

COLOURS = {
    "red": (225, 25, 25),
    "green": (20, 190, 20),
    "blue": (25, 40, 230),
    "yellow": (245, 235, 20),
    "cyan": (20, 225, 235),
    "magenta": (230, 25, 220),
    "white": (252, 252, 252),
    "black": (4, 4, 4),
}
"""RGB."""

COLOUR_NAMES = tuple(COLOURS)

QUADRANTS = ("northwest", "northeast", "southwest", "southeast")
HALVES = ("first", "second")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
YES_NO = ("yes", "no")

ANSWERS = SHAPES + COLOUR_NAMES + QUADRANTS + HALVES + NUMBERS + YES_NO
"""Every answer of the task. Each is one token."""

_OTHER_WORDS = (
    "a appeared are as before briefly came colour else half has how in is many of or replaced "
    "same shape shapes the there was what where which user assistant"
).split()

VOCABULARY = ANSWERS + tuple(_OTHER_WORDS)
"""Words with a token of their own. Any other text, such as a word in capitals, is bytes."""


def make_word_tokenizer() -> Qwen2Tokenizer:
    """Returns the byte-level tokenizer of `toy` with a token for every word of `VOCABULARY`.

    A word's token takes the blank before it along, so a question is as many tokens as words.
    """
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(
        [
            AddedToken(word, lstrip=True, single_word=True, normalized=False, special=False)
            for word in VOCABULARY
        ]
    )
    return tokenizer
