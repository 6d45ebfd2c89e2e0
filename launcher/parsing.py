"""From a YAML file and dotted flags to a `TrainConfig`; every mistake is one sentence that names the key."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from longhaul.models.errors import UserError

from .config import TrainConfig

C = TypeVar("C")

_OPTIONS = ("config", "print_config", "help")
_EXAMPLE = "--train.steps 100"


def parse(argv: Sequence[str], prog: str = "longhaul train") -> TrainConfig:
    """Read a configuration.

    Args:
        argv: `--config FILE.yaml`, then flags that override its keys, as `--train.steps 100`.
        prog: what the help calls the program.

    Raises:
        UserError: an unknown key, a wrong type, a file that cannot be read, a value that makes no sense.
        SystemExit: after --help or --print_config.
    """
    keys = dict(_leaves(TrainConfig))
    _check_flags(argv, keys)
    for file in _config_files(argv):
        _check_file(file, keys)
    try:
        values = _parser(prog).parse_args(list(argv))
    except (argparse.ArgumentError, TypeError) as error:
        raise _translate(str(error), keys) from None
    return build(TrainConfig, values.as_dict())


def to_yaml(config: Any) -> str:
    """A configuration as text that `parse` reads back to an equal one."""
    text: str = yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, width=120)
    return text


def from_file(path: Path) -> TrainConfig:
    """The configuration of a file alone, as `resolved_config.yaml`."""
    return parse(["--config", str(path)])


def build(cls: type[C], values: Mapping[str, Any]) -> C:
    """A dataclass from nested mappings; its own checks run."""
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.name not in values:
            continue
        value, hint = values[field.name], hints[field.name]
        if dataclasses.is_dataclass(hint):
            arguments[field.name] = build(typing.cast(type, hint), value)
        else:
            arguments[field.name] = tuple(value) if isinstance(value, list) else value
    return cls(**arguments)


@functools.cache
def _parser(prog: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=prog,
        description="Train a model. Keys of the YAML file and flags are the same; flags win.",
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; may be given several times, later ones win.")
    parser.add_class_arguments(TrainConfig, None)
    return parser


def _leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its type; a dataclass itself too."""
    for name, hint in typing.get_type_hints(cls).items():
        yield prefix + name, hint
        if dataclasses.is_dataclass(hint):
            yield from _leaves(typing.cast(type, hint), f"{prefix}{name}.")


def _check_flags(argv: Sequence[str], keys: Mapping[str, Any]) -> None:
    for argument in argv:
        if not argument.startswith("--") or argument == "--":
            continue
        name = argument[2:].split("=", 1)[0]
        flags = [key for key, hint in keys.items() if not dataclasses.is_dataclass(hint)]
        if name not in _OPTIONS and name not in flags:
            raise _unknown(f"--{name}", name, [*flags, *_OPTIONS], "--")


def _config_files(argv: Sequence[str]) -> Iterator[Path]:
    for index, argument in enumerate(argv):
        if argument == "--config" and index + 1 < len(argv):
            yield Path(argv[index + 1])
        elif argument.startswith("--config="):
            yield Path(argument.split("=", 1)[1])


def _check_file(path: Path, keys: Mapping[str, Any]) -> None:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path} cannot be read ({error.strerror}): give the path of a YAML file.") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {path} is not text: give the path of a YAML file.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"--config {path} is not YAML{where} ({error.problem}): mend that line.") from None
    except yaml.YAMLError:
        raise UserError(f"--config {path} is not YAML: give a file of keys and values.") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path} holds no keys: write for example train: and below it steps: 100.")
    _check_keys(content, "", path, keys)


def _check_keys(content: Mapping[Any, Any], prefix: str, path: Path, keys: Mapping[str, Any]) -> None:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if key not in keys:
            siblings = [each for each in keys if each.startswith(prefix)]
            raise _unknown(f"The key {key} in {path}", key, [*siblings, *keys], "")
        if dataclasses.is_dataclass(keys[key]):
            if not isinstance(value, dict):
                raise UserError(f"{key} in {path} holds {value!r}: put keys below it, or leave it out.")
            _check_keys(value, f"{key}.", path, keys)


def _unknown(what: str, key: str, known: Sequence[str], dash: str) -> UserError:
    """The nearest key by its whole name, or by its last part wherever that is."""
    last = key.rsplit(".", 1)[-1]
    by_last = {each.rsplit(".", 1)[-1]: each for each in reversed(known)}
    near = [by_last[last]] if last in by_last else difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    near = near or [by_last[name] for name in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    remedy = f"did you mean {dash}{near[0]}?" if near else "longhaul train --help lists all."
    return UserError(f"{what} is unknown: {remedy}")


def _translate(message: str, keys: Mapping[str, Any]) -> UserError:
    """jsonargparse's complaint in our words."""
    if match := re.match(r'Parser key "([^"]+)":.*(?:Got|Given) value: (.*)', message, re.DOTALL):
        key, value = match[1], match[2].strip().splitlines()[0]
        if key in keys:
            return UserError(f"{key} is {value!r}: give {_type_name(keys[key])}.")
    if match := re.match(r"argument --?([\w.]+): expected", message):
        return UserError(f"--{match[1]} has no value: write it after the flag, as {_EXAMPLE}.")
    if match := re.match(r"[Uu]nrecognized arguments: (.*)", message):
        return UserError(f"{match[1]} is not understood: flags look like {_EXAMPLE}, lists like [a,b].")
    return UserError(f"{' '.join(message.split())}: see longhaul train --help.")


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(each) for each in arguments)
    if origin is tuple:
        kind = {int: "whole numbers", float: "numbers", str: "texts"}.get(arguments[0], "values")
        if arguments[-1] is Ellipsis:
            return f"a list of {kind}, as [a,b]"
        return f"a list of {len(arguments)} {kind}, as [{','.join('ab'[: len(arguments)])}]"
    return names.get(hint, str(hint))


def _plain(value: Any) -> Any:
    """Tuples as lists: plain YAML knows no tuples."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value
