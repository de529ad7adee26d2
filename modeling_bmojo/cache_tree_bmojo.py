"""A cache as tensors and text, for torch.export: a pytree node, so that an exported program takes and returns one.

    leaves     first the columns read, as the length of an empty tensor `[P, 0]`, or of a fixed cache as a number `[1]`;
               then every allocated state, layer by layer, without the room for growing
    context    JSON: the facts (`cache_facts_bmojo`) and the names of the states of each layer

A length stays a symbol in a program of dynamic shapes, where a number would be a constant of it. A fingerprint of the
pads is there in any case, so that a program takes back what it gave, whether or not there were some.
"""

import json
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .cache_bmojo import BMojoCache
from .cache_gather_bmojo import cut_state, layers_of
from .cache_layer_bmojo import BMojoCacheLayer


def flatten(cache: BMojoCache) -> tuple[list[torch.Tensor], str]:
    """Return the leaves and the context.

    Raises:
        ValueError: for a cache whose last forward stopped halfway, that can take back tokens, or that holds stored
            tokens in a directory or in host memory.
    """
    cache.require_plain("exported")
    if cache.rollback is not None:
        raise ValueError(
            f"rollback_limit={cache.rollback.limit}: a cache that can take back tokens cannot be exported, nor taken "
            "apart as a pytree otherwise (DistributedDataParallel with find_unused_parameters); make one without."
        )
    first = cache.layers[0]
    layers = [{name: _trimmed(layer, name) for name in layer.states()} for layer in cache.layers]
    if first.seen is not None and first.even:
        layers[0]["pads"] = torch.zeros_like(first.seen)
    if not cache.fixed and (cache.counter is None or cache.counter.shape[0] != first.columns):
        cache.counter = torch.empty(first.columns, 0, device=None if first.seen is None else first.seen.device)
    states = [value for states in layers for value in states.values()]
    return [cache.counter, *states], json.dumps([cache.facts, [list(states) for states in layers]])


def _trimmed(layer: BMojoCacheLayer, name: str) -> torch.Tensor:
    """Return a state without the room for growing, which it loses here: the same tensor every time, because
    torch.export notes on it which of its axes are symbols."""
    value = cut_state(layer, name)
    if value.shape != getattr(layer, name).shape:
        setattr(layer, name, value)
    return getattr(layer, name)


def flatten_with_keys(cache: BMojoCache) -> tuple[list[tuple[Any, torch.Tensor]], str]:
    """As `flatten`, each leaf with its place."""
    leaves, context = flatten(cache)
    return [(pytree.SequenceKey(place), leaf) for place, leaf in enumerate(leaves)], context


def unflatten(leaves: list[torch.Tensor], context: str) -> BMojoCache:
    """Return the cache that `flatten` was given, on the tensors themselves."""
    counter, *states = leaves
    facts, names = json.loads(context)
    columns = counter.shape[0] if counter.dim() == 2 else None
    left = iter(states)
    layers = layers_of(facts)
    for layer, own in zip(layers, names):
        for name in own:
            setattr(layer, name, next(left))
        if own:
            layer.columns, layer.even, layer.is_initialized = columns, False, True
            layer.device = layer.seen.device
    return BMojoCache.of_layers(facts, layers, counter)


def cache_axes(cache: BMojoCache) -> list[dict[int, Any] | None]:
    """Return what `dynamic_shapes` of torch.export says of a cache whose program is to read on after any number of
    columns: by leaf the axes that follow the text, none of a fixed cache. The batch size stays what it is.

    Raises:
        ValueError: as `flatten`.
    """
    _, context = flatten(cache)
    names = [(layer, name) for layer, own in zip(cache.layers, json.loads(context)[1]) for name in own]
    if cache.fixed:
        return [None] * (len(names) + 1)
    axes: list[dict[int, Any] | None] = [{0: torch.export.Dim.AUTO}]
    for layer, name in names:
        state = layer.memory.declared.get(name)
        grows = state is not None and state.grows is not None
        axes.append({state.grows + 1: torch.export.Dim.AUTO} if grows else None)
    return axes


def register() -> None:
    """Tell torch, once: transformers' exporters register every cache class that is not known yet, in their own way."""
    if BMojoCache not in pytree.SUPPORTED_NODES:
        pytree.register_pytree_node(
            BMojoCache,
            flatten,
            unflatten,
            serialized_type_name=f"{BMojoCache.__module__}:{BMojoCache.__qualname__}",
            flatten_with_keys_fn=flatten_with_keys,
        )


__all__ = ["cache_axes"]
