"""Is an answer its serial answer?

Rounding depends on the shape of a batch, so where the best two tokens are nearly as likely as each
other either may come. An answer is judged up to the first such place; there it may differ, behind
it the conversation is another one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

TIE = 1e-3
"""Log-probability between the best two tokens below which either is right."""

Verdict = Literal["equal", "tie", "different"]


@dataclass(frozen=True, slots=True)
class Expected:
    """A serial answer.

    Args:
        tokens: Generated token ids.
        margins: Log-probability of each above the runner-up.
    """

    tokens: tuple[int, ...]
    margins: tuple[float, ...]


def judge(tokens: Sequence[int], expected: Expected) -> Verdict:
    """Compare an answer, or the beginning of one that was cut off.

    Args:
        tokens: What came.
        expected: The whole serial answer.
    """
    if len(tokens) > len(expected.tokens):
        return "different"
    for mine, right, margin in zip(tokens, expected.tokens, expected.margins, strict=False):
        if mine != right:
            return "tie" if margin < TIE else "different"
    return "equal"
