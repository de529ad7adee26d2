"""Reading a source by its family: the config of its graft, and where each of its tensors goes.

The families themselves are data, in family_table.py.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

from modeling_bmojo import BMojoConfig

from .family_table import COMMON_DROPPED, COMMON_FIELDS, FAMILIES, Family


LAYER_PATTERN = r"every (?P<step>[1-9]\d*)( from (?P<first>\d+))?"

# Fields that are neither facts of the source nor settings of a graft: which layers are converted, and how it is run.
OTHER_FIELDS = ("layer_types", *BMojoConfig.fields_with(role="speed", live=True))
# Fields of BMojoConfig that a graft may set; all others are facts of the source.
MEMORY_FIELDS = tuple(
    name for name in BMojoConfig.fields_with() if name not in (*BMojoConfig.fields_with(role="backbone"), *OTHER_FIELDS)
)


def supported_architectures() -> str:
    """Return the supported architectures as one line for messages."""
    return ", ".join(family.architecture for family in FAMILIES)


def family_named(model_type: str | None, architectures: Iterable[str] | None = None) -> Family:
    """Return the family of a `model_type` and, where the source states them, its `architectures`.

    Raises:
        ValueError: for anything but the supported architectures, which the message lists.
    """
    architectures = list(architectures or ())
    for family in FAMILIES:
        if family.model_type == model_type and (not architectures or family.architecture in architectures):
            return family
    found = ", ".join(architectures) or f"model_type={model_type!r}"
    raise ValueError(
        f"source architecture {found} is not supported; the graft supports {supported_architectures()}. "
        "Add a row to conversion/grafting/family_table.py for another one."
    )


def family_of(config: Any) -> Family:
    """Return the family of a source config (a `PreTrainedConfig`)."""
    return family_named(getattr(config, "model_type", None), getattr(config, "architectures", None))


def source_layer_types(config: Any) -> list[str]:
    """`"full_attention"` or `"sliding_attention"` for each layer of the source."""
    window = getattr(config, "sliding_window", None)
    stated = getattr(config, "layer_types", None)
    if stated:
        kinds = list(stated)
    else:
        kinds = ["sliding_attention" if window is not None else "full_attention"] * config.num_hidden_layers
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ValueError(
            f"layer_types of the source holds {unknown}; the graft reads full_attention and sliding_attention only."
        )
    return kinds


def source_window(config: Any) -> int | None:
    """Return tokens that the source's sliding layers see, the query included; None where no layer slides."""
    return config.sliding_window if "sliding_attention" in source_layer_types(config) else None


def chosen_layers(layers: str | list[int], count: int) -> list[int]:
    """Return indices of the layers that become B'MOJO layers.

    Args:
        layers: "all", a list of indices, or a pattern: "every 2" is 0, 2, 4, ..., "every 2 from 1" is 1, 3, 5, ...

    Raises:
        ValueError: `layers` is none of these, or names layers outside [0, count).
    """
    if layers == "all":
        return list(range(count))
    pattern = re.fullmatch(LAYER_PATTERN, layers) if isinstance(layers, str) else None
    if pattern:
        layers = list(range(int(pattern["first"] or 0), count, int(pattern["step"])))
    is_list = isinstance(layers, list) and all(type(index) is int for index in layers)
    if not is_list or not layers or len(set(layers)) != len(layers) or not all(0 <= index < count for index in layers):
        given = pattern[0] if pattern else layers
        raise ValueError(
            f"layers={given!r}: must be 'all', a list of distinct layer indices from 0 to {count - 1}, at least one, a "
            "pattern such as 'every 2' or 'every 2 from 1', or 'measured' with measured_layers."
        )
    return sorted(layers)


