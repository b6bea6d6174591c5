"""Reads a configuration: strict YAML plus ``key=value`` overrides into frozen dataclasses.

Nothing in a file is executed: `yaml.SafeLoader` is the only loader, duplicate keys and tags that
would build objects are refused.
"""

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ringattn.errors import UserError
from ringattn.launch.config import Config

_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")


class _StrictLoader(yaml.SafeLoader):
    """`SafeLoader` that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Reads `path`, applies overrides such as ``"parallel.cp=2"`` in order, and types the result.

    Values are not checked against each other: see `ringattn.launch.config_check`.

    Raises:
        UserError: unreadable file, broken YAML, unknown or repeated key, wrong type.
    """
    values = _flatten(_read_yaml(Path(path)))
    for override in overrides:
        key, value = _parse_override(override)
        values[key] = value
    return config_from_values(values)


def config_from_values(values: Mapping[str, Any]) -> Config:
    """Builds a `Config` from dotted keys and raw values; raises UserError on a bad key or type."""
    fields = config_fields()
    typed: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise _unknown_key(key)
        converted = convert(key, value, fields[key])
        section, _, name = key.rpartition(".")
        (typed.setdefault(section, {}) if section else top)[name] = converted
    hints = typing.get_type_hints(Config)
    sections = {section: hints[section](**entries) for section, entries in typed.items()}
    return Config(**top, **sections)


def config_fields() -> dict[str, Any]:
    """Every dotted key of the configuration with its type."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(hint):
            found.update({f"{name}.{k}": v for k, v in typing.get_type_hints(hint).items()})
        else:
            found[name] = hint
    return found


def dump_config(config: Config) -> str:
    """The configuration as YAML text; `load_config` of that text gives an equal `Config`."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        return [plain(entry) for entry in value] if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False)


def config_values(config: Config) -> dict[str, Any]:
    """The configuration as a flat mapping from dotted keys to values."""
    return _flatten(dataclasses.asdict(config))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"config {path}", "no such file", "give an existing YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"config {path}", "must be UTF-8 text", "give a YAML file") from None
    except OSError as error:
        raise UserError(
            f"config {path}", f"cannot be read ({error.strerror})", "give a readable YAML file"
        ) from None
    loaded = parse_yaml(text, f"config {path}")
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(
            f"config {path}", "must be a mapping of sections", "write e.g. 'train: {steps: 100}'"
        )
    return loaded


def parse_yaml(text: str, where: str) -> Any:
    """Parses one YAML document without running anything; raises UserError with the line."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.constructor.ConstructorError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = str(error.problem)
        if "constructor for the tag" in problem:
            tag = problem.split("'")[1]
            raise UserError(
                f"{where}{line}: tag {tag}",
                "tags that build objects or run code are refused",
                "write plain text, numbers, lists and mappings",
            ) from None
        raise UserError(f"{where}{line}", problem, "keep one plain value per key") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or "broken").split())
        raise UserError(f"{where}{line}", f"is not valid YAML ({problem})", "repair it") from None
    except (RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(where, f"is not valid YAML ({reason})", "repair it") from None


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys of a nested mapping; a section must be a mapping (null is an empty one)."""
    sections = {k for k, hint in typing.get_type_hints(Config).items() if isinstance(hint, type)}
    sections = {k for k in sections if dataclasses.is_dataclass(typing.get_type_hints(Config)[k])}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in sections:
            flat[key] = value
        elif value is None:
            continue
        elif isinstance(value, Mapping):
            flat.update({f"{key}.{name}": entry for name, entry in value.items()})
        else:
            raise _section_given(key, value)
    return flat


def _parse_override(text: str) -> tuple[str, Any]:
    key, separator, raw = text.partition("=")
    if not separator or not key.strip():
        raise UserError(
            f"argument {text!r}", "is not of the form key=value", "write e.g. train.steps=100"
        )
    key = key.strip()
    fields = config_fields()
    if any(name.startswith(f"{key}.") for name in fields):
        raise _section_given(key, raw)
    if key not in fields:
        raise _unknown_key(key)
    if str in _choices(fields[key]) and raw.strip() != "null":
        return key, raw
    return key, parse_yaml(raw, f"argument {key}")


def _unknown_key(key: str) -> UserError:
    fields = list(config_fields())
    near = difflib.get_close_matches(key, fields, n=1, cutoff=0.6)
    if not near:
        leaf = key.rpartition(".")[2]
        near = [name for name in fields if name.rpartition(".")[2] == leaf]
    sections = ", ".join(dict.fromkeys(name.partition(".")[0] for name in fields))
    fix = f"did you mean {near[0]}?" if near else f"keys start with one of {sections}"
    return UserError(f"config key {key}", "unknown", fix)


def _section_given(key: str, value: Any) -> UserError:
    first = next(name for name in config_fields() if name.startswith(f"{key}."))
    return UserError(f"{key}={value}", f"{key} is a section", f"set its keys, e.g. {first}")


def _choices(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type: the members of a union, else the type itself."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return typing.get_args(hint)
    return (hint,)


def convert(key: str, value: Any, hint: Any) -> Any:
    """`value` as `hint`, or UserError. Integers pass as floats; YAML 1.1 reads 1e-3 as text."""
    for choice in _choices(hint):
        if choice is type(None) and value is None:
            return None
        if typing.get_origin(choice) is typing.Literal and value in typing.get_args(choice):
            return value
        if choice is str and isinstance(value, str):
            return value
        if choice is bool and isinstance(value, bool):
            return value
        if choice is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if choice is float and (number := _number(value)) is not None:
            return number
        if typing.get_origin(choice) is dict and isinstance(value, Mapping) and value:
            inner = typing.get_args(choice)[1]
            for name, entry in value.items():
                if entry is None:
                    rule = f"{name!r} has no value after it: YAML wants a space after the colon"
                    raise UserError(f"{key}={_show(value)}", rule, f"write {key}={{NAME: 0.5}}")
            return {str(name): convert(key, entry, inner) for name, entry in value.items()}
        if typing.get_origin(choice) is tuple:
            parts = typing.get_args(choice)
            if parts[-1] is Ellipsis:
                parts = parts[:1] * (len(value) if isinstance(value, (list, tuple)) else 0)
                if not parts:
                    continue
            if isinstance(value, (list, tuple)) and len(value) == len(parts):
                return tuple(convert(key, v, part) for v, part in zip(value, parts, strict=True))
    raise UserError(f"{key}={_show(value)}", f"must be {_describe(hint)}", f"set {key} to that")


def _number(value: Any) -> float | None:
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value)


def _show(value: Any) -> str:
    text = " ".join(str(value).split()) if value is not None else "null"
    return text if len(text) <= 60 else text[:57] + "..."


def _describe(hint: Any) -> str:
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    words: list[str] = []
    for choice in _choices(hint):
        if typing.get_origin(choice) is typing.Literal:
            words.append("one of " + ", ".join(map(str, typing.get_args(choice))))
        elif typing.get_origin(choice) is dict:
            words.append("a mapping from names to numbers")
        elif typing.get_origin(choice) is tuple and typing.get_args(choice)[-1] is Ellipsis:
            words.append(f"a list, each entry {_describe(typing.get_args(choice)[0])}")
        elif typing.get_origin(choice) is tuple:
            words.append(f"a list of {len(typing.get_args(choice))} numbers")
        else:
            words.append("null" if choice is type(None) else names[choice])
    return " or ".join(words)
