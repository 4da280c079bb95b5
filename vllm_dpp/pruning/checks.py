"""Checks of user input: each raises a `ValueError` that names the argument and shows its value."""

from collections.abc import Collection
from math import inf
from numbers import Integral, Real
from typing import TypeGuard


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a real number; a bool is not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether `value` is an integer; a bool is not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def require_ratio(name: str, value: object) -> None:
    """Raise `ValueError` unless `value` is a number in (0, 1]."""
    if not (is_number(value) and 0 < value <= 1):
        raise ValueError(f"{name} must be a number in (0, 1], got {value!r}")


def require_unit_interval(name: str, value: object) -> None:
    """Raise `ValueError` unless `value` is a number in [0, 1]."""
    if not (is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")


def require_at_least(name: str, value: object, minimum: float) -> None:
    """Raise `ValueError` unless `value` is a finite number of at least `minimum`."""
    if not (is_number(value) and minimum <= value < inf):
        raise ValueError(f"{name} must be a number >= {minimum}, got {value!r}")


def require_integer(name: str, value: object, minimum: int) -> None:
    """Raise `ValueError` unless `value` is an integer of at least `minimum`."""
    if not (is_integer(value) and value >= minimum):
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")


def require_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")
