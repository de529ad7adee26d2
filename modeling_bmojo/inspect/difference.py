"""first_difference: where a cached run leaves the uncached one, named by layer and state.

A model that reads a text in pieces must say and remember what it says and remembers when it reads it at once. Where it
does not, the first layer that differs is where the fault is: the layers before it handed on the same numbers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..cache_bmojo import BMojoCache
from .trace import evaluating


OUTPUT = "output"


class Difference(NamedTuple):
    """The first thing in which two runs of a model differ.

    layer: index, or None for what stands behind the layers. state: a state of the cache, or "output". row, column: of
    the first input column whose output differs; None for a state. size: the largest difference, relative to the
    largest value. pieces: how the second run read the text; None: in one piece without a cache.
    """

    layer: int | None
    state: str
    row: int | None
    column: int | None
    size: float
    pieces: list[int] | None


def first_difference(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    pieces: Sequence[int] | None = None,
    tolerance: float | None = None,
) -> Difference | None:
    """Read a text at once with a cache, at once without one, and in pieces; the first layer and state that differ.

    Args:
        model: a B'MOJO model. Load it in float64 to look for faults: other dtypes round differently by themselves.
        input_ids: `[B, T]`. attention_mask: `[B, T]` or None.
        pieces: columns of each forward, which sum up to T; None: half of the text at once, then one by one; and all of
            it in threes.
        tolerance: differences below it, relative to the largest value, are none; None: 1e-9 in float64, 1e-4 in fp32,
            0.05 in narrower types.

    Returns:
        the first `Difference` in the order of the layers, a layer's output before its states; None if there is none.

    Raises:
        ValueError: if `pieces` are not whole numbers of at least 1 that sum up to T.
    """
    columns = input_ids.shape[1]
    splits = (
        [list(pieces)]
        if pieces is not None
        else [
            [columns // 2] * (columns > 1) + [1] * (columns - columns // 2),
            [3] * (columns // 3) + [columns % 3] * (columns % 3 > 0),
        ]
    )
    pieces = splits[0]
    if sum(pieces) != columns or any(type(size) is not int or size < 1 for size in pieces):
        raise ValueError(
            f"pieces={list(pieces)}: must be whole numbers of at least 1 with the sum {columns}; change them."
        )
    if tolerance is None:
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(model.dtype, 0.05)
    with evaluating(model):
        whole, states = _run(model, input_ids, attention_mask, [columns])
        for cut in (None, *splits):
            outputs, others = _run(model, input_ids, attention_mask, cut)
            for index in range(len(outputs)):
                last = index == len(outputs) - 1
                found = _of_outputs(whole[index], outputs[index], attention_mask, tolerance)
                if found is None and cut is not None and not last:
                    found = _of_states(states[index], others[index], tolerance)
                if found is not None:
                    return Difference(None if last else index, *found, cut)
    return None


def _run(model: nn.Module, input_ids: torch.Tensor, mask: torch.Tensor | None, pieces: list[int] | None):
    """Output `[B, T, E]` of every layer and of the model, and every layer's states after the text."""
    # By name, not by class: code loaded with trust_remote_code has classes of its own, and adapters wrap the model.
    body = next(module for module in model.modules() if type(module).__name__ == "BMojoModel")
    found: list[list[torch.Tensor]] = [[] for _ in range(len(body.layers) + 1)]
    watched = [*body.layers, body]

    def note(index: int):
        def hook(module, given, out):
            found[index].append((out[0] if isinstance(out, tuple) else out.last_hidden_state).detach())

        return hook

    hooks = [module.register_forward_hook(note(index)) for index, module in enumerate(watched)]
    cache, start = None if pieces is None else BMojoCache(model.config), 0
    try:
        for size in pieces or [input_ids.shape[1]]:
            end = start + size
            given = None if mask is None else mask[:, :end]
            model(input_ids=input_ids[:, start:end], attention_mask=given, cache=cache, use_cache=cache is not None)
            start = end
    finally:
        for hook in hooks:
            hook.remove()
    outputs = [torch.cat(parts, dim=1) for parts in found]
    states = [] if cache is None else [layer.memory.arranged(layer.states()) for layer in cache.layers]
    return outputs, states


def _of_outputs(ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor | None, tolerance: float):
    apart = (ours - theirs).abs().amax(dim=-1)
    if mask is not None:
        apart = apart.masked_fill(~mask.to(apart.device, torch.bool), 0.0)
    scale = ours.abs().max().clamp(min=1e-30)
    beyond = (~(apart <= tolerance * scale)).nonzero()  # a NaN, which compares with nothing, is beyond
    if len(beyond) == 0:
        return None
    row, column = min(beyond.tolist(), key=lambda place: place[1])
    return OUTPUT, row, column, float(apart.max() / scale)


def _of_states(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float):
    for name in ours:
        if name not in theirs or ours[name].shape != theirs[name].shape:
            return name, None, None, float("inf")
        if ours[name].numel() == 0:
            continue
        apart, scale = (ours[name].double() - theirs[name].double()).abs(), ours[name].double().abs().max()
        size = float(apart.max() / scale.clamp(min=1e-30))
        if not size <= (tolerance if ours[name].is_floating_point() else 0.0):
            return name, None, None, size
    return None


__all__ = ["Difference", "first_difference"]
