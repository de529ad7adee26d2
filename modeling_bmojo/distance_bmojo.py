"""Distances beyond what RoPE was trained for: a token further than D_max away is attended to as if at D_max.

    score(t, s) = sigma (R_d q_t) . k_s,   d = min(t - s, D_max)      q, k before RoPE, R_d RoPE's turn by d positions

for queries t from `max_rope_distance_start` on; d = t - s for those before it.

Queries and keys come turned to their positions, and R_t q . R_s k = R_(t - s) q . k. For far pairs both are turned
back, q to D_max and k to 0, and the difference of the two scores is added as a bias to what the softmax forms by
itself.

Shapes: R rows, T queries, H query heads, G key/value heads, D head dim, n blocks, L block length, K keys of a block.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .attention_ops import BlockKeys


Tables = tuple[torch.Tensor, torch.Tensor]


FINE = 256  # positions between two entries of a coarse table


class TurnTables(NamedTuple):
    """RoPE's turns by positions, from two small tables, because angles add up: a cosine costs as much as a hundred
    multiplications, and far queries ask for thousands of positions in every layer.

    coarse, fine: cos and sin `[n, 2, R / 2]` of FINE n positions, and of those below FINE.
    """

    coarse: torch.Tensor
    fine: torch.Tensor

    @classmethod
    def made(cls, turn: Callable[[torch.Tensor], Tables], longest: int, device, dtype: torch.dtype) -> "TurnTables":
        """Return those of positions below `longest` and as many more, from exact cos and sin `[..., R]`."""
        parts = torch.arange(2 * (longest // FINE + 1), device=device) * FINE, torch.arange(FINE, device=device)
        found = []
        for positions in parts:
            cos, sin = (value[:, value.shape[-1] // 2 :] for value in turn(positions))
            found.append(torch.stack([cos, sin], dim=1).to(dtype))
        return cls(*found)

    def reach(self, longest: int) -> bool:
        """Whether they know positions below `longest`."""
        return longest <= FINE * len(self.coarse)

    def __call__(self, positions: torch.Tensor) -> Tables:
        """Return cos and sin `[..., R]`, the first half of sin negated; a position below 0 counts as 0."""
        flat = positions.clamp(min=0).flatten()
        coarse, fine = self.coarse.index_select(0, flat // FINE), self.fine.index_select(0, flat % FINE)
        cos = coarse[:, 0] * fine[:, 0] - coarse[:, 1] * fine[:, 1]
        sin = coarse[:, 1] * fine[:, 0] + coarse[:, 0] * fine[:, 1]
        tables = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        return tuple(value.view(*positions.shape, -1) for value in tables)


class Far(NamedTuple):
    """What far pairs need.

    limit: D_max. start: the first query it holds for. query: `[R, T, H, D]` queries at position D_max. turn: from
    positions to RoPE's cos and sin `[..., R]` without scaling, the first half of sin negated. scaling: sigma.
    """

    limit: int
    start: int
    query: torch.Tensor
    turn: Callable[[torch.Tensor], Tables]
    scaling: float


def rotate(x: torch.Tensor, rotary: Tables | None) -> torch.Tensor:
    """RoPE on `[..., D]`; channels beyond R (partial RoPE) stay as they are.

    Args:
        rotary: cos and sin `[..., R]`, broadcastable, the first half of sin negated; None: no positions.
    """
    if rotary is None:
        return x
    cos, sin = rotary
    size = cos.shape[-1]
    if size == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(size // 2, dims=-1), sin)
    turned = x[..., :size]
    turned = torch.addcmul(turned * cos, turned.roll(size // 2, dims=-1), sin)
    return torch.cat([turned, x[..., size:]], dim=-1)


def scores(query: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """sigma q . k `[..., H, L, K]` of queries `[..., H, L, D]` and keys `[..., G, K, D]`."""
    by_group = query.unflatten(-3, (keys.shape[-3], -1))
    folded = (by_group.flatten(-3, -2) * scaling) @ keys.transpose(-1, -2)
    return folded.unflatten(-2, by_group.shape[-3:-1]).flatten(-4, -3)


def correction(
    far: Far,
    query: torch.Tensor,
    far_query: torch.Tensor,
    keys: torch.Tensor,
    origin: torch.Tensor,
    distant: torch.Tensor,
) -> torch.Tensor:
    """Return what makes the scores of far pairs those at D_max, `[..., H, L, K]`; zero elsewhere.

    Args:
        query, far_query: `[..., H, L, D]`, at their positions and at D_max. keys: `[..., G, K, D]` at their positions.
        origin: `[..., K]` those positions, below 0 = none. distant: bool `[..., L, K]`, which pairs are far.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, far_query, keys = (value.to(dtype) for value in (query, far_query, keys))
    cos, sin = far.turn(origin)
    back = rotate(keys, (cos[..., None, :, :].to(dtype), -sin[..., None, :, :].to(dtype)))
    difference = scores(far_query, back, far.scaling) - scores(query, keys, far.scaling)
    return difference.masked_fill(~distant[..., None, :, :], 0.0)


