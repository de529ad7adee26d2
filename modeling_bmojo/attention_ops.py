"""Attention over a list of key sets, each key with the span of queries that may see it (B'MOJO, Algorithm 1, line 5).

    out_t = softmax over { keys i of all sets : begin_i <= t < end_i } of (q_t . k_i * scaling), times values

One softmax runs over the union [eidetic | fading | local]. Queries are cut into blocks of L; every set offers each
block the keys that some query of the block may see, either a band that moves with the block (`banded`: window inputs,
fading tokens) or an explicit choice per block (`gathered`: eidetic memory). The cost is O(T (M + W + F + L)) in time
and memory instead of O(T^2). Keys may differ per key/value head, and carry a bias per query, added to the score:

    out_t = softmax over { keys i : begin_i <= t < end_i } of (q_t . k_i * scaling + bias_ti), times values

Shapes: B batch, T queries, S keys of a set, H query heads, G key/value heads, R = H / G, D head dim, n blocks, L block
length, K keys offered to one block. Queries and keys stand on one axis of coordinates; the first query is at 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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
    """What a set offers to each block.

    keys, values: `[B, n, G, K, D]`. begin, end, position: `[B, n, K]`, or `[B, n, G, K]` where the heads differ; begin
    and end None: the bias says it. bias: `[B, n, h, L, K]` with h = 1, G or H: added to each query's scores, -inf =
    unseen; None: zero.
    """

    keys: torch.Tensor
    values: torch.Tensor
    begin: torch.Tensor | None
    end: torch.Tensor | None
    position: torch.Tensor
    bias: torch.Tensor | None = None


class Lazy(NamedTuple):
    """What is worked out for some blocks at a time, because all at once would be too much.

    width: keys per block, at most. make: from a range of blocks to their `BlockKeys`, a list.
    """

    width: int
    make: Callable[[slice], list[BlockKeys]]


class Whole(NamedTuple):
    """Keys that are offered to all queries, as they lie.

    keys, values: `[B, S, G, D]`. visible: bool `[B, T, S]`; None: to many queries those up to their own (S = T), to a
    single one all. position: `[B, S]` as in `KeySet`; None: entry i is the token at position i.
    """

    keys: torch.Tensor
    values: torch.Tensor
    visible: torch.Tensor | None = None
    position: torch.Tensor | None = None


class Seen(NamedTuple):
    """What the one query of a step sees.

    keys, values: `[B, G, S, D]`. bias: added to its scores, `[B, G, 1 or H / G, S]`, -inf = unseen; None: zero.
    position: `[B, S]`, or `[B, G, S]` where the heads differ, as in `KeySet`. query: `[B, 1, H, D]`, which asks these
    keys; None: the one that asks the others.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor | None
    position: torch.Tensor
    query: torch.Tensor | None = None


class Apart(NamedTuple):
    """An offer, a set with how it is offered or one of the kinds above, whose keys are asked by queries of its own."""

    offer: Any


def banded(keyset: KeySet, low: int, high: int, blocks: int, block: int) -> BlockKeys:
    """Offer block j the keys at coordinates j L + low ... j L + L - 1 + high (views of one padded copy)."""
    width = block + high - low
    front = keyset.first - low
    length = (blocks - 1) * block + width
    back = length - front - keyset.keys.shape[1]

    def bands(value: torch.Tensor, fill: float) -> torch.Tensor:
        if back < 0:  # the last keys are in no band; F.pad would take a negative size only up to what is there
            kept = max(value.shape[1] + back, 0)
            value = F.pad(value[:, :kept], (0, 0) * (value.dim() - 2) + (length - kept, 0), value=fill)
            return value.unfold(1, width, block)
        pad = (0, 0) * (value.dim() - 2) + (front, back)
        return F.pad(value, pad, value=fill).unfold(1, width, block)

    keys, values = (bands(value, 0.0).transpose(-1, -2) for value in (keyset.keys, keyset.values))
    begin, end = bands(keyset.begin, 0), bands(keyset.end, -NEVER)
    return BlockKeys(keys, values, begin, end, bands(keyset.position, -1))


def gathered(keyset: KeySet, index: torch.Tensor, bias: torch.Tensor | None = None) -> BlockKeys:
    """Offer block j the keys `index[:, j]`; index `[B, n, K]` into S, or `[B, n, G, K]` per head; -1 = none."""
    rows = torch.arange(index.shape[0], device=index.device).view(-1, *(1,) * (index.dim() - 1))
    chosen = index.clamp(min=0)
    begin, position = keyset.begin[rows, chosen], keyset.position[rows, chosen]
    end = keyset.end[rows, chosen].masked_fill(index < 0, -NEVER)
    if index.dim() == 4:
        heads = torch.arange(index.shape[2], device=index.device)[:, None]
        return BlockKeys(
            keyset.keys[rows, chosen, heads], keyset.values[rows, chosen, heads], begin, end, position, bias
        )
    keys, values = (value[rows, chosen].transpose(2, 3) for value in (keyset.keys, keyset.values))
    return BlockKeys(keys, values, begin, end, position, bias)


