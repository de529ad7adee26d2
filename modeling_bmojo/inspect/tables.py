"""Tables of what there is, as Markdown, made from the classes: what docs/model.md and docs/configuration.md show.

A class that is entered in `configuration_bmojo` is in its table. Sizes are written as the fields that they are made of:
the classes are asked with numbers that know their names.
"""

import dataclasses
import inspect
from typing import Any

from ..config_rules_bmojo import LAYER_TYPES
from ..configuration_bmojo import FADING_MEMORIES, INNOVATIONS, PARTS, BMojoConfig
from ..fields_bmojo import is_int, own_fields
from ..innovation_bmojo import SIGNALS
from ..parts_bmojo import LayerSpec
from ..states_bmojo import State


KINDS = {
    "model": "the model's dtype",
    "wide": "fp32 at least",
    "widest": "fp64 where there is one",
    "count": "int64",
    "byte": "int8",
}


class Size(int):
    """A number that knows how it came about: sums, differences, products and quotients are written down.

    text: the expression. loose: it is a sum, which a product puts in brackets.
    """

    text: str
    loose: bool

    def __new__(cls, value: int, text: str, loose: bool = False) -> "Size":
        size = super().__new__(cls, value)
        size.text, size.loose = text, loose
        return size

    def __add__(self, other):
        return self if other == 0 else Size(int(self) + other, f"{self.text} + {_text(other)}", True)

    __radd__ = __add__

    def __sub__(self, other):
        return self if other == 0 else Size(int(self) - other, f"{self.text} - {_factor(other)}", True)

    def __mul__(self, other):
        return Size(int(self) * other, f"{_factor(self)} * {_factor(other)}")

    def __rmul__(self, other):
        return Size(other * int(self), f"{_factor(other)} * {_factor(self)}")

    def __floordiv__(self, other):
        return Size(int(self) // other, f"{_factor(self)} / {_factor(other)}")


def _text(size: int) -> str:
    return getattr(size, "text", str(int(size)))


def _factor(size: int) -> str:
    return f"({_text(size)})" if getattr(size, "loose", False) else _text(size)


class Named:
    """A configuration whose whole numbers know the names of their fields."""

    def __init__(self, config: BMojoConfig):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name)
        return Size(value, name) if is_int(value) else value

    def layer_spec(self, layer_idx: int) -> LayerSpec:
        return type(self._config).layer_spec(self, layer_idx)


# The tables ----------------------------------------------------------------------------------------------------------
def innovation_table() -> str:
    """Return what `innovation` may be: by what each test judges, what it remembers, what it runs."""
    config, rows = Named(BMojoConfig()), []
    for name, test in INNOVATIONS.items():
        signal = SIGNALS.get(test.signal, str(test.signal))
        rows.append((f"`{name}`", test.about, signal, _states(test(config).states(config)), _codes(test.operations)))
    return _table(("`innovation`", "judges by", "is given", "states", "operations"), rows)


def fading_table() -> str:
    """Return what `ssm_type` may be: the projections, states and operations of each fading memory."""
    rows = []
    for name, memory in FADING_MEMORIES.items():
        config = Named(BMojoConfig(ssm_type=name))
        states = _states(memory.states(config))
        rows.append((f"`{name}`", memory.about, _codes(memory.projections(config)), states, _codes(memory.operations)))
    return _table(("`ssm_type`", "what it is", "projections", "states", "operations"), rows)


def part_table(config: BMojoConfig | None = None) -> str:
    """Return the parts of a layer's memory: which layers have them, where they keep tokens, their states.

    Args:
        config: whose fields the parts are built by; None: the default configuration with a storage.
    """
    if config is None:
        config = BMojoConfig(storage_size=32, storage_candidates=256, storage_sketch_size=16)
    rows = []
    for part in PARTS:
        specs = [Named(_of_kind(config, kind)).layer_spec(0) for kind in LAYER_TYPES]
        specs = [spec for spec in specs if part.belongs(config, spec)]
        about = " ".join(inspect.getdoc(part).partition("\n\n")[0].split())
        built = part(Named(config), specs[0]) if specs else None
        places = f"`{_text(built.places)}`" if built is not None and built.places else ""
        states = "" if built is None else _states(built.states())
        rows.append((f"`{part.__name__}`", about, _codes(spec.kind for spec in specs), places, states))
    return _table(("part", "what it keeps", "in layers of type", "places in the key buffer", "states beside it"), rows)


def field_table(config_class: type[BMojoConfig] = BMojoConfig) -> str:
    """Every field of the configuration: default, role, and what follows from changing it."""
    known, rows = {field.name: field for field in dataclasses.fields(config_class)}, []
    for name, facts in own_fields(config_class).items():
        made = known[name].default_factory
        default = known[name].default if made is dataclasses.MISSING else made()
        said = ("yes" if facts[key] else "no" for key in ("results", "live"))
        rows.append((f"`{name}`", f"`{default!r}`", facts["role"], *said))
    return _table(("field", "default", "role", "changes results", "may change on a built model"), rows)


def _of_kind(config: BMojoConfig, kind: str) -> BMojoConfig:
    return type(config)(**{**config.to_dict(), "layer_types": [kind] * config.num_hidden_layers})


def _states(states: dict[str, State]) -> str:
    """Return the states of one shape and dtype together: `a`, `b`: `[B, ...]`, dtype."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, state in states.items():
        sizes = ["..." if axis == state.grows else _text(size) for axis, size in enumerate(state.shape)]
        alike.setdefault((f"`[{', '.join(['B', *sizes])}]`", KINDS[state.kind]), []).append(name)
    return "; ".join(f"{_codes(names)}: {shape}, {kind}" for (shape, kind), names in alike.items())


def _codes(names) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


__all__ = ["fading_table", "field_table", "innovation_table", "part_table"]