def step_correction(
    far: Far, query: torch.Tensor, far_query: torch.Tensor, keys: torch.Tensor, origin: torch.Tensor, now: int
) -> torch.Tensor | None:
    """Return `correction` for the one query of a step, at position `now`: `[B, G, H / G, S]`; None: nothing is far.

    Args:
        query, far_query: `[B, G, H / G, D]`. keys: `[B, G, S, D]` at their positions, origin `[B, G, S]`.
    """
    if now < far.start:
        return None
    own, other = query[:, :, :, None], far_query[:, :, :, None]
    distant = (origin < now - far.limit) & (origin >= 0)
    if torch.compiler.is_compiling():
        return correction(far, own, other, keys[:, :, None], origin, distant[:, :, None])[:, :, :, 0]
    some = distant.flatten(0, -2).any(dim=0).nonzero()[:, 0]
    if not len(some):
        return None
    size = keys.shape[2]
    if len(some) < size:
        keys, origin, distant = keys.index_select(2, some), origin.index_select(2, some), distant.index_select(2, some)
    change = correction(far, own, other, keys[:, :, None], origin, distant[:, :, None])[:, :, :, 0]
    return change if len(some) == size else change.new_zeros(*change.shape[:3], size).index_copy_(3, some, change)


def with_distances(
    offer: BlockKeys, far: Far, query: torch.Tensor, positions: torch.Tensor, first: int, length: int
) -> BlockKeys:
    """Return the offer with the far pairs' correction in its bias.

    Args:
        query: `[R, T, H, D]`, all queries; far's are theirs. positions: `[R, T]` theirs, -1 for a pad. first: the first
            block's first query. length: L.
    """
    blocks = offer.keys.shape[1]
    own, distant = (in_blocks_of(value, first, blocks, length) for value in (query, far.query))
    now = in_blocks_of(positions[..., None, None], first, blocks, length)[..., 0, :, 0]
    pairs = (now[..., :, None] - offer.position[..., None, :] > far.limit) & (offer.position >= 0)[..., None, :]
    pairs = pairs & (now >= far.start)[..., :, None]
    if pairs.is_cpu and not torch.compiler.is_compiling() and not pairs.view(torch.uint8).amax():
        return offer
    bias = correction(far, own, distant, offer.keys, offer.position, pairs).to(query.dtype)
    return offer._replace(bias=bias if offer.bias is None else offer.bias + bias)


def in_blocks_of(value: torch.Tensor, first: int, blocks: int, length: int) -> torch.Tensor:
    """Return queries first ... first + n L - 1 of `[R, T, H, D]` as `[R, n, H, L, D]`, zeros behind the last."""
    part = value[:, first : first + blocks * length]
    missing = blocks * length - part.shape[1]
    if missing:
        part = torch.nn.functional.pad(part, (0, 0, 0, 0, 0, missing))
    return part.unflatten(1, (blocks, length)).transpose(2, 3)


__all__ = ["Far", "TurnTables", "correction", "in_blocks_of", "rotate", "scores", "step_correction", "with_distances"]
