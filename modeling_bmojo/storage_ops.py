"""What a query fetches from the storage, and what the rest counts for, as pure functions (docs/model.md, "Storage").

    A_s = max_h score_h(s) + bias_s       over the query heads of a key/value head
    fetched: the first K by (A in steps of 1/1024 descending, s ascending)

Scores are compared in steps, so that equal tokens are equal however the products were formed; of equals the older one
is fetched.

Shapes: R rows, Q queries, S entries, H query heads, G key/value heads.
"""

import numpy
import torch


STEPS = 1024  # of one nat
WORTH_MOVING = 0.7  # of the entries: where more are meant they are read where they lie
LARGEST = (1 << 24) / STEPS  # nats of which float32 can tell the steps; what is beyond is equal
LEAST = -2 * LARGEST * STEPS  # less than any step, more than -inf


@torch.no_grad()
def largest(scores: torch.Tensor) -> torch.Tensor:
    """Return A `[R, G, ...]` of scores `[R, G, n, ...]`: how much any query head of the group wants a token."""
    return scores.amax(dim=2).to(torch.promote_types(scores.dtype, torch.float32))


@torch.no_grad()
def places_of_first(
    wanted: torch.Tensor, offered: torch.Tensor, count: int, common: int = 0
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return which entries are the first `count` by (A descending, place ascending).

    Args:
        wanted: A `[R, G, Q, S]`, overwritten. offered: bool, broadcastable to it. common: so many entries, the first
            ones, are offered to every query.

    Returns:
        `[R, G, U]` the places that any of the queries has chosen, rising, and which each of them means, bool
        `[R, G, Q, U]`; where fewer are offered there are places that nobody means. None for the places: those of all
        entries (most were chosen by some query, or all are).
    """
    if count >= wanted.shape[-1]:
        return None, offered.expand_as(wanted)
    wanted = in_steps(wanted)
    wanted[..., common:].masked_fill_(~offered[..., common:], -torch.inf)
    chosen = _chosen(wanted, count)
    some = chosen.view(torch.uint8).amax(dim=2)  # any(), twenty times as fast
    most = int(some.sum(dim=-1).max())
    if most > WORTH_MOVING * wanted.shape[-1]:
        return None, chosen
    place = _places(some.bool(), most)
    return place, chosen.gather(-1, place[:, :, None].expand(-1, -1, wanted.shape[2], -1))


@torch.no_grad()
def chosen_places(
    wanted: torch.Tensor, count: int, place: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Choose for one query, as `places_of_first` does for many.

    Args:
        wanted: `[R, G, U]` in steps, -inf = not offered. count: less than U. place: `[R, G, U]` rising, of which
            entries; None: of the first U.

    Returns:
        the first `count` places `[R, G, count]` rising, and which of them are chosen, bool; None: all.
    """
    chosen, meant = _chosen(wanted, count), None
    if chosen.is_cpu:
        flat = torch.from_numpy(numpy.flatnonzero(chosen.numpy()))  # nonzero() makes a column of each axis
    else:
        flat = chosen.flatten().nonzero()[:, 0]
    if len(flat) == chosen[..., 0].numel() * count:  # none has more, so all have as many
        among = flat.remainder_(chosen.shape[-1]).view(*chosen.shape[:-1], count)
    else:
        among = _places(chosen, count)
        meant = chosen.gather(-1, among)
    return among if place is None else place.gather(-1, among), meant


def in_steps(wanted: torch.Tensor) -> torch.Tensor:
    """Return A in the steps in which it is compared, float32; overwrites it."""
    wanted = wanted.to(torch.promote_types(wanted.dtype, torch.float32))
    return wanted.mul_(STEPS).clamp_(-LARGEST * STEPS, LARGEST * STEPS).round_().float()


def _chosen(wanted: torch.Tensor, count: int) -> torch.Tensor:
    """Return which entries are chosen, of equals the older ones; -inf never is."""
    if not wanted.is_cpu or torch.compiler.is_compiling():
        least = wanted.topk(count, dim=-1).values[..., -1:].clamp(min=LEAST)
        above = wanted > least
        room = count - above.sum(dim=-1, keepdim=True)
        equal = wanted == least
        return above | (equal & (equal.cumsum(dim=-1) <= room))
    rows = wanted.flatten(0, -2).numpy()
    # Ten to twenty times as fast as torch.topk where there are many rows (docs/log.md).
    least = numpy.partition(rows, rows.shape[-1] - count, axis=-1)[:, -count, None].clip(LEAST)
    chosen = rows >= least
    more = numpy.count_nonzero(chosen, axis=-1) - count
    tied = numpy.flatnonzero(more > 0)
    if len(tied):
        row, place = numpy.nonzero(rows[tied] == least[tied])
        younger = numpy.cumsum(numpy.bincount(row, minlength=len(tied)))[row] - numpy.arange(len(row))
        gone = younger <= more[tied][row]  # the youngest of those that are equal to the least
        chosen[tied[row[gone]], place[gone]] = False
    return torch.from_numpy(chosen).view(wanted.shape)


def _places(some: torch.Tensor, most: int) -> torch.Tensor:
    """Return where bool `[R, G, S]` is true, `[R, G, most]` rising; rows that have fewer go on with false places."""
    count = some.shape[-1]
    # The true ones first, the false ones behind them, each in its order.
    true = some.cumsum(dim=-1)
    rank = torch.where(some, true, true[..., -1:] + (~some).cumsum(dim=-1)) - 1
    place = torch.empty_like(rank).scatter_(-1, rank, torch.arange(count, device=some.device).expand_as(rank))
    return place[..., :most]


__all__ = ["chosen_places", "in_steps", "largest", "places_of_first"]
