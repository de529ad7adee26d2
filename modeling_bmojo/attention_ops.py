"""Attention over a list of key sets, each key with the span of queries that may see it (B'MOJO, Algorithm 1, line 5).

    out_t = softmax over { keys i of all sets : begin_i <= t < end_i } of (q_t . k_i * scaling), times values

One softmax runs over the union [eidetic | fading | local]. Queries are cut into blocks of L; every set offers each
block the keys that some query of the block may see, either a band that moves with the block (`banded`: window inputs,
fading tokens) or an explicit choice per block (`gathered`: eidetic memory, and later retrieved storage). The cost is
O(T (M + W + F + L)) in time and memory instead of O(T^2).

Shapes: B batch, T queries, S keys of a set, H query heads, G key/value heads, R = H / G, D head dim, n blocks, L block
length, K keys offered to one block. Queries and keys stand on one axis of coordinates; the first query is at 0.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .memory_ops import NEVER


# Mask entries per SDPA call: bounds the memory of long prompts (a bool each, and an fp32 copy inside SDPA on CPU).
MASK_BUDGET = 1 << 20


class KeySet(NamedTuple):
    """Keys with their visibility.

    keys, values: `[B, S, G, D]`. begin, end: `[B, S]` int64, query t sees the key iff begin <= t < end.
    position: `[B, S]` int64, the token's position in its row, -1 for none (only for reporting attention weights).
    first: coordinate of entry 0; entry i of a banded set stands at first + i.
    """

    keys: torch.Tensor
    values: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    position: torch.Tensor
    first: int = 0


class BlockKeys(NamedTuple):
    """What a set offers to each block: keys, values `[B, n, G, K, D]`; begin, end, position `[B, n, K]`."""

    keys: torch.Tensor
    values: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    position: torch.Tensor


def banded(keyset: KeySet, low: int, high: int, blocks: int, block: int) -> BlockKeys:
    """Offers block j the keys at coordinates j L + low ... j L + L - 1 + high (views of one padded copy)."""
    width = block + high - low
    front = keyset.first - low
    back = (blocks - 1) * block + width - front - keyset.keys.shape[1]

    def bands(value: torch.Tensor, fill: float) -> torch.Tensor:
        pad = (0, 0) * (value.dim() - 2) + (front, back)
        return F.pad(value, pad, value=fill).unfold(1, width, block)

    keys, values = (bands(value, 0.0).transpose(-1, -2) for value in (keyset.keys, keyset.values))
    begin, end = bands(keyset.begin, 0), bands(keyset.end, -NEVER)
    return BlockKeys(keys, values, begin, end, bands(keyset.position, -1))


def gathered(keyset: KeySet, index: torch.Tensor) -> BlockKeys:
    """Offers block j the keys `index[:, j]`; index `[B, n, M]` into S, -1 = none."""
    rows = torch.arange(index.shape[0], device=index.device)[:, None, None]
    chosen = index.clamp(min=0)
    keys, values = keyset.keys[rows, chosen], keyset.values[rows, chosen]
    end = keyset.end[rows, chosen].masked_fill(index < 0, -NEVER)
    return BlockKeys(
        keys.transpose(2, 3), values.transpose(2, 3), keyset.begin[rows, chosen], end, keyset.position[rows, chosen]
    )


def memory_attention(
    query: torch.Tensor,
    sets: list[tuple[KeySet, tuple[int, int] | torch.Tensor]],
    block: int,
    scaling: float,
    dropout: float = 0.0,
    implementation: str = "sdpa",
    columns: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One softmax per query over what it may see of all sets, which offer their keys block by block.

    Args:
        query: `[B, T, H, D]`. sets: pairs of a set and how it offers its keys, a band `(low, high)` or an index
            `[B, n, M]` (see `banded` and `gathered`). block: L.
        Others and returns: see `block_attention`.
    """
    blocks = -(-query.shape[1] // block)
    offers = [
        gathered(keyset, offered) if isinstance(offered, torch.Tensor) else banded(keyset, *offered, blocks, block)
        for keyset, offered in sets
    ]
    return block_attention(query, offers, block, scaling, dropout, implementation, columns)


def block_attention(
    query: torch.Tensor,
    offers: list[BlockKeys],
    block: int,
    scaling: float,
    dropout: float = 0.0,
    implementation: str = "sdpa",
    columns: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One softmax per query over everything the sets offer to its block.

    Args:
        query: `[B, T, H, D]`. offers: one `BlockKeys` per set, each for n = ceil(T / L) blocks. block: L.
        implementation: `"sdpa"` or `"eager"`.
        columns: if given (eager only), also return the weights by token position.

    Returns:
        `[B, T, H, D]`, and the weights `[B, H, T, columns]` or None. A token that is seen both itself and through its
        fading token has the sum of both weights in its column, so that every row sums to 1.
    """
    batch, tokens, heads, dim = query.shape
    blocks = -(-tokens // block)
    missing = blocks * block - tokens
    padded = F.pad(query, (0, 0, 0, 0, 0, missing)) if missing else query
    by_block = padded.unflatten(1, (blocks, block)).transpose(2, 3)  # [B, n, H, L, D]
    time = torch.arange(blocks * block, device=query.device).view(1, blocks, block, 1)

    offered = sum(offer.begin.shape[-1] for offer in offers)
    step = max(1, MASK_BUDGET // (batch * block * offered))
    outputs, weights = [], []
    for lo in range(0, blocks, step):
        part = [BlockKeys(*(value[:, lo : lo + step] for value in offer)) for offer in offers]
        keys, values = (torch.cat([offer[i] for offer in part], dim=3).flatten(0, 1) for i in (0, 1))
        begin, end, position = (torch.cat([offer[i] for offer in part], dim=2)[:, :, None] for i in (2, 3, 4))
        now = time[:, lo : lo + step]
        visible = (begin <= now) & (now < end)
        if missing and lo + step >= blocks:
            # The last block's empty places see everything: a softmax over nothing would send NaN into the gradients.
            visible = visible | (now >= tokens)
        queries = by_block[:, lo : lo + step].flatten(0, 1)
        out, weight = attend(queries, keys, values, visible.flatten(0, 1), scaling, dropout, implementation)
        outputs.append(out.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2))
        if columns is not None:
            dense = weights_by_position(weight, position[:, :, 0].flatten(0, 1), columns)
            weights.append(dense.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2))
    out = torch.cat(outputs, dim=1)[:, :tokens] if missing or len(outputs) > 1 else outputs[0]
    if columns is None:
        return out, None
    return out, torch.cat(weights, dim=1)[:, :tokens].transpose(1, 2)


def causal_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    implementation: str = "sdpa",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over one set that every query may see in whole or as `visible` says.

    Args:
        query: `[B, T, H, D]`. keys, values: `[B, S, G, D]`.
        visible: bool `[B, T, S]`; None means the plain causal triangle (S = T), or for a single query every key.

    Returns:
        `[B, T, H, D]` and, with `"eager"`, the weights `[B, H, T, S]`.
    """
    q, k, v = query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    alone = query.shape[1] == 1
    if visible is None and implementation == "sdpa" and not alone:
        out = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2), None
    if visible is None and not alone:
        visible = torch.ones(1, query.shape[1], keys.shape[1], dtype=torch.bool, device=query.device).tril()
    out, weights = attend(q, k, v, visible, scaling, dropout, implementation)
    return out.transpose(1, 2), weights


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None,
    scaling: float,
    dropout: float,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Masked attention `[N, H, Q, D]` x `[N, G, K, D]`, `visible` bool broadcastable to `[N, Q, K]`, None: all.

    Returns:
        `[N, H, Q, D]` and, with `"eager"`, the weights `[N, H, Q, K]`.
    """
    repeat, length = query.shape[1] // keys.shape[1], query.shape[2]
    if implementation == "sdpa" and query.device.type == "cpu" and length > 1:
        # The CPU kernel shares the keys of a group by itself, and would turn a bool mask into this one.
        mask = torch.zeros((), dtype=query.dtype).masked_fill(~visible[:, None], -torch.inf)
        out = F.scaled_dot_product_attention(query, keys, values, mask, dropout, scale=scaling, enable_gqa=repeat > 1)
        return out, None
    # The query heads of a group share its keys, so they fold into the query axis: [N, G, R Q, D].
    folded = query.unflatten(1, (-1, repeat)).flatten(2, 3)
    mask = None if visible is None else visible[:, None]
    if mask is not None and length > 1:
        mask = mask.expand(-1, repeat, -1, -1).flatten(1, 2).unsqueeze(1)
    if implementation == "sdpa":
        out = F.scaled_dot_product_attention(folded, keys, values, mask, dropout, scale=scaling)
        return out.unflatten(2, (repeat, length)).flatten(1, 2), None
    scores = (folded @ keys.transpose(-1, -2)) * scaling
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1, dtype=wide).to(query.dtype)
    out = F.dropout(weights, dropout) @ values
    return tuple(value.unflatten(2, (repeat, length)).flatten(1, 2) for value in (out, weights))


def weights_by_position(weights: torch.Tensor, position: torch.Tensor, columns: int) -> torch.Tensor:
    """Adds each key's weight to its token's column: `[B, ..., K]` with position `[B, K]` to `[..., columns]`."""
    target = torch.where(position >= 0, position, columns)
    target = target.view(target.shape[0], *(1,) * (weights.dim() - 2), -1).expand_as(weights)
    dense = weights.new_zeros(*weights.shape[:-1], columns + 1)
    return dense.scatter_add(-1, target, weights)[..., :columns]