def backbone_fields(config: Any) -> dict[str, Any]:
    """Return the backbone fields of `BMojoConfig` that a source config implies.

    Raises:
        ValueError: the source asks for something that the backbone has no field for.
    """
    family = family_of(config)
    for name, (value, meaning) in family.required.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name}={getattr(config, name)!r} of the source: the B'MOJO backbone has no {meaning}; "
                f"set it to {value!r} in the source's config.json if the graft may do without."
            )
    stated = {name: getattr(config, source) for name, source in {**COMMON_FIELDS, **family.fields}.items()}
    fields = copy.deepcopy(stated)
    fields["attention_dropout"] = fields["attention_dropout"] or 0.0
    for name, source in family.optional_fields.items():
        value = getattr(config, source, None)
        if value is not None:
            fields[name] = value
    fields.update(family.constants)
    if fields.get("no_rope_layers") is not None:
        fields["no_rope_layers"] = [int(value) for value in fields["no_rope_layers"]][: config.num_hidden_layers]
    return fields


def rope_of_any_length(rope: dict[str, Any] | None, kinds: list[str], window: int) -> dict[str, Any] | None:
    """RoPE parameters that turn a token alike however long the text is.

    LongRoPE turns every token by other angles once the text passes the length of the first training; keys that a memory
    holds cannot follow. A window inside that length never needs the other angles: the graft keeps the short ones.

    Args:
        rope: of the source. kinds: layer types of the graft. window: its W.

    Raises:
        ValueError: a layer sees further than the short angles were made for.
    """
    if rope is None or rope["rope_type"] != "longrope":
        return rope
    limit = rope["original_max_position_embeddings"]
    unbounded = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    if unbounded or window > limit:
        wrong = f"layers {unbounded} would stay full attention" if unbounded else f"window_size={window}"
        raise ValueError(
            f"{wrong}: the source's LongRoPE turns all tokens anew where the text passes {limit} tokens, which a "
            f"memory of turned keys cannot follow; set layers=all and window_size to {limit} at most."
        )
    return {**rope, "long_factor": list(rope["short_factor"])}


def bmojo_config_for(source_config: Any, overrides: Mapping[str, Any], layers: str | list[int] = "all") -> BMojoConfig:
    """Return the B'MOJO config of a graft: facts of the source, the chosen layers, and `overrides` of the memory
    fields.

    Layers that are not chosen stay what they are in the source, full or sliding attention. All windowed layers share
    one `window_size`; it defaults to the source's own window where the source has one.

    Raises:
        ValueError: unsupported source, an override that is no memory field, or a contradiction between the two.
    """
    for name in overrides:
        if name not in MEMORY_FIELDS:
            raise ValueError(
                f"{name}={overrides[name]!r}: not a field that a graft may set; it is a fact of the source."
            )
    kinds = source_layer_types(source_config)
    window = source_window(source_config)
    for index in chosen_layers(layers, source_config.num_hidden_layers):
        kinds[index] = "bmojo"
    memory = dict(overrides)
    if window is not None:
        memory.setdefault("window_size", window)
        if "sliding_attention" in kinds and memory["window_size"] != window:
            kept = [index for index, kind in enumerate(kinds) if kind == "sliding_attention"]
            raise ValueError(
                f"window_size={memory['window_size']}: layers {kept} stay sliding-window layers of the source, whose "
                f"sliding_window is {window}, and all windowed layers share one size; "
                f"set window_size={window} or graft those layers too."
            )
    fields = {**backbone_fields(source_config), "layer_types": kinds, **memory}
    window_size = fields.get("window_size", BMojoConfig.window_size)
    fields["rope_parameters"] = rope_of_any_length(fields["rope_parameters"], kinds, window_size)
    return BMojoConfig(**fields)


def targets_of(config: Any, name: str) -> tuple[tuple[str, ...], str]:
    """Where a source tensor goes: `((target name,), "")`, several names in the order of their rows for a tensor that
    holds several of ours, or `((), reason)` where it is left behind on purpose."""
    family = family_of(config)
    for pattern, reason in family.dropped + COMMON_DROPPED:
        if re.fullmatch(pattern, name):
            return (), reason
    if name == "lm_head.weight" and config.tie_word_embeddings:
        return (), "tied to model.embed_tokens.weight"
    for pattern, replacements in family.splits:
        if re.fullmatch(pattern, name):
            return tuple(re.sub(pattern, replacement, name) for replacement in replacements), ""
    for pattern, replacement in family.renames:
        if re.fullmatch(pattern, name):
            return (re.sub(pattern, replacement, name),), ""
    return (name,), ""