def in_blocks(whole: Whole, queries: int, block: int) -> BlockKeys:
    """Offer every block all keys, with the visibility as a bias."""
    batch, stored = whole.keys.shape[:2]
    device, blocks = whole.keys.device, -(-queries // block)
    visible = whole.visible
    if visible is None:
        visible = torch.ones(1, queries, stored, dtype=torch.bool, device=device)
        visible = visible.tril() if queries > 1 else visible
    visible = F.pad(visible.expand(batch, -1, -1), (0, 0, 0, blocks * block - queries), value=True)
    bias = torch.zeros(visible.shape, dtype=whole.keys.dtype, device=device).masked_fill_(~visible, -torch.inf)
    position = torch.arange(stored, device=device).expand(batch, -1) if whole.position is None else whole.position
    keys, values = (
        value.transpose(1, 2)[:, None].expand(-1, blocks, -1, -1, -1) for value in (whole.keys, whole.values)
    )
    position = position[:, None].expand(-1, blocks, -1)
    return BlockKeys(keys, values, None, None, position, bias.unflatten(1, (blocks, block))[:, :, None])


def one_block(seen: Seen) -> BlockKeys:
    """Offer the one block of a step what its query sees."""
    keys, bias = seen.keys, seen.bias
    bias = keys.new_zeros(1, 1, 1, 1, 1) if bias is None else bias.flatten(1, 2)[:, None, :, None]
    position = seen.position if seen.position.dim() == 3 else seen.position[:, None].expand(-1, keys.shape[1], -1)
    return BlockKeys(keys[:, None], seen.values[:, None], None, None, position[:, None], bias)


def joined(query: torch.Tensor, own: torch.Tensor, offers: list) -> tuple[torch.Tensor, list]:
    """Return one query for all offers, `[q | q']`, with keys `[k | 0]`, and `[0 | k']` for what is `Apart`.

    Their products are q . k and q' . k', for one softmax over all. Values get as many zeros, because most kernels take
    heads of one size: the first D channels of the result are meant.

    Args:
        query, own: `[B, T, H, D]`; own asks what is `Apart`.
    """
    size = query.shape[-1]
    return torch.cat([query, own], dim=-1), [
        _doubled(each.offer, size, True) if isinstance(each, Apart) else _doubled(each, size, False) for each in offers
    ]


def _doubled(offer, size: int, behind: bool):
    """Return the offer with keys and values of twice the `size`; the keys in the first half, or `behind` it."""
    if isinstance(offer, Lazy):
        return offer._replace(make=lambda blocks: [_doubled(each, size, behind) for each in offer.make(blocks)])
    if type(offer) is tuple:
        return _doubled(offer[0], size, behind), offer[1]
    keys = F.pad(offer.keys, (size, 0) if behind else (0, size))
    return offer._replace(keys=keys, values=F.pad(offer.values, (0, size)))


def memory_attention(
    query: torch.Tensor,
    sets: list[tuple[KeySet, tuple[int, int] | torch.Tensor] | BlockKeys | Whole | Lazy | Seen],
    block: int,
    scaling: float,
    dropout: float = 0.0,
    implementation: str = "sdpa",
    columns: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One softmax per query over what it may see of all sets, which offer their keys block by block.

    Args:
        query: `[B, T, H, D]`. sets: pairs of a set and how it offers its keys, a band `(low, high)` or an index
            `[B, n, K]` (see `banded` and `gathered`); or what is offered already, by block or as it lies. block: L.
        Others and returns: see `block_attention`.
    """
    offers = [by_block(each, query.shape[1], block) for each in sets]
    return block_attention(query, offers, block, scaling, dropout, implementation, columns)


def by_block(offer, tokens: int, block: int) -> BlockKeys | Lazy:
    """Return what is offered to each block of `block` of the `tokens` queries."""
    if isinstance(offer, BlockKeys | Lazy):
        return offer
    if isinstance(offer, Whole):
        return in_blocks(offer, tokens, block)
    if isinstance(offer, Seen):
        return one_block(offer)
    keyset, choice = offer
    if isinstance(choice, torch.Tensor):
        return gathered(keyset, choice)
    return banded(keyset, *choice, -(-tokens // block), block)


def block_attention(
    query: torch.Tensor,
    offers: list[BlockKeys | Lazy],
    block: int,
    scaling: float,
    dropout: float = 0.0,
    implementation: str = "sdpa",
    columns: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One softmax per query over everything the sets offer to its block.

    Args:
        query: `[B, T, H, D]`. offers: one per set, each for n = ceil(T / L) blocks. block: L.
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

    offered = sum(offer.width if isinstance(offer, Lazy) else offer.keys.shape[3] for offer in offers)
    alike = all(isinstance(offer, BlockKeys) and offer.bias is None and offer.begin.dim() == 3 for offer in offers)
    step = max(1, MASK_BUDGET // max(batch * block * offered * (1 if alike else heads), 1))
    outputs, weights = [], []
    for lo in range(0, blocks, step):
        part = [each for offer in offers for each in _some(offer, slice(lo, min(lo + step, blocks)))]
        keys, values = (torch.cat([offer[i] for offer in part], dim=3).flatten(0, 1) for i in (0, 1))
        now = time[:, lo : lo + step]
        # The last block's empty places see everything: a softmax over nothing would send NaN into the gradients.
        empty = now >= tokens if missing and lo + step >= blocks else None
        if alike:
            begin, end = (torch.cat([offer[i] for offer in part], dim=2)[:, :, None] for i in (2, 3))
            visible = (begin <= now) & (now < end)
            visible = visible if empty is None else visible | empty
        else:
            visible = _biases(part, now, query, keys.shape[1])
            visible = visible if empty is None else visible.masked_fill(empty[:, :, None], 0.0)
        queries = by_block[:, lo : lo + step].flatten(0, 1)
        by_group = not alike and 1 < visible.shape[2] < heads
        groups, visible = keys.shape[1], visible.flatten(0, 1)
        if by_group:
            # One mask per group of heads: the groups become rows, so that no mask is repeated for each head.
            queries = queries.unflatten(1, (groups, -1)).flatten(0, 1)
            keys, values, visible = (value.flatten(0, 1)[:, None] for value in (keys, values, visible))
        out, weight = attend(queries, keys, values, visible, scaling, dropout, implementation)
        if by_group:
            out = out.unflatten(0, (-1, groups)).flatten(1, 2)
            weight = None if weight is None else weight.unflatten(0, (-1, groups)).flatten(1, 2)
        outputs.append(out.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2))
        if columns is not None:
            position = _positions(part, groups).flatten(0, 1)
            dense = weights_by_position(weight, position, columns)
            weights.append(dense.transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2))
    out = torch.cat(outputs, dim=1)[:, :tokens] if missing or len(outputs) > 1 else outputs[0]
    if columns is None:
        return out, None
    return out, torch.cat(weights, dim=1)[:, :tokens].transpose(1, 2)


def _some(offer: BlockKeys | Lazy, blocks: slice) -> list[BlockKeys]:
    if isinstance(offer, Lazy):
        return offer.make(blocks)
    return [some_blocks(offer, blocks)]


def some_blocks(offer: BlockKeys, blocks: slice) -> BlockKeys:
    """Return what is offered to a range of blocks."""
    return BlockKeys(*(None if value is None else value[:, blocks] for value in offer))


def _biases(part: list[BlockKeys], now: torch.Tensor, query: torch.Tensor, groups: int) -> torch.Tensor:
    """Return what is added to each query's scores, -inf for what it does not see: `[B, n, h, L, K]` over all sets; h is
    1, G or H, as few as the sets need.

    Args:
        now: `[1, n, L, 1]` coordinates of the queries.
    """
    here, found = now[:, :, None], []
    for offer in part:
        bias = query.new_zeros(()) if offer.bias is None else offer.bias.to(query.dtype)
        if offer.begin is not None:
            begin, end = (span[:, :, None] if span.dim() == 3 else span for span in (offer.begin, offer.end))
            unseen = (here < begin[..., None, :]) | (here >= end[..., None, :])  # [B, n, 1 or G, L, K]
            if bias.dim() and bias.shape[2] > unseen.shape[2] > 1:
                unseen = unseen.repeat_interleave(bias.shape[2] // groups, dim=2)
            bias = torch.where(unseen, -torch.inf, bias)
        found.append(bias)
    most = max(bias.shape[2] for bias in found)
    found = [bias.repeat_interleave(most // groups, dim=2) if 1 < bias.shape[2] < most else bias for bias in found]
    return torch.cat([bias.expand(-1, -1, most, -1, -1) for bias in found], dim=-1)


def _positions(part: list[BlockKeys], groups: int) -> torch.Tensor:
    """Return positions of all offered keys, `[B, n, K]`, or `[B, n, G, K]` where they differ by head."""
    if all(offer.position.dim() == 3 for offer in part):
        return torch.cat([offer.position for offer in part], dim=2)
    each = [offer.position if offer.position.dim() == 4 else offer.position[:, :, None] for offer in part]
    return torch.cat([position.expand(-1, -1, groups, -1) for position in each], dim=3)


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


def step_attention(
    query: torch.Tensor, sets: list[Seen], scaling: float, columns: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One softmax of a step's query over several sets, each read where it lies.

    Args:
        query: `[B, 1, H, D]`. columns: if given, also return the weights by token position.

    Returns:
        `[B, 1, H, D]`, and the weights `[B, H, 1, columns]` or None.
    """
    groups, sizes = sets[0].keys.shape[1], [each.keys.shape[2] for each in sets]
    asks = [query if each.query is None else each.query for each in sets]
    own = [each[:, 0].unflatten(1, (groups, -1)) * scaling for each in asks]
    found = [asking @ each.keys.transpose(-1, -2) for asking, each in zip(own, sets)]
    found = [score if each.bias is None else score + each.bias for score, each in zip(found, sets)]
    scores = torch.cat(found, dim=-1) if len(found) > 1 else found[0]
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=wide).to(query.dtype)
    out = sum(part @ each.values for part, each in zip(weights.split(sizes, dim=-1), sets))
    out = out.flatten(1, 2)[:, None]
    if columns is None:
        return out, None
    each = [one.position if one.position.dim() == 3 else one.position[:, None] for one in sets]
    position = torch.cat([one.expand(-1, groups, -1) for one in each], dim=-1)
    return out, weights_by_position(weights.flatten(1, 2)[:, :, None], position, columns)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None,
    scaling: float,
    dropout: float,
    implementation: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Masked attention `[N, H, Q, D]` x `[N, G, K, D]`.

    Args:
        visible: bool, broadcastable to `[N, Q, K]`; or numbers `[N, H or 1, Q, K]` to add to the scores; None: all.

    Returns:
        `[N, H, Q, D]` and, with `"eager"`, the weights `[N, H, Q, K]`.
    """
    repeat, length = query.shape[1] // keys.shape[1], query.shape[2]
    by_head = visible is not None and visible.dim() == 4
    if by_head and visible.shape[1] == 1 and (implementation != "sdpa" or query.device.type != "cpu" or length == 1):
        visible = visible.expand(-1, query.shape[1], -1, -1)
    if implementation == "sdpa" and query.device.type == "cpu" and length > 1:
        # The CPU kernel shares the keys of a group by itself, and would turn a bool mask into this one.
        mask = visible
        if not by_head:
            mask = torch.zeros((), dtype=query.dtype).masked_fill(~visible[:, None], -torch.inf)
        out = F.scaled_dot_product_attention(query, keys, values, mask, dropout, scale=scaling, enable_gqa=repeat > 1)
        return out, None
    # The query heads of a group share its keys, so they fold into the query axis: [N, G, R Q, D].
    folded = query.unflatten(1, (-1, repeat)).flatten(2, 3)
    if by_head:
        mask = visible.unflatten(1, (-1, repeat)).flatten(2, 3)
    else:
        mask = None if visible is None else visible[:, None]
        if mask is not None and length > 1:
            mask = mask.expand(-1, repeat, -1, -1).flatten(1, 2).unsqueeze(1)
    if implementation == "sdpa":
        out = F.scaled_dot_product_attention(folded, keys, values, mask, dropout, scale=scaling)
        return out.unflatten(2, (repeat, length)).flatten(1, 2), None
    scores = (folded @ keys.transpose(-1, -2)) * scaling
    wide = torch.promote_types(query.dtype, torch.float32)
    if mask is not None:
        scores = scores + mask if by_head else scores.masked_fill(~mask, -torch.inf)
    # Unfolded and folded again, both views: the output comes from the weights that are returned, so that their gradient
    # can be asked for.
    weights = scores.softmax(dim=-1, dtype=wide).to(query.dtype).unflatten(2, (repeat, length)).flatten(1, 2)
    out = F.dropout(weights, dropout).unflatten(1, (-1, repeat)).flatten(2, 3) @ values
    return out.unflatten(2, (repeat, length)).flatten(1, 2), weights


def weights_by_position(weights: torch.Tensor, position: torch.Tensor, columns: int) -> torch.Tensor:
    """Add each key's weight `[B, H, Q, K]` to its token's column: position `[B, K]`, or `[B, G, K]` where the heads'
    keys differ, to `[B, H, Q, columns]`. A key at position -1 is no token and has no column."""
    target = torch.where(position >= 0, position, columns)
    if target.dim() == 3:
        target = target.repeat_interleave(weights.shape[1] // target.shape[1], dim=1)[:, :, None]
    else:
        target = target.view(target.shape[0], *(1,) * (weights.dim() - 2), -1)
    dense = weights.new_zeros(*weights.shape[:-1], columns + 1)
    return dense.scatter_add(-1, target.expand_as(weights), weights)[..., :columns]
