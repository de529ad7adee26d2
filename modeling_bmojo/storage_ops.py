"""What a query fetches from the storage, and what the rest counts for, as pure functions (docs/model.md, "Storage").

    A_s = log sum_h exp(score_h(s)) + bias_s       over the query heads of a key/value head
    fetched: the first K by (A in steps of 1/1024 descending, s ascending)

Scores are compared in steps, so that equal tokens are equal however the products were formed; of equals the older one
is fetched. The past that is not fetched is there as means of blocks: level l has blocks of b 2^l tokens, the newest F
of each level are shown, and two of them become one of the next level when they are older than that.

Shapes: R rows, Q queries, S entries, H query heads, G key/value heads, N blocks.
"""

from typing import NamedTuple

import torch


STEPS = 1024  # of one nat
PLACES = 1 << 26  # tokens that can be told apart among equals
LARGEST_SCORE = 1 << 15  # in nats; what is beyond is equal


def pooled(scores: torch.Tensor, groups: int) -> torch.Tensor:
    """Return A `[R, G, Q, S]` of scores `[R, H, Q, S]`: how much any query head of the group wants a token."""
    return scores.unflatten(1, (groups, -1)).logsumexp(dim=2)


def first_by(wanted: torch.Tensor, offered: torch.Tensor, count: int, places: torch.Tensor) -> torch.Tensor:
    """Return which entries are the first `count` by (A descending, place ascending): bool `[R, G, Q, S]`.

    Args:
        wanted: A `[R, G, Q, S]`. offered: bool, broadcastable to it. places: `[S]` or `[R, 1, 1, S]`, of the entries.
    """
    if count >= wanted.shape[-1]:
        return offered.expand_as(wanted)
    order = ranks(wanted, offered, places)
    least = order.topk(count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    return (order >= least) & offered


def ranks(wanted: torch.Tensor, offered: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Numbers `[R, G, Q, S]` that order entries as `first_by` says, no two equal; the lowest where none is offered."""
    steps = (wanted.double() * STEPS).round_().clamp_(-LARGEST_SCORE * STEPS, LARGEST_SCORE * STEPS)
    return steps.mul_(PLACES).sub_(places).masked_fill_(~offered, -torch.inf)


class Blocks(NamedTuple):
    """Blocks of all levels, `[N]` int64 each: level by level, from old to new.

    level, number: which block. first: its first token. size: its tokens. begin, end: positions of the queries that it
    is shown to, begin <= t < end.
    """

    level: torch.Tensor
    number: torch.Tensor
    first: torch.Tensor
    size: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor

    @property
    def node(self) -> torch.Tensor:
        """Where their means lie: the place of a node of the tree over all blocks, from left to right."""
        return self.number * (2 << self.level) + (1 << self.level) - 1


def blocks_between(low: int, high: int, window: int, size: int, shown: int, device: torch.device) -> Blocks:
    """Return the blocks that queries at positions low ... high - 1 are shown.

    Args:
        window: W. size: b. shown: F per level.
    """
    found: list[tuple[int, int, int, int, int, int]] = []
    level, age = 0, 0
    while size + age <= high:  # else not even the first block of the level is complete and beyond the window
        older = age + shown * size  # blocks whose last token is that much older than the window join the next level
        last = (high - window - age) // size  # blocks shown to some query before `high`
        for number in range(max(0, (low - window - older) // size - 2), max(last, 0)):
            begin = (number + 1) * size - 1 + window + age
            end = (number // 2 + 1) * 2 * size - 1 + window + older
            if begin < high and end > low:
                found.append((level, number, number * size, size, begin, end))
        level, age, size = level + 1, older, 2 * size
    table = torch.tensor(found, dtype=torch.int64, device=device).view(-1, 6)
    return Blocks(*table.t().contiguous())


def inside(kept: torch.Tensor, blocks: Blocks, places: torch.Tensor) -> torch.Tensor:
    """Count the entries of each block that are kept: `[..., N]` of bool `[..., S]`, whose places `[S]` rise."""
    counts = torch.nn.functional.pad(kept.to(torch.int32).cumsum(dim=-1, dtype=torch.int32), (1, 0))
    low, high = (torch.searchsorted(places, bound) for bound in (blocks.first, blocks.first + blocks.size))
    return counts[..., high] - counts[..., low]


__all__ = ["Blocks", "blocks_between", "first_by", "inside", "pooled", "ranks"]
