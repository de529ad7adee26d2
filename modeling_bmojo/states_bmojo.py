"""States of a layer: how a memory declares them, and how tokens are written into them.

A layer's tensors are the states that its memories declare; the cache allocates, moves, reorders, saves and loads them
all alike (`cache_layer_bmojo`) and knows nothing else of them.

Shapes: B rows, T new tokens, S entries of a buffer, C channels.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .memory_ops import cast, widest


GROWTH = 256  # entries by which a buffer grows at least


class State(NamedTuple):
    """One state, a tensor `[B, *shape]`.

    kind: its dtype: "model" (that of the activations), "wide" (the same, fp32 at least), "widest" (fp64 where the
    device has it), "count" (int64), "byte" (int8). fill: what it holds before the first token. grows: the axis of
    `shape` that follows the text; None: none does. needs: from columns read to entries that it has at least, None: one
    for each. saved: it goes into the cache's file. on_host: it stays on the CPU wherever the model is. pages: where a
    cache has a directory, its entries lie there, as the field of this name of the layer's pages; None: they do not.
    mirrored: they lie here as well, because every query reads them all.
    """

    shape: tuple[int, ...]
    kind: str = "model"
    fill: int = 0
    grows: int | None = None
    saved: bool = True
    on_host: bool = False
    needs: Callable[[int], int] | None = None
    pages: str | None = None
    mirrored: bool = False

    def entries(self, columns: int) -> int:
        """Return how many entries a growing state has at least after so many columns."""
        return columns if self.needs is None else self.needs(columns)

    def dtype(self, model: torch.dtype, device: torch.device) -> torch.dtype:
        """Return the dtype for activations of dtype `model` on `device`."""
        wide = torch.promote_types(model, torch.float32)
        kinds = {"model": model, "wide": wide, "widest": widest(device), "count": torch.int64, "byte": torch.int8}
        if self.kind not in kinds:
            raise ValueError(f"kind={self.kind!r} of a state: must be one of {list(kinds)}; pick one of them.")
        return kinds[self.kind]

    def new(self, batch: int, model: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return the state before the first token."""
        device = torch.device("cpu") if self.on_host and device.type != "meta" else device
        return torch.full((batch, *self.shape), self.fill, dtype=self.dtype(model, device), device=device)


def grow(buffer: torch.Tensor, axis: int, upto: int, least: int = GROWTH) -> torch.Tensor:
    """Return the buffer with room for `upto` entries along `axis`, zeros behind what it holds; itself if it has it.

    Args:
        least: entries that it grows by at least; 1: by no more than is needed.
    """
    capacity = buffer.shape[axis]
    if capacity >= upto:
        return buffer
    room = [0, 0] * (buffer.dim() - axis)
    room[-1] = max(upto - capacity, least, capacity // 2 if least > 1 else 0)
    return F.pad(buffer, room)


def append(buffer: torch.Tensor, index: torch.Tensor, new: torch.Tensor) -> None:
    """buffer[b, index[b, t]] = new[b, t], in place; `[B, S, ...]`, `[B, T]`, `[B, T, ...]`."""
    rows = torch.arange(len(index), device=index.device)[:, None]
    buffer[rows, index] = new.detach().to(buffer.dtype)


def take(value: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return rows `index` `[B, k]` of `value` `[B, S, ...]`."""
    rows = torch.arange(index.shape[0], device=index.device)[:, None]
    return value[rows, index]


def read(buffer: torch.Tensor, rows: torch.Tensor, place: torch.Tensor | int) -> torch.Tensor:
    """buffer[b, place[b]] `[B, ...]`; a number is one place for all rows."""
    return buffer[:, place] if isinstance(place, int) else buffer[rows, place]


def write(
    buffer: torch.Tensor,
    rows: torch.Tensor,
    place: torch.Tensor | int,
    value: torch.Tensor | int,
    active: torch.Tensor | None,
) -> None:
    """buffer[b, place[b]] = value[b] where `active[b]`, in place and without a data-dependent shape."""
    if isinstance(value, torch.Tensor) and value.dtype != buffer.dtype:
        value = value.to(buffer.dtype)
    if active is not None:
        value = torch.where(active.view(active.shape + (1,) * (buffer.dim() - 2)), value, read(buffer, rows, place))
    if isinstance(place, int):
        buffer[:, place] = value
    else:
        buffer[rows, place] = value


def shift(history: torch.Tensor, new: torch.Tensor, lengths: torch.Tensor | None, first: int = 0) -> None:
    """Move `history` `[B, k, C]` on by the first `lengths` `[B]` (None: all) tokens of `new` `[B, T, C']`, in place.

    Where C' < C only the channels from `first` on move; the caller moves the others.
    """
    with torch.no_grad():
        if new.shape[-1] < history.shape[-1]:
            history = history[..., first : first + new.shape[-1]]
        kept = history.shape[1]
        if kept == 0:
            return
        if lengths is None:
            new = new[:, new.shape[1] - kept :] if new.shape[1] > kept else new
            history.copy_(torch.cat([history, cast(new, history.dtype)], dim=1)[:, -kept:])
            return
        index = lengths[:, None] + torch.arange(-kept, 0, device=history.device)
        fresh = take(new, index.clamp(min=0)).to(history.dtype)
        older = take(history, (index + kept).clamp(max=kept - 1))
        history.copy_(torch.where((index >= 0)[..., None], fresh, older))


__all__ = ["State", "append", "grow", "read", "shift", "take", "write"]
