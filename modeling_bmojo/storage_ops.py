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


@torch.no_grad()
def largest(scores: torch.Tensor) -> torch.Tensor:
    """Return A `[R, G, ...]` of scores `[R, G, n, ...]`: how much any query head of the group wants a token."""
    most = scores[:, :, 0].to(torch.promote_types(scores.dtype, torch.float32), copy=True)
    for head in scores.unbind(dim=2)[1:]:  # several times as fast as amax
        torch.maximum(most, head, out=most) if head.dtype == most.dtype else most.copy_(torch.maximum(most, head))
    return most


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
        wanted: `[R, G, U]` in steps, -inf = not offered. count: less than U. place: `[R, G, U]` rising, of which entries;
            None: of the first U.

    Returns:
        the first `count` places `[R, G, count]` rising, and which of them are chosen, bool; None: all.
    """
    if wanted.is_cpu and not torch.compiler.is_compiling():
        among, meant = _first_by_row(wanted, count)
    else:
        chosen = _chosen(wanted, count)
        among = _places(chosen, count)
        meant = chosen.gather(-1, among)
    return among if place is None else place.gather(-1, among), meant


def _first_by_row(wanted: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what `chosen_places` does of all entries, row by row: there are few, and equals in many of them."""
    rows = wanted.flatten(0, -2).numpy()
    at = rows.shape[-1] - count
    least = numpy.partition(rows, at, axis=-1)[:, at]
    among = numpy.empty((len(rows), count), dtype=numpy.int64)
    short = bool((least == -numpy.inf).any())
    meant = numpy.ones(among.shape, dtype=bool) if short else None
    for number, row in enumerate(rows):
        found = numpy.flatnonzero(row >= least[number])
        if len(found) > count:  # the younger of those that are equal to the least are not chosen
            equal = numpy.flatnonzero(row[found] == least[number])
            found = numpy.delete(found, equal[count - len(found) :])
        among[number] = found
        if short:
            meant[number] = row[found] > -numpy.inf
    shape = (*wanted.shape[:-1], count)
    return torch.from_numpy(among).view(shape), None if meant is None else torch.from_numpy(meant).view(shape)


def in_steps(wanted: torch.Tensor) -> torch.Tensor:
    """Return A in the steps in which it is compared, float32; overwrites it."""
    wanted = wanted.to(torch.promote_types(wanted.dtype, torch.float32))
    return wanted.mul_(STEPS).clamp_(-LARGEST * STEPS, LARGEST * STEPS).round_().float()


def _chosen(wanted: torch.Tensor, count: int) -> torch.Tensor:
    """Return which entries are chosen, of equals the older ones; -inf never is."""
    least, tied = _least_of_first(wanted, count)
    chosen = wanted >= least.clamp(min=-2 * LARGEST * STEPS)
    if torch.compiler.is_compiling():
        return _without_younger(wanted, least, chosen, count)
    tied = (tied & (least > -torch.inf))[..., 0]
    if bool(tied.any()):  # a few rows, as a rule
        chosen[tied] = _without_younger(wanted[tied], least[tied], chosen[tied], count)
    return chosen


def _without_younger(wanted: torch.Tensor, least: torch.Tensor, chosen: torch.Tensor, count: int) -> torch.Tensor:
    """Return `chosen` less the younger of those that are equal to the least, so that `count` are left."""
    above = wanted > least
    room = count - above.sum(dim=-1, keepdim=True)
    return above | (chosen & ((chosen & ~above).cumsum(dim=-1) <= room))


def _least_of_first(wanted: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest of the `count` largest of each row, `[..., 1]`, and whether the next one equals it."""
    if wanted.is_cpu and not torch.compiler.is_compiling():
        # Ten to twenty times as fast as torch.topk where there are many rows (docs/log.md).
        at = wanted.shape[-1] - count
        pair = torch.from_numpy(numpy.partition(wanted.numpy(), (at - 1, at), axis=-1)[..., at - 1 : at + 1].copy())
    else:
        pair = wanted.topk(count + 1, dim=-1).values[..., -2:].flip(-1)
    return pair[..., 1:], pair[..., :1] == pair[..., 1:]


def _places(some: torch.Tensor, most: int) -> torch.Tensor:
    """Return where bool `[R, G, S]` is true, `[R, G, most]` rising; rows that have fewer go on with false places."""
    count = some.shape[-1]
    # The true ones first, the false ones behind them, each in its order.
    true = some.cumsum(dim=-1)
    rank = torch.where(some, true, true[..., -1:] + (~some).cumsum(dim=-1)) - 1
    place = torch.empty_like(rank).scatter_(-1, rank, torch.arange(count, device=some.device).expand_as(rank))
    return place[..., :most]


__all__ = ["chosen_places", "in_steps", "largest", "places_of_first"]
