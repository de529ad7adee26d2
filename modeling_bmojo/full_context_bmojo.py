"""FullContext: every past token, in buffers that grow with the text (a layer of type "full_attention").

Entry = position, so query i of a row sees the entries up to `seen + i`; pads are overwritten by the next tokens.

Shapes: R rows (B in a cache), T new tokens, S entries, G key/value heads, D head dim.
"""

from typing import Any

import torch
from torch.nn import functional as F

from .attention_ops import Whole
from .parts_bmojo import MemoryPart, Observed, Tokens
from .states_bmojo import State


GROWTH = 256  # tokens by which a buffer grows at least


class FullContext(MemoryPart):
    """All keys and values."""

    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.heads, self.head_dim = config.num_key_value_heads, config.head_dim

    @classmethod
    def belongs(cls, config, spec):
        return spec.has_attention and spec.window is None

    def states(self):
        growing = State((self.heads, 0, self.head_dim), grows=1)
        return {"keys": growing, "values": growing}

    def observe(self, tokens: Tokens, layer: Any, left, kernels) -> Observed:
        if layer is None:
            return Observed([Whole(tokens.keys, tokens.values)])
        keys, values = self._append(tokens, layer)
        if not layer.started:
            return Observed([Whole(tokens.keys, tokens.values)])
        entry = torch.arange(keys.shape[1], device=keys.device)
        now = layer.seen[:, None] + torch.arange(tokens.query.shape[1], device=keys.device)
        return Observed([Whole(keys, values, entry <= now[..., None])])

    def make_room(self, layer, columns):
        capacity, upto = layer.keys.shape[2], layer.columns + columns
        if capacity < upto:
            room = (0, 0, 0, max(upto - capacity, GROWTH, capacity // 2))
            layer.keys, layer.values = (F.pad(value, room) for value in (layer.keys, layer.values))

    def arrange(self, states):
        for name in ("keys", "values"):
            read = torch.arange(states[name].shape[2], device=states["seen"].device) < states["seen"][:, None]
            kept = states[name].masked_fill(~read[:, None, :, None], 0.0)
            states[name] = kept[:, :, : int(states["seen"].max())]

    def _append(self, tokens: Tokens, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the tokens behind the `seen` ones of each row.

        Where a gradient is wanted the buffers are replaced instead of written in place.

        Returns:
            keys and values `[B, columns + T, G, D]`, of fixed shapes all that there is room for, differentiable in the
            new ones if a gradient is wanted.
        """
        if layer.columns is not None:
            self.make_room(layer, tokens.keys.shape[1])
        upto = layer.keys.shape[2] if layer.columns is None else layer.columns + tokens.keys.shape[1]
        index = layer.seen[:, None] + torch.arange(tokens.keys.shape[1], device=layer.seen.device)
        rows = torch.arange(len(index), device=layer.seen.device)[:, None]
        news = tokens.keys, tokens.values
        if tokens.needs_grad:
            grown = [buffer.to(new.dtype).index_put((rows, index), new) for buffer, new in zip(layer.by_token(), news)]
            layer.keys, layer.values = (value.detach().to(layer.keys.dtype).transpose(1, 2) for value in grown)
            return grown[0][:, :upto], grown[1][:, :upto]
        kept = layer.by_token()
        for buffer, new in zip(kept, news):
            buffer[rows, index] = new.to(buffer.dtype)
        return tuple(buffer[:, :upto].to(new.dtype) for buffer, new in zip(kept, news))


__all__ = ["FullContext"]
