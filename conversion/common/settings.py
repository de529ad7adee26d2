"""Settings of every program: a YAML file read into a dataclass, `--set key=value` on top, checked before any work.

The fields of the dataclass are the keys, and their annotations are the rules: a number, a text, a switch, a list of
texts, any of several (`str | None`). A field whose type is a dataclass is a section, one whose type is `dict` a section
of free keys. `Annotated[type, RULED]` leaves a field to the program's own checks, which say more than its type. Every
refusal is a `ValueError` that names the field, its value, the rule and the remedy.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, get_args, get_origin

import yaml


DTYPES = ("float32", "bfloat16", "float16")
RULED = "has a rule of its own"
Settings = TypeVar("Settings")


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """Read `["eidetic_size=64", ...]` as a dict; values are read as YAML.

    Raises:
        ValueError: an item without `=`, or a value that is no YAML.
    """
    values = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {assignment!r}: must read key=value, e.g. --set eidetic_size=64.")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"--set {assignment!r}: the value is not valid YAML ({error}).") from error
    return values


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        ValueError: no such file, no YAML, or no mapping at its top.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"settings file {str(path)!r}: no such file; see configs/ for examples.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or no date as 2001-99-99
        raise ValueError(f"settings file {str(path)!r}: not valid YAML ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"settings file {str(path)!r}: must hold `key: value` lines, found {type(values).__name__}.")
    return values


def read_settings(path: str | Path, overrides: Mapping[str, Any], sections: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file with `overrides` on top, whose dots reach into `sections`.

    Raises:
        ValueError: see `read_yaml`; a dot behind anything but a section.
    """
    values = read_yaml(path)
    for key, value in overrides.items():
        place, *inside = key.split(".") if sections else [key]
        if not inside:
            values[place] = value
            continue
        if len(inside) > 1 or place not in sections:
            raise ValueError(f"--set {key}: only {', '.join(sections)} have values inside.")
        values[place] = {**_mapping(values.get(place) or {}, place), inside[0]: value}
    return values


def known_keys(kind: type, inlined: Sequence[str] = ()) -> tuple[str, ...]:
    """Name the keys of a settings class; `inlined` are those of its field `memory`, at the top instead of inside it."""
    names = tuple(item.name for item in fields(kind))
    return (*(name for name in names if name != "memory"), *inlined) if inlined else names


def make_settings(kind: type[Settings], values: Mapping[str, Any], inlined: Sequence[str] = ()) -> Settings:
    """Make the dataclass `kind` from plain data.

    Args:
        inlined: keys that stand at the top of `values` and become the field `memory`.

    Raises:
        ValueError: an unknown key (with the closest known one), a missing value, or one of a wrong type.
    """
    refuse_unknown(values, known_keys(kind, inlined))
    given = {key: value for key, value in values.items() if key not in inlined}
    if inlined:
        given["memory"] = {key: value for key, value in values.items() if key in inlined}
    _require(kind, given)
    return _filled(kind, given, "")


def refuse_unknown(values: Mapping[str, Any], known: Sequence[str], prefix: str = "") -> None:
    """Refuse a key that is none of `known`, with the closest one (ValueError)."""
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix + close[0]!r}? K" if close else "k"
            raise ValueError(f"{prefix}{key}: no such setting; {hint}nown settings: {', '.join(known)}.")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse a value that is none of `choices` (ValueError)."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {list(choices)}.")


def as_number(value: Any) -> Any:
    """Return a float where `value` is the text of one, as YAML reads 1e-4; else `value` itself."""
    if not isinstance(value, str):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _require(kind: type, given: Mapping[str, Any]) -> None:
    """Refuse missing values of fields without a default; a section says itself how it may look (`example`)."""
    for item in fields(kind):
        if item.default is not MISSING or item.default_factory is not MISSING:
            continue
        value = given.get(item.name)
        if "example" in item.metadata:
            if value is None:
                raise ValueError(f"{item.name}: must be given; e.g. {item.metadata['example']}.")
        elif not isinstance(value, str) or not value.strip():
            raise ValueError(f"{item.name}={value!r}: must be given, in the YAML file or as --{item.name}.")


def _filled(kind: type[Settings], given: Mapping[str, Any], prefix: str) -> Settings:
    """Return the dataclass of checked values; a section that is null or empty keeps its default where null is no
    value."""
    types, found = {item.name: item.type for item in fields(kind)}, {}
    for key, value in given.items():
        options = get_args(types[key]) if isinstance(types[key], UnionType) else (types[key],)
        section = next((option for option in options if is_dataclass(option) or get_origin(option) is dict), None)
        if section is not None and NoneType not in options and (value is None or (get_origin(section) and not value)):
            continue
        if section is not None and value is not None:
            value = dict(_mapping(value, prefix + key))
            if is_dataclass(section):
                refuse_unknown(value, known_keys(section), f"{prefix}{key}.")
                value = _filled(section, value, f"{prefix}{key}.")
        found[key] = value if get_origin(types[key]) is Annotated else _typed(value, options, prefix + key)
    return kind(**found)


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={value!r}: must be a section of `key: value` lines.")
    return value


def _typed(value: Any, options: Sequence[Any], name: str) -> Any:
    if float in options and str not in options:
        value = as_number(value)
    if not any(_is_a(value, option) for option in options):
        names = " or ".join("null" if option is NoneType else _name(option) for option in options)
        raise ValueError(f"{name}={value!r}: must be of type {names}.")
    return value


def _name(option: Any) -> str:
    return str(option) if get_origin(option) else option.__name__


def _is_a(value: Any, option: Any) -> bool:
    base = get_origin(option) or option
    if base in (int, float):
        return isinstance(value, (int, float) if base is float else int) and not isinstance(value, bool)
    return isinstance(value, base) and (base is not list or all(_is_a(item, *get_args(option)) for item in value))
