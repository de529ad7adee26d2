"""What a query fetches from the storage, and what the rest counts for, as pure functions (docs/model.md, "Storage").

    A_s = log sum_h exp(score_h(s)) + bias_s       over the query heads of a key/value head
    fetched: the first K by (A in steps of 1/1024 descending, s ascending)

Scores are compared in steps, so that equal tokens are equal however the products were formed; of equals the older one
is fetched. The past that is not fetched is there as means of blocks: level l has blocks of b 2^l tokens, the newest F
of each level are shown, and two of them become one of the next level when they are older than that.

Shapes: R rows, Q queries, S entries, H query heads, G key/value heads, N blocks.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F


STEPS = 1024  # of one nat
LARGEST = (1 << 24) / STEPS  # nats of which float32 can tell the steps; what is beyond is equal


@torch.no_grad()
def pooled(scores: torch.Tensor, groups: int) -> torch.Tensor:
    """Return A `[R, G, Q, S]` of scores `[R, H, Q, S]`: how much any query head of the group wants a token."""
    heads = scores.to(torch.promote_types(scores.dtype, torch.float32)).unflatten(1, (groups, -1))
    if heads.shape[2] == 1:
        return heads[:, :, 0].clone()
    most = heads.amax(dim=2, keepdim=True)
    return (heads - most).exp_().sum(dim=2).log_().add_(most[:, :, 0])


@torch.no_grad()
def places_of_first(wanted: torch.Tensor, offered: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which entries are the first `count` by (A descending, place ascending).

    Args:
        wanted: A `[R, G, Q, S]`, overwritten. offered: bool, broadcastable to it.

    Returns:
        `[R, G, U]` the places that any of the queries has chosen, rising, and which each of them means, bool
        `[R, G, Q, U]`; where fewer are offered there are places that nobody means.
    """
    if count >= wanted.shape[-1]:
        place = torch.arange(wanted.shape[-1], device=wanted.device).expand_as(wanted)[:, :, 0]
        return place, offered.expand_as(wanted)
    wanted = _in_steps(wanted, offered)
    chosen, place = _chosen(wanted, count)
    if wanted.shape[2] > 1:
        some = chosen.any(dim=2)
        most = int(some.sum(dim=-1).max())
        place = some.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    else:
        place = chosen.to(torch.uint8).topk(count, dim=-1, sorted=False).indices if place is None else place
        place = place[:, :, 0].sort(dim=-1).values
    return place, chosen.gather(-1, place[:, :, None].expand(-1, -1, wanted.shape[2], -1))


def _in_steps(wanted: torch.Tensor, offered: torch.Tensor) -> torch.Tensor:
    wanted = wanted.to(torch.promote_types(wanted.dtype, torch.float32))
    wanted = wanted.mul_(STEPS).clamp_(-LARGEST * STEPS, LARGEST * STEPS).round_().float()
    return wanted.masked_fill_(~offered, -torch.inf)


def _chosen(wanted: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return which entries are chosen, and their places in any order; None for those if equals had to be told apart."""
    values, place = wanted.topk(count, dim=-1, sorted=False)
    least = values.amin(dim=-1, keepdim=True)
    chosen = wanted >= least.clamp(min=-2 * LARGEST * STEPS)
    if not torch.compiler.is_compiling() and not bool((chosen.sum(dim=-1) > count).any()):
        return chosen, place
    above = wanted > least
    room = count - above.sum(dim=-1, keepdim=True)
    return above | (chosen & ((chosen & ~above).cumsum(dim=-1) <= room)), None


class Blocks(NamedTuple):
    """Blocks of all levels, `[N]` int64 each: level by level, from old to new.

    node: where its mean lies: the place of a node of the tree over all blocks, from left to right. first: its first
    token. size: its tokens. begin, end: positions of the queries that it is shown to, begin <= t < end.
    levels: of each level in turn the number of its first block, and how many there are.
    """

    node: torch.Tensor
    first: torch.Tensor
    size: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    levels: list[tuple[int, int]]


def blocks_between(low: int, high: int, window: int, size: int, shown: int, device: torch.device) -> Blocks:
    """Return the blocks that queries at positions low ... high - 1 are shown.

    Args:
        window: W. size: b. shown: F per level.
    """
    rows, levels = _rows_between(low, high, window, size, shown)
    table = torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 5)
    return Blocks(*table.t().contiguous(), levels)


@functools.lru_cache(maxsize=64)  # every layer of a forward asks the same; numbers, because tensors belong to a mode
def _rows_between(low: int, high: int, window: int, size: int, shown: int) -> tuple[list, list]:
    found: list[tuple[int, ...]] = []
    levels: list[tuple[int, int]] = []
    level, age = 0, 0
    while size + age <= high:  # else not even the first block of the level is complete and beyond the window
        older = age + shown * size  # blocks whose last token is that much older than the window join the next level
        last = (high - window - age) // size  # blocks shown to some query before `high`
        shown_here = []
        for number in range(max(0, (low - window - older) // size - 2), max(last, 0)):
            begin = (number + 1) * size - 1 + window + age
            end = (number // 2 + 1) * 2 * size - 1 + window + older
            if begin < high and end > low:
                node = number * (2 << level) + (1 << level) - 1
                shown_here.append((node, number * size, size, begin, end))
                levels += [(number, 0)] if len(shown_here) == 1 else []
        if shown_here:
            levels[-1] = (levels[-1][0], len(shown_here))
        else:
            levels.append((0, 0))
        found += shown_here
        level, age, size = level + 1, older, 2 * size
    return found, levels


@torch.no_grad()
def inside(kept: torch.Tensor, blocks: Blocks, size: int) -> torch.Tensor:
    """Count the entries of each block that are kept: float `[..., N]` of bool `[..., S]`, entry = token.

    Args:
        size: b. Blocks that are not complete by entry S count what is there.
    """
    counts, found = kept.float(), []
    for number, count in blocks.levels:
        missing = -counts.shape[-1] % size
        counts = F.pad(counts, (0, missing)).unflatten(-1, (-1, size)).sum(dim=-1)
        size = 2
        part = counts[..., number : number + count]
        found.append(F.pad(part, (0, count - part.shape[-1])))
    return torch.cat(found, dim=-1)


@torch.no_grad()
def members(place: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Return which places `[..., U]` each block holds, 1 or 0 `[..., U, N]`; one below 0 is in none. In
    float64, which autocast leaves alone."""
    return ((place[..., None] >= blocks.first) & (place[..., None] < blocks.first + blocks.size)).double()


__all__ = ["Blocks", "blocks_between", "inside", "members", "places_of_first", "pooled"]
