"""Flags of the command line for the fields of `ServingSettings`."""

import argparse
import inspect
import re
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from vllm_dpp.serve_command import ADDITIONAL, flag_of
from vllm_dpp.serving.settings import ServingSettings


def add_setting_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each field, whose docstrings are the help; absent where it is not given."""
    group = parser.add_argument_group("settings", f"each a key of `dpp` in {ADDITIONAL}")
    descriptions, hints = described_fields(ServingSettings), get_type_hints(ServingSettings)
    for field in fields(ServingSettings):
        hint = hints[field.name]
        values = [value for value in get_args(hint) or (hint,) if value is not type(None)]
        default = "" if field.default is None else f" (default: {field.default})"
        if values[0] is bool:
            form: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        elif get_origin(hint) is Literal:
            form = {"choices": values}
        else:
            form = {"type": values[0], "metavar": values[0].__name__.upper()}
        group.add_argument(
            flag_of(field.name),
            **form,
            default=argparse.SUPPRESS,
            help=(descriptions.get(field.name, "") + default).replace("%", "%%"),
        )


def described_fields(cls: type) -> dict[str, str]:
    """What the `Args:` of a class and its bases say of each field, as help texts begin and end."""
    described = {}
    for part in reversed(cls.__mro__):
        text = inspect.cleandoc(part.__doc__ or "")
        section = text.partition("Args:\n")[2].partition("Raises:\n")[0]
        for name, text in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE):
            words = " ".join(text.replace("`", "").split())
            is_word = words[1:2].islower()  # and no symbol, such as K
            described[name] = (words[0].lower() + words[1:] if is_word else words).removesuffix(".")
    return described
