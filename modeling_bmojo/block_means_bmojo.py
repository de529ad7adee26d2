"""Means of blocks: what is there of the past that a query does not fetch (docs/model.md, "Storage").

    level l has blocks of b_l = b 2^l tokens; block n: tokens [n b_l, (n + 1) b_l), the means of their keys and values
    e_l(u) = floor((u - F b (2^l - 1)) / b_l)        blocks of the level that have been shown once u tokens are stored
    shown to query t:  2 e_(l+1)(u) <= n < e_l(u),   u = t - W + 1,   and t - n b_l <= D_max

So the newest F or F + 1 blocks of each level are shown, and when two are older than that, they become one of the next
level in the same moment. A block that begins further away than D_max is not shown: beyond it means do harm
(docs/log.md). Nothing else is kept of them: a ring of F + 2 places per level holds all that any later query needs, and
the number of levels is logarithmic in the text.

Shapes: R rows, G key/value heads, D head dim, S entries, N blocks, L levels, P = F + 2 places of a ring.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .states_bmojo import grow


class Blocks(NamedTuple):
    """Blocks of all levels, `[N]` int64 each: level by level, from old to new.

    node: where its mean lies (`Means.offsets`). first: its first token. size: its tokens. begin, end: positions of the
    queries that it is shown to, begin <= t < end. levels: of each level in turn the number of its first block, and how
    many there are.
    """

    node: torch.Tensor
    first: torch.Tensor
    size: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    levels: list[tuple[int, int]]


class Means(NamedTuple):
    """Means that the queries of a forward are shown.

    keys, values: `[R, G, N, D]`, level by level, from old to new. offsets: of each level, so that block n is entry
    offset + n.
    """

    keys: torch.Tensor
    values: torch.Tensor
    offsets: tuple[int, ...]


class Pyramid(NamedTuple):
    """The blocks of a layer: W, b, F and D_max (None: no limit), which holds for queries from `start` on."""

    window: int
    size: int
    shown: int
    reach: int | None = None
    start: int = 0

    @property
    def places(self) -> int:
        """Return P."""
        return self.shown + 2

    def entered(self, level: int, stored):
        """Return e_l(u), 0 at least, of a number or a tensor of them."""
        found = (stored - self._age(level)) // (self.size << level)
        return max(found, 0) if isinstance(found, int) else found.clamp(min=0)

    def levels(self, stored: int) -> int:
        """Return L: how many levels have been shown blocks."""
        count = 0
        while self.entered(count, stored):
            count += 1
        return count

    def _age(self, level: int) -> int:
        return self.shown * self.size * ((1 << level) - 1)

    def spans(self, low: int, high: int) -> list[tuple[int, int]]:
        """Return of each level the numbers `[first, last)` of the blocks that queries low ... high - 1 are shown, and
        maybe of some beyond D_max."""
        before, after = low - self.window + 1, high - self.window
        return [(2 * self.entered(l + 1, before), self.entered(l, after)) for l in range(self.levels(after))]

    def queries(self, level: int, number: int) -> tuple[int, int]:
        """Return begin and end: the block is shown to queries begin <= t < end."""
        size, since = self.size << level, self.window - 1
        begin = (number + 1) * size + since + self._age(level)
        end = (number // 2 + 1) * 2 * size + since + self._age(level + 1)
        return begin, end if self.reach is None else min(end, max(number * size + self.reach + 1, self.start))

    def between(self, low: int, high: int, offsets: tuple[int, ...], device: torch.device) -> Blocks:
        """Return the blocks that queries at positions low ... high - 1 are shown."""
        rows, levels = _rows_between(self, low, high, offsets)
        table = torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 5)
        return Blocks(*table.t().contiguous(), levels)

    # Many tokens -----------------------------------------------------------------------------------------------------
    def means(self, of_tokens: Callable, low: int, high: int, rings: tuple | None, seen: torch.Tensor | None) -> Means:
        """Return what queries low ... high - 1 are shown.

        Args:
            of_tokens: from numbers first, last to the level-0 means `[R, G, last - first, D]` of keys and of values,
                of tokens that have been written. low: of the row that has read least, high of that which will have
                read most. rings: keys and values `[R, G, L, P, D]` as they are after `seen` tokens; None: low is 0.
            seen: `[R]` where rows differ; None: low, in all.
        """
        stored, spans = low - self.window, self.spans(low - 1 if rings else 0, high)
        found: list[tuple[torch.Tensor, ...]] = []
        offsets, end = [], 0
        for level, (first, last) in enumerate(spans):
            known = self.entered(level, stored) if rings else 0
            if level == 0:
                each = of_tokens(known, last)
            else:
                each = tuple(_halved(below[:, :, : 2 * (last - known)]) for below in found[-1])
            if rings and known > first:
                number = torch.arange(first, known, device=each[0].device) % self.places
                each = tuple(torch.cat([ring[:, :, level, number], new], dim=2) for ring, new in zip(rings, each))
            if seen is not None and level < rings[0].shape[2]:
                each = self._with_own(level, first, each, rings, seen)
            found.append(each)
            offsets.append(end - first)
            end += last - first
        if not found:
            each = of_tokens(0, 0)
            return Means(*each, ())
        return Means(*(torch.cat(list(level), dim=2) for level in zip(*found)), tuple(offsets))

    def _with_own(self, level: int, first: int, each: tuple, rings: tuple, seen: torch.Tensor) -> tuple:
        """Return the means of a level with those that each row has in its ring: what they are made of may be gone."""
        number = torch.arange(first, first + each[0].shape[2], device=seen.device)
        stored = (seen - self.window)[:, None]
        own = (number >= 2 * self.entered(level + 1, stored)) & (number < self.entered(level, stored))
        own, place = own[:, None, :, None], number % self.places
        return tuple(torch.where(own, ring[:, :, level, place], new) for ring, new in zip(rings, each))

    def _in_ring(self, level: int, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the number that each place of a ring is for after `seen` `[R]` tokens, and whether that block is
        shown, `[R, P]`."""
        stored, place = (seen - self.window)[:, None], torch.arange(self.places, device=seen.device)
        last = self.entered(level, stored) - 1
        number = last - (last - place) % self.places
        return number, number >= 2 * self.entered(level + 1, stored)

    @torch.no_grad()
    def rings(self, means: Means, rings: tuple, seen: torch.Tensor, columns: int) -> tuple:
        """Return the rings after `seen` `[R]` tokens, of which `means` were shown.

        Args:
            rings: those before. columns: of what was read: the most that `seen` can be.
        """
        rings = tuple(grow(ring, 2, self.levels(columns - self.window), 1) for ring in rings)
        for level, offset in enumerate(means.offsets):
            number, _ = self._in_ring(level, seen)
            index = (number + offset).clamp(0, means.keys.shape[2] - 1)[:, None, :, None]
            for ring, value in zip(rings, (means.keys, means.values)):
                ring[:, :, level] = value.gather(2, index.expand(-1, value.shape[1], -1, value.shape[3]))
        return rings

    # One token -------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def step(self, rings: tuple, stored: int, of_tokens: Callable) -> tuple:
        """Return the rings when the token has left the window that makes `stored` of them, in every row."""
        if stored <= 0 or stored % self.size:
            return rings
        entering = []
        while self.entered(len(entering), stored) > self.entered(len(entering), stored - 1):
            entering.append(self.entered(len(entering), stored) - 1)
        rings = tuple(grow(ring, 2, self.levels(stored), 1) for ring in rings)
        for level in reversed(range(len(entering))):  # a block is made of what lies where another one will
            number = entering[level]
            if level:
                pair = torch.tensor([2 * number, 2 * number + 1], device=rings[0].device) % self.places
                new = tuple(_halved(ring[:, :, level - 1, pair]) for ring in rings)
            else:
                new = of_tokens(number, number + 1)
            for ring, value in zip(rings, new):
                ring[:, :, level, number % self.places] = value[:, :, 0].to(ring.dtype)
        return rings

    def arranged(self, ring: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Return a ring after `seen` `[R]` tokens with zeros where no block is shown, and no level that has none."""
        ring = ring[:, :, : self.levels(int(seen.max()) - self.window)].clone()
        for level in range(ring.shape[2]):
            _, there = self._in_ring(level, seen)
            ring[:, :, level].masked_fill_(~there[:, None, :, None], 0)
        return ring


def token_means(entries: torch.Tensor, size: int) -> torch.Tensor:
    """Return the means `[R, G, S / b, D]` of every b entries `[R, G, S, D]`."""
    count = entries.shape[2] // size
    return _wide(entries).unflatten(2, (count, size)).mean(dim=3).to(entries.dtype)


def _halved(means: torch.Tensor) -> torch.Tensor:
    """Return the means of every two."""
    return token_means(means, 2)


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


@functools.lru_cache(maxsize=64)  # every layer of a forward asks the same; numbers, because tensors belong to a mode
def _rows_between(pyramid: Pyramid, low: int, high: int, offsets: tuple[int, ...]) -> tuple[list, list]:
    found: list[tuple[int, ...]] = []
    levels: list[tuple[int, int]] = []
    for level, (first, last) in enumerate(pyramid.spans(low, high)):
        size = pyramid.size << level
        for number in range(first, last):
            found.append((offsets[level] + number, number * size, size, *pyramid.queries(level, number)))
        levels.append((first, last - first))
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
def fetched_inside(place: torch.Tensor, meant: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Count the places of each block that each query means: float32 `[R, G, Q, N]`.

    Args:
        place: `[R, G, U]` rising, behind which may be places that nobody means. meant: bool `[R, G, Q, U]`.
    """
    upto = F.pad(meant.float().cumsum(dim=-1), (1, 0))
    edges = torch.stack([blocks.first, blocks.first + blocks.size])
    rising = place.cummax(dim=-1).values  # what nobody means counts for nothing, wherever it stands
    at = torch.searchsorted(rising.contiguous(), edges.flatten().expand(*place.shape[:2], -1).contiguous())
    count = upto.gather(-1, at[:, :, None].expand(-1, -1, meant.shape[2], -1))
    first, end = count.tensor_split(2, dim=-1)
    return end - first


__all__ = ["Blocks", "Means", "Pyramid", "fetched_inside", "inside", "token_means"]
