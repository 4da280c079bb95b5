"""From flags to the plain `vllm serve` command that means the same.

This plugin's settings reach vLLM by two of vLLM's own options: the architecture in --hf-overrides
and the section `dpp` of --additional-config. What the user gives for either himself is kept.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from vllm_dpp.serving.front.families import Family, family_of
from vllm_dpp.serving.settings import SECTION, SET_BY_SHARE, ServingSettings

OVERRIDES = "--hf-overrides"
ADDITIONAL = "--additional-config"

DEFAULT_SHARE = 0.4
"""Of a video's prefill and KV in the decoder: see "Which share?" in `bench/README.md`."""

Json = dict[str, Any]


def serve_command(settings: Json, arguments: Sequence[str]) -> list[str]:
    """The plain command, as a list of words.

    Args:
        settings: Fields of `ServingSettings` that were given as flags.
        arguments: All others: the model, unless a --config file names it, and vLLM's own flags.

    Raises:
        ValueError: A setting is bad or given twice, or the model cannot be pruned.
        OSError: The model's config.json cannot be read.
    """
    arguments = dashed(arguments)
    file = _config_file(arguments)
    overrides, rest = _take_json(OVERRIDES, arguments)
    additional, rest = _take_json(ADDITIONAL, rest)
    overrides = _merge(_take_json(OVERRIDES, file)[0], overrides)
    additional = _merge(_take_json(ADDITIONAL, file)[0], _add_settings(additional, settings))
    everything, validated = [*file, *rest], _validate(additional)
    family = _family(rest, everything, overrides, validated)
    overrides["architectures"] = [family.variant]
    additional = _with_a_share(additional)
    command = ["vllm", "serve", *rest, OVERRIDES, json.dumps(overrides)]
    return command + ([ADDITIONAL, json.dumps(additional)] if additional else [])


def flag_of(name: str) -> str:
    """The flag of a field of `ServingSettings`."""
    return "--" + name.replace("_", "-")


def dashed(arguments: Sequence[str]) -> list[str]:
    """The arguments with every --some_flag as --some-flag; vLLM takes both."""
    return [
        re.sub(r"^--[^.=\s]+", lambda match: match[0].replace("_", "-"), argument)
        for argument in arguments
    ]


def _add_settings(additional: Json, settings: Json) -> Json:
    """The user's own --additional-config and the settings given as flags, which must agree."""
    section = additional.get(SECTION, {})
    if not isinstance(section, dict):
        raise ValueError(f"{ADDITIONAL}: {SECTION!r} must be an object, got {section!r}")
    for name, value in settings.items():
        if name in section and section[name] != value:
            raise ValueError(
                f"{flag_of(name)} {value} contradicts {ADDITIONAL} "
                f"'{json.dumps({SECTION: {name: section[name]}})}': give one of them"
            )
    return _merge(additional, {SECTION: settings} if settings else {})


def _with_a_share(additional: Json) -> Json:
    """With the default share of a video, if nothing says how much of it is left.

    Not beside rule "change", which needs whole slices in the decoder's middle.
    """
    section = additional.get(SECTION, {})
    if section.keys() & {"video_share", *SET_BY_SHARE} or section.get("rule") == "change":
        return additional
    return _merge(additional, {SECTION: {"video_share": DEFAULT_SHARE}})


def _validate(additional: Json) -> ServingSettings:
    """The settings; an error names flags instead of fields."""
    try:
        settings = ServingSettings.from_additional_config(additional)
        if settings.entry_only:
            settings.as_entry_only(num_layers=1)  # what it is, the server will see
        return settings
    except ValueError as error:
        names = "|".join(field.name for field in fields(ServingSettings))
        # Not inside quotes, where a name is a value or a key of the user's JSON.
        message = re.sub(
            rf"(?<!['\"\w])(?:{names})(?!['\"\w])", lambda match: flag_of(match[0]), str(error)
        )
        raise ValueError(message) from None


def _family(
    rest: Sequence[str], everything: Sequence[str], overrides: Json, settings: ServingSettings
) -> Family:
    """The family of the model's architecture, from its config.json."""
    model = _value_of("--model", everything)
    if rest and not rest[0].startswith("-"):
        model = rest[0]
    if model is None:
        raise ValueError("the model comes first: vllm-dpp serve MODEL [flags]")
    if architectures := overrides.get("architectures"):
        return family_of(architectures[0])
    source = _value_of("--hf-config-path", everything) or model
    config = _read_config(source, _value_of("--revision", everything))
    architectures = config.get("architectures") or ["a model without architectures"]
    family = family_of(architectures[0])
    config = config.get("thinker_config", config)
    num_layers = config.get("text_config", config).get("num_hidden_layers")
    layer = settings.prune_layer
    if None not in (layer, num_layers) and layer >= num_layers:
        raise ValueError(
            f"--prune-layer must be below the model's {num_layers} layers, got {layer}"
        )
    return family


def _read_config(model: str, revision: str | None) -> Json:
    """config.json of a local folder, or of a model on the Hub or in its local cache."""
    path = Path(model) / "config.json"
    try:
        if not Path(model).is_dir():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(model, "config.json", revision=revision))
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"cannot read config.json of {model}: {reason} (if vLLM can load this model all the "
            f"""same, name its architecture: {OVERRIDES} '{{"architectures": ["…"]}}')"""
        ) from error


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The value of the last `flag`, which either form of assignment may give."""
    value = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        if argument == flag:
            value = following
        elif argument.startswith(flag + "="):
            value = argument.partition("=")[2]
    return value


def _config_file(arguments: Sequence[str]) -> list[str]:
    """What the file named by --config adds to the command line, as vLLM reads it."""
    path = _value_of("--config", arguments)
    if path is None:
        return []
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    found = dashed(FlexibleArgumentParser().load_config_file(path))
    for argument in found:
        if argument.startswith((OVERRIDES + ".", ADDITIONAL + ".")):
            # vLLM appends dotted options to the command line, where they would replace ours.
            raise ValueError(f"{path}: write {argument[2:]} as nested YAML, not with dots")
    return found


def _take_json(flag: str, arguments: Sequence[str]) -> tuple[Json, list[str]]:
    """The merged values of a JSON `flag`, its dotted forms included, and the other arguments."""
    taken, others = [], []
    waiting = iter(arguments)
    for argument in waiting:
        name = argument.partition("=")[0]
        if name != flag and not name.startswith(flag + "."):
            others.append(argument)
        else:
            taken += [argument] if "=" in argument else [argument, next(waiting, "")]
    parser = _json_parser(any(argument.startswith(flag + ".") for argument in taken))
    parser.add_argument(flag, dest="values", action="append", default=[], type=_json_object)
    merged: Json = {}
    for value in parser.parse_args(taken).values:
        merged = _merge(merged, value)
    return merged, others


def _json_parser(has_dotted: bool) -> argparse.ArgumentParser:
    """vLLM's own where its dotted notation is used; importing it takes seconds."""
    if not has_dotted:
        return argparse.ArgumentParser(prog="vllm-dpp serve", usage=argparse.SUPPRESS)
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return FlexibleArgumentParser(prog="vllm-dpp serve", usage=argparse.SUPPRESS)


def _json_object(text: str) -> Json:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {text!r} ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"not a JSON object: {text!r}")
    return value


def _merge(low: Json, high: Json) -> Json:
    """Both, where `high` wins and nested objects merge likewise."""
    merged = {**low, **high}
    for key in low.keys() & high.keys():
        if isinstance(low[key], dict) and isinstance(high[key], dict):
            merged[key] = _merge(low[key], high[key])
    return merged
