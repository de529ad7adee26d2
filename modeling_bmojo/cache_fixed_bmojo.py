"""A cache of fixed shapes: one program of a decoding step reads the first token and the millionth.

The states of constant size have their last shape from the first token on; what is empty in them is masked. What is left
that follows the text are three numbers, and a fixed cache has none of them:

    columns     a number that an exported program, or a compiler of whole steps, would take for a constant. Here the
                cache's `counter` `[1]` int64 counts them, and `layer.columns` is None: whoever asked for it would fail.
    nothing     whether anything was read before. Here the first token is a step too, on states without content.
    room        entries of a layer with full attention. Here as many as were asked for, masked behind the text.

Nothing else is computed otherwise: the forms that decode a batch with pads, whose rows differ in length, go by tensors.

Not for a storage: what it offers is cut to what was stored, by numbers, in shapes and in the blocks that are complete.
"""

from typing import Any

import torch
from torch.nn import functional as F

from .compat_bmojo import CACHE_NAME
from .fields_bmojo import is_int
from .full_context_bmojo import FullContext


BY_LENGTH = ("dynamic", "longrope")  # RoPE types whose frequencies depend on the number of tokens


def fix(cache: Any, model: torch.nn.Module, batch: int | None, room: int | None) -> None:
    """See `BMojoCache.fix`."""
    cache.check(model.config)
    _check(cache, batch)
    _check_room(cache, room)
    if cache.fixed:
        return
    layers, counter = cache.layers, cache.get_seq_length()
    if not layers[0].is_initialized:
        rows = 1 if batch is None else batch
        hidden = torch.zeros(rows, layers[0].memory.hidden, dtype=model.dtype, device=model.device)
        for layer in layers:
            layer.lazy_initialization(hidden)
        layers[-1].last_hidden = hidden
    first = layers[0]
    if first.pads is None and first.even:
        first.pads = torch.zeros_like(first.seen)
    for layer in layers:
        if layer.memory.part(FullContext) is not None:
            missing = room - layer.keys.shape[2]
            # A negative size cuts off room for growing, which holds nothing.
            layer.keys, layer.values = (F.pad(value, (0, 0, 0, missing)) for value in (layer.keys, layer.values))
        layer.columns, layer.even = None, False
    cache.counter = torch.full((1,), counter, dtype=torch.int64, device=first.seen.device)


def unfix(cache: Any) -> None:
    """See `BMojoCache.unfix`."""
    if not cache.fixed:
        return
    columns, cache.counter = cache.get_seq_length(), None
    if columns == 0:
        cache.reset()
        return
    for layer in cache.layers:
        layer.restore(layer.states(), columns)


def _check(cache: Any, batch: int | None) -> None:
    """Raise ValueError for a cache that cannot be fixed."""
    cache.require_plain("fixed")
    if cache.rollback is not None:
        raise ValueError(
            f"rollback_limit={cache.rollback.limit}: a cache that can take back tokens keeps copies by their number, "
            "and cannot be fixed; make one without."
        )
    if any(layer.spec.stored for layer in cache.layers):
        raise ValueError(
            f"storage_size={cache.facts['storage_size']}: what a storage offers grows with the text, in shapes and in "
            "complete blocks, so that such a cache cannot be fixed; load the model with storage_size=0."
        )
    rope = (cache.facts.get("rope_parameters") or {}).get("rope_type")
    if rope in BY_LENGTH:
        raise ValueError(
            f"rope_parameters: rope_type={rope!r} turns by frequencies that depend on the length of the text, so "
            "that a cache cannot be fixed; use a model of another type."
        )
    if batch is None:
        return
    if not is_int(batch) or batch < 1:
        raise ValueError(f"batch_size={batch!r}: must be an integer >= 1, the rows that are read together.")
    if cache.layers[0].is_initialized and batch != cache.batch_size:
        raise ValueError(
            f"batch_size={batch}: {CACHE_NAME} has {cache.batch_size} rows; leave batch_size out, or use a new cache."
        )


def _check_room(cache: Any, room: int | None) -> None:
    """Raise ValueError unless layers with full attention have as much room as they need, and no others are given
    some."""
    full = [layer.index for layer in cache.layers if layer.memory.part(FullContext) is not None]
    read = cache.get_seq_length()
    if room is None and not full:
        return
    if not full:
        raise ValueError(f"room={room!r}: no layer has full attention, so that none needs room; leave it out.")
    if not is_int(room) or room < max(read, 1):
        raise ValueError(
            f"room={room!r}: layers {full} have full attention and keep every token; give the tokens of the longest "
            f"text, at least the {read} read."
        )
    if cache.fixed and any(cache.layers[index].keys.shape[2] != room for index in full):
        raise ValueError(f"room={room}: this cache is fixed with another room; unfix() it first.")


__all__ = ["fix", "unfix"]
