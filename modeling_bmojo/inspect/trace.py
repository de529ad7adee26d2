"""What a text does to a B'MOJO memory, measured: the innovation of every token, and bytes against context.

A layer stores a token's innovation with the token, so reading at most W tokens at a time and looking at the cache in
between misses none: no hook, no change of the model. `plots.py` draws what is measured here.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from ..cache_bmojo import BMojoCache
from ..configuration_bmojo import BMojoConfig
from ..eidetic_bmojo import EideticMemory
from ..memory_ops import blocked_expiry, retention_key


READ_AT_ONCE = 512  # tokens, when only bytes are measured


class InnovationTrace(NamedTuple):
    """Innovations of a text, as the layers with an eidetic memory measured them.

    layers: their indices. innovations: `[layers, B, T]` by position among the real tokens, NaN behind a row's end, in
    fp32 (fp64 of fp64 models). kept: `[layers, B, T]`, True for tokens beyond the window that are kept at the end.
    cache: the memory afterwards. decay, clock: the model's eidetic_decay and decay_clock.
    """

    layers: list[int]
    innovations: torch.Tensor
    kept: torch.Tensor
    cache: BMojoCache
    decay: float
    clock: str = "tokens"

    def expiry(self, layer: int, row: int = 0) -> torch.Tensor:
        """Return the first position that does not see each token any more, `[T']` of the row; a huge number for
        never."""
        index = place_of(self.layers, layer)
        e = self.innovations[index, row][: int(self.cache.seen[row])]
        spec = self.cache.specs[layer]
        clocks = torch.arange(len(e)) if self.clock == "tokens" else e.double().cumsum(dim=0)
        keys = retention_key(e, clocks, self.decay)
        return blocked_expiry(keys[None], spec.window, spec.slots)[0]


def trace_innovation(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> InnovationTrace:
    """Read a text into a fresh cache and note every token's innovation. The model stays as it is.

    Args:
        model: a B'MOJO model, with or without adapters. input_ids: `[B, T]`. attention_mask: `[B, T]` or None.

    Raises:
        ValueError: if no layer of the model measures innovations (eidetic_size=0, or no "bmojo" layer).
    """
    cache = BMojoCache(model.config)
    layers = remembering_layers(cache)
    step = min(cache.specs[index].window for index in layers)
    dtype = torch.promote_types(model.dtype, torch.float32)  # of the innovations that the cache stores
    found = torch.full((len(layers), *input_ids.shape), torch.nan, dtype=dtype)
    with evaluating(model):
        for start in range(0, input_ids.shape[1], step):
            end = min(start + step, input_ids.shape[1])
            mask = None if attention_mask is None else attention_mask[:, :end]
            model(input_ids=input_ids[:, start:end], attention_mask=mask, cache=cache, use_cache=True)
            for index, layer in enumerate(layers):
                _note(cache, layer, found[index])
    kept = torch.zeros(found.shape, dtype=torch.bool)
    for index, layer in enumerate(layers):
        for row in range(input_ids.shape[0]):
            kept[index, row, [token.position for token in cache.remembered(layer, row)]] = True
    return InnovationTrace(layers, found, kept, cache, model.config.eidetic_decay, model.config.decay_clock)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluate without gradients; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(modes[0][1])
        for module, training in modes:
            module.training = training


def _note(cache: BMojoCache, layer: int, into: torch.Tensor) -> None:
    """Write the innovations that a layer holds into `[B, T]`, by position."""
    for row in range(into.shape[0]):
        positions, innovations = held_tokens(cache, layer, row)
        into[row, positions] = innovations


def held_tokens(cache: BMojoCache, layer: int, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions and innovations of the tokens that a layer holds, window and eidetic memory, by position."""
    states = cache.layers[layer]
    own = states.memory.part(EideticMemory).own
    positions, innovations = states.positions[row, own].cpu(), states.innovations[row, own].cpu()
    order = positions.argsort()
    order = order[positions[order] >= 0]
    return positions[order], innovations[order]


def remembering_layers(cache: BMojoCache) -> list[int]:
    layers = [index for index, spec in enumerate(cache.specs) if spec.slots]
    if not layers:
        raise ValueError("eidetic_size=0 or no 'bmojo' layer: nothing measures innovations; load such a model.")
    return layers


def place_of(layers: list[int], layer: int) -> int:
    if layer not in layers:
        raise ValueError(f"layer={layer}: measures no innovation; the layers that do are {layers}.")
    return layers.index(layer)


def memory_bytes(config: BMojoConfig, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Return bytes of one sequence's memory after `tokens` tokens: of B'MOJO's cache, and of a Transformer's of these
    sizes.

    States that grow with the text (of "full_attention", of a storage) are counted without their room for growing.
    """
    cache, probe = BMojoCache(config), torch.empty(1, 1, 1, dtype=dtype, device="meta")
    per_layer = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize * tokens
    growing = 0
    for layer in cache.layers:
        layer.lazy_initialization(probe)
        for state in layer.memory.declared.values():
            if state.grows is not None:
                sizes = [size for axis, size in enumerate(state.shape) if axis != state.grows]
                entry = math.prod(sizes) * state.dtype(dtype, torch.device("cpu")).itemsize
                growing += state.entries(tokens) * entry
    last_hidden = config.hidden_size * dtype.itemsize
    return cache.nbytes + last_hidden + growing, config.num_hidden_layers * per_layer


def measure_bytes(model: nn.Module, lengths: Sequence[int]) -> list[int]:
    """Return bytes of the model's cache after reading as many random tokens as `lengths` say, in rising order."""
    cache, generator, read, found = BMojoCache(model.config), torch.Generator().manual_seed(0), 0, []
    with evaluating(model):
        for length in lengths:
            while read < length:
                count = min(READ_AT_ONCE, length - read)
                ids = torch.randint(0, model.config.vocab_size, (1, count), generator=generator)
                model(input_ids=ids.to(model.device), cache=cache, use_cache=True)
                read += count
            found.append(cache.nbytes)
    return found


__all__ = [
    "InnovationTrace",
    "held_tokens",
    "measure_bytes",
    "memory_bytes",
    "place_of",
    "remembering_layers",
    "trace_innovation",
]
