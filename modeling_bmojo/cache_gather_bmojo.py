"""Caches of several batches as one: what `nn.DataParallel` does with the outputs of its replicas.

It makes `type(cache)(map(gather, zip(*caches)))`, where `gather` joins corresponding tensors along the rows, tuples
item by item, and None to None. So a cache is iterable, `[B, ...]` tensors and tuples of them, and can be built of that.

    layer 0      (keys, values, (counts, text, *other states))
    others       (keys, values, other states)

counts: `[1, 2]` int64, columns read and whether it is unknown which were pads. text: `[1, n]` uint8, the facts as
JSON. Both stand once per cache, so that after joining R caches each has R rows.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from .cache_facts_bmojo import described, undescribed
from .cache_layer_bmojo import BMojoCacheLayer
from .configuration_bmojo import BMojoConfig


class Joined(NamedTuple):
    facts: dict[str, Any]
    layers: list[BMojoCacheLayer]


def _others(layer: BMojoCacheLayer) -> list[str]:
    return [name for name in layer.names if name not in ("keys", "values")]


def cut_state(layer: BMojoCacheLayer, name: str) -> torch.Tensor | None:
    """Return a state on the others' device, without the room for growing, which may differ from cache to cache."""
    value, state = getattr(layer, name), layer.memory.declared.get(name)
    if value is None or state is None:
        return value
    value = value.to(layer.seen.device)
    if state.grows is None or layer.columns is None:
        return value
    return value.narrow(state.grows + 1, 0, state.entries(layer.columns))


def items_of(facts: dict[str, Any], layers: list[BMojoCacheLayer]) -> Iterator[tuple]:
    """One tuple per layer."""
    for index, layer in enumerate(layers):
        keys, values = (cut_state(layer, name) for name in ("keys", "values"))
        others = tuple(cut_state(layer, name) for name in _others(layer))
        if index == 0:
            others = (*_heads(facts, layers), *_with_pads(layer, others))
        yield keys, values, others


def _heads(facts: dict[str, Any], layers: list[BMojoCacheLayer]) -> tuple[torch.Tensor, torch.Tensor]:
    first = layers[0]
    device = None if first.seen is None else first.seen.device
    text = described(facts).encode()
    unknown = first.pads is None and not first.even
    return (
        torch.tensor([[first.columns, int(unknown)]], device=device),
        torch.tensor([list(text)], dtype=torch.uint8, device=device),
    )


def _with_pads(first: BMojoCacheLayer, others: tuple) -> tuple:
    """With a fingerprint of the pads in any case: the caches that it is joined with may have one."""
    if first.seen is None or first.pads is not None:
        return others
    names = _others(first)
    return tuple(torch.zeros_like(first.seen) if name == "pads" else value for name, value in zip(names, others))


def _config_class(facts: dict[str, Any]) -> type[BMojoConfig]:
    """Return the configuration, or the subclass of it, whose fields these are: a subclass may have declared more."""
    kinds, found = [BMojoConfig], None
    while kinds and found is None:
        kind = kinds.pop(0)
        found = kind if set(facts) <= set(kind.__dataclass_fields__) else None
        kinds += kind.__subclasses__()
    return found or BMojoConfig


def layers_of(facts: dict[str, Any]) -> list[BMojoCacheLayer]:
    """Return the empty layers of a cache of these facts."""
    config = _config_class(facts)(**facts)
    return [BMojoCacheLayer(config, index) for index in range(config.num_hidden_layers)]


def joined(items: Iterable[tuple]) -> Joined:
    """Return what `items_of` gave, of one cache or of several, as the layers of one.

    Raises:
        ValueError: if it is something else, or the caches differ in their model or in the columns that they have read.
    """
    remedy = "join caches of one model that have read the same number of columns, or pass model.config."
    try:
        items = list(items)
        counts, text = items[0][2][:2]
        facts = undescribed(bytes(text[0].tolist()).decode())
        layers = layers_of(facts)
        states = []
        for layer, item in zip(layers, items):
            names = _others(layer)
            states.append(dict(zip(("keys", "values", *names), (*item[:2], *item[2][-len(names) :]))))
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"these are no items of caches that can be joined ({error}); {remedy}") from error
    columns, unknown = counts[:, 0].tolist(), bool(counts[:, 1].any())
    if len(set(columns)) > 1 or bool((text != text[:1]).any()) or len(items) != len(layers):
        raise ValueError(f"caches that have read {columns} columns, or of several models, cannot be joined; {remedy}")
    for layer, found in zip(layers, states) if columns[0] else ():
        # Copies: items of one cache are its own states, which it writes in place.
        layer.restore({name: value.clone() for name, value in found.items() if value is not None}, columns[0])
    if unknown:
        layers[0].pads = None
    return Joined(facts, layers)
