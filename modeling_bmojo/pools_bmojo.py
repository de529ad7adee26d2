"""Pools: where the entries of a layer lie, in pages of P entries that rows share and count.

    page   P entries of every field, `[P, *shape]` each; immutable from the moment a second one refers to it
    pool   `[pages, P, *shape]` per field, in host memory; who refers to a page counts in `references`

A page is written in place only by the one who refers to it, and only behind the entries that are fixed (`writable`);
whoever else would write takes another page and copies it. Pages that nobody refers to are taken again. A pool in files
(`store_files_bmojo`) differs in where its memory comes from and in when a page may be taken again; an `Overlay` shares
the pages of such a pool and has its own in host memory.

Shapes: P entries of a page, N indices.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch


PAGE = 256  # entries of a page
LEAST = 4  # pages by which a pool grows at least
OVERLAY = 1 << 40  # number of an overlay's first own page: beyond every other pool's


class Field(NamedTuple):
    """What one entry holds under a name: a tensor of this shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * torch.empty((), dtype=self.dtype).element_size()


class Pool:
    """Pages in host memory.

    Args:
        fields: what an entry holds. page: P.
    """

    shift = 0  # number of the first page in `data`
    failure: OSError | None = None  # what went wrong behind the caller's back, for the next one who writes

    def __init__(self, fields: Mapping[str, Field], page: int = PAGE):
        if page < 1:
            raise ValueError(f"page={page}: must be at least 1 entry; {PAGE} is the default.")
        self.fields, self.page = dict(fields), page
        self.data: dict[str, torch.Tensor] = {}  # [pages, P, *shape]; longer than what is in use
        self.flat: dict[str, torch.Tensor] = {}  # the same as [pages * P, *shape]
        self.views: dict[tuple[str, int], torch.Tensor] = {}  # the same by other units, as they are asked for
        self.capacity = 0  # pages in `data`
        self.references: list[int] = []  # of each page that was ever taken, the first `shift` left out
        self.fixed: list[int] = []  # of each, how many of its entries may not change any more
        self.free: list[int] = []
        self.dropped: deque[list[list[int]]] = deque()  # tables of those who are gone, from whatever thread

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, all fields together."""
        return self.page * sum(field.nbytes for field in self.fields.values())

    # Pages -----------------------------------------------------------------------------------------------------------
    def take(self, count: int) -> list[int]:
        """Return the numbers of `count` pages that the caller alone refers to, contents undefined; all or none.

        Raises:
            OSError, RuntimeError: if there is no room. Nothing has changed then.
        """
        self.collect()
        again = min(count, len(self.free))
        fresh = count - again
        top = len(self.references)
        if top + fresh > self.capacity:
            self.grow(top + fresh)
        taken = [self.free.pop() for _ in range(again)]
        for page in taken:
            self.references[page - self.shift] = 1
            self.renew(page)
        self.references += [1] * fresh
        self.fixed += [0] * fresh
        return taken + list(range(self.shift + top, self.shift + top + fresh))

    def grow(self, least: int) -> None:
        """Make room for `least` pages and half as many more as there were."""
        capacity = max(least, self.capacity + self.capacity // 2, LEAST)
        used, data = len(self.references), {}
        with torch.inference_mode(False), torch.no_grad():
            for name, field in self.fields.items():
                data[name] = torch.empty(capacity, self.page, *field.shape, dtype=field.dtype)
                if used:
                    data[name][:used] = self.data[name][:used]
        self.place(data, capacity)

    def place(self, data: dict[str, torch.Tensor], capacity: int) -> None:
        """Let the pages lie in `data` from now on."""
        self.data, self.capacity, self.views = data, capacity, {}
        self.flat = {name: value.flatten(0, 1) for name, value in data.items()}

    def renew(self, page: int) -> None:
        """Forget what was known of a page that is taken again."""
        self.fixed[page - self.shift] = 0

    def share(self, pages: Sequence[int], times: int = 1) -> None:
        """Count `times` more references to each page."""
        references, shift = self.references, self.shift
        for page in pages:
            references[page - shift] += times

    def release(self, pages: Sequence[int]) -> None:
        """Count one reference less to each page."""
        references, shift = self.references, self.shift
        for page in pages:
            references[page - shift] -= 1
            if not references[page - shift]:
                self.freed(page)

    def freed(self, page: int) -> None:
        """Note that nobody refers to a page any more."""
        self.free.append(page)

    def collect(self) -> None:
        """Release what those who are gone referred to."""
        while self.dropped:
            for pages in self.dropped.popleft():
                self.release(pages)

    def writable(self, page: int, entry: int) -> bool:
        """Whether the one who asks, and refers to the page, may write it in place from `entry` of the page on."""
        place = page - self.shift
        return self.references[place] == 1 and self.fixed[place] <= entry

    def report(self) -> None:
        """Raise, once, what went wrong behind the caller's back."""
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def settle(self, pages: list[int]) -> None:
        """Be told of pages that are full and will hardly be written again."""

    # Contents --------------------------------------------------------------------------------------------------------
    def contents(self, name: str, page: int, pages: int = 1) -> torch.Tensor:
        """Return a view `[pages * P, *shape]` of pages `page` .. `page + pages - 1`."""
        first = (page - self.shift) * self.page
        return self.flat[name][first : first + pages * self.page]

    def gather(self, name: str, index: torch.Tensor, units: int) -> torch.Tensor:
        """Return units `index` `[N]` of a field, of which a page has `units`, as `[N, numbers of a unit]`."""
        view = self.views.get((name, units))
        if view is None:
            view = self.views[name, units] = self.data[name].view(self.capacity * units, -1)
        return view.index_select(0, index)

    def drop(self, table: list[list[int]]) -> None:
        """Be told, from whatever thread, that nobody refers to these pages by this table any more."""
        self.dropped.append(table)

    def forked(self) -> "Pool":
        """Return the pool in which a copy of someone's pages lives: this one, where both may go on writing."""
        return self


class Overlay(Pool):
    """Pages of a pool that is read only, and own ones in host memory.

    Args:
        base: the pool, of which every page stays as it is while this one refers to it.
    """

    shift = OVERLAY

    def __init__(self, base: Pool):
        super().__init__(base.fields, base.page)
        self.base = base

    def share(self, pages, times=1):
        self.base.share([page for page in pages if page < OVERLAY], times)
        super().share([page for page in pages if page >= OVERLAY], times)

    def release(self, pages):
        self.base.release([page for page in pages if page < OVERLAY])
        super().release([page for page in pages if page >= OVERLAY])

    def drop(self, table):
        self.base.drop([[page for page in row if page < OVERLAY] for row in table])
        super().drop([[page for page in row if page >= OVERLAY] for row in table])

    def writable(self, page, entry):
        return page >= OVERLAY and super().writable(page, entry)

    def contents(self, name, page, pages=1):
        return super().contents(name, page, pages) if page >= OVERLAY else self.base.contents(name, page, pages)

    def gather(self, name, index, units):
        own = index >= OVERLAY * units
        if bool(own.all()):
            return super().gather(name, index - OVERLAY * units, units)
        found = self.base.gather(name, index.masked_fill(own, 0), units)
        if bool(own.any()):
            found[own] = super().gather(name, index[own] - OVERLAY * units, units)
        return found


__all__ = ["PAGE", "Field", "Overlay", "Pool"]
