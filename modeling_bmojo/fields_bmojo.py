"""Configuration fields: the role of each, said once where it is declared, and the rules that values are checked by.

    role        what the field says                       set by
    backbone    the Transformer around the memories       the source of a graft
    memory      the memories                              whoever grafts or builds
    speed       how it is computed, never a result        whoever runs it

What a cache must agree on are the fields that change results; what must not change on a model that is built are those
that are not live; what a graft maps from its source is the backbone; what it may set are memory and speed.
"""

import dataclasses
import inspect
import math
from typing import Any, NoReturn

from transformers import PreTrainedConfig


def _declared(role: str, default: Any, results: bool, live: bool, factory: bool = False) -> Any:
    metadata = {"role": role, "results": results, "live": live}
    value = {"default_factory": default} if factory else {"default": default}
    return dataclasses.field(**value, metadata=metadata)


def backbone(default: Any = None, *, results: bool = True, live: bool = False, factory: bool = False) -> Any:
    """Return a field of the Transformer.

    results: it changes what a built model computes outside of training. live: it may change on a model that is built.
    factory: `default` makes the value.
    """
    return _declared("backbone", default, results, live, factory)


def memory(default: Any, *, results: bool = True, live: bool = False) -> Any:
    """Return a field of the memories."""
    return _declared("memory", default, results, live)


def speed(default: Any, *, live: bool = False) -> Any:
    """Return a field that changes speed and memory, never a result."""
    return _declared("speed", default, False, live)


def own_fields(config_class: type[PreTrainedConfig]) -> dict[str, dict[str, Any]]:
    """Return the fields that B'MOJO (or a subclass of its configuration) declares, by name, with what is said of them.

    One that says nothing changes results and is built into the layers: whoever adds it decides otherwise or not.
    """
    declared = dict.fromkeys(
        name
        for each in reversed(config_class.__mro__)
        if issubclass(each, PreTrainedConfig) and each is not PreTrainedConfig
        for name in inspect.get_annotations(each)
    )
    known = {field.name: field.metadata for field in dataclasses.fields(config_class)}
    unsaid = {"role": "memory", "results": True, "live": False}
    return {name: {**unsaid, **known[name]} for name in declared if name in known}


def fields_with(config_class: type[PreTrainedConfig], **said: Any) -> tuple[str, ...]:
    """Return names of the fields of which all this is said, e.g. `fields_with(BMojoConfig, role="backbone")`."""
    key = (config_class, *said.items())
    if key not in _FOUND:
        found = own_fields(config_class).items()
        _FOUND[key] = tuple(name for name, facts in found if all(facts[key] == value for key, value in said.items()))
    return _FOUND[key]


_FOUND: dict[tuple, tuple[str, ...]] = {}  # a model asks at every call, also in compiled code: no decorator


# Rules ---------------------------------------------------------------------------------------------------------------
def reject(name: str, value: Any, rule: str, remedy: str = "") -> NoReturn:
    """Raise the ValueError for a field."""
    raise ValueError(f"{name}={value!r}: {rule}" + (f"; {remedy}" if remedy else "") + ".")


def require_int(config: PreTrainedConfig, name: str, minimum: int, remedy: str) -> None:
    """Raise ValueError unless the field is a whole number of at least `minimum`."""
    value = getattr(config, name)
    if not is_int(value) or value < minimum:
        reject(name, value, f"must be an integer >= {minimum}", remedy)


def require_number(config: PreTrainedConfig, name: str, minimum: float, exclusive: bool, remedy: str) -> None:
    """Raise ValueError unless the field is a finite number beyond `minimum` (or equal to it, unless `exclusive`)."""
    value = getattr(config, name)
    if not is_number(value) or not (minimum < value if exclusive else minimum <= value) or value == math.inf:
        reject(name, value, f"must be a finite number {'>' if exclusive else '>='} {minimum}", remedy)


def require_choice(config: PreTrainedConfig, name: str, choices: tuple) -> None:
    """Raise ValueError unless the field is one of `choices`."""
    value = getattr(config, name)
    if value not in choices:
        reject(name, value, f"must be one of {list(choices)}", "pick one of them")


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """Return a field's value as it comes back from JSON: a copy, of lists where it has tuples."""
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return {key: plain(each) for key, each in value.items()} if isinstance(value, dict) else value


__all__ = ["backbone", "fields_with", "memory", "own_fields", "speed"]
