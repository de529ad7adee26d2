"""Pages: the entries of one layer, one per token that a row has read, by field and by position in the row.

    entry s of row b   lies at entry s mod P of page table[b][s // P] of a pool (`pools_bmojo`)

Rows share the pages that they have in common: forking, reordering and copying move numbers of pages and no entries, and
whoever writes into a page that another refers to copies it first. Nothing here carries a gradient.

Shapes: B rows, T new entries, G key/value heads, U places, P entries of a page, S entries.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from .pools_bmojo import PAGE, Field, Pool


class Pages:
    """The entries of one layer.

    Args:
        fields: what an entry holds. batch: B. page: P. pool: where the pages lie; None: in host memory.
    """

    def __init__(self, fields: Mapping[str, Field], batch: int, page: int = PAGE, pool: Pool | None = None):
        self.pool = Pool(fields, page) if pool is None else pool
        self.epoch = 0  # how often full pages of a row have been replaced by others
        self._bits = (self.page.bit_length() - 1) if self.page & (self.page - 1) == 0 else None
        self._begin([[] for _ in range(batch)], [0] * batch)

    def _begin(self, table: list[list[int]], ends: list[int]) -> None:
        """Let the rows refer to these pages, which are counted already."""
        self.table, self.ends = table, ends
        self._settled = [0] * len(table)  # pages of each row that the pool has been told of
        self._clips = len(set(ends)) > 1  # whether a row may be asked for places behind its pages
        self._moved()

    def _moved(self) -> None:
        """Find anew how places become entries of the pool."""
        self._offsets: torch.Tensor | None = None  # made when first needed, as the next is
        self._heads: dict[tuple[str, int], torch.Tensor] = {}  # what each head adds to a place, times the heads
        self._base: int | None = None  # first page of a single row whose pages lie one behind the other
        if len(self.table) == 1 and self.table[0]:
            row = self.table[0]
            if row == list(range(row[0], row[0] + len(row))):
                self._base = row[0]

    # What there is ---------------------------------------------------------------------------------------------------
    @property
    def fields(self) -> dict[str, Field]:
        return self.pool.fields

    @property
    def page(self) -> int:
        return self.pool.page

    @property
    def batch(self) -> int:
        return len(self.table)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Entries of each row, written ones: pads that were written as well."""
        return tuple(self.ends)

    @property
    def length(self) -> int:
        """Entries of the longest row."""
        return max(self.ends, default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of the pages that the rows refer to, each counted once."""
        return len(set().union(*self.table)) * self.pool.page_bytes

    # Writing ---------------------------------------------------------------------------------------------------------
    def write(self, first: int | torch.Tensor, **new: torch.Tensor) -> None:
        """Write entries `first` .. `first` + T - 1 of every row.

        Args:
            first: one number, or int64 `[B]`; at most what the row has, so that no entry is left out.
            new: `[B, T, *shape]` for each field, of any dtype and on any device.

        Raises:
            ValueError: if the fields, their shapes or `first` do not fit. OSError: if there is no room, or if pages
                written earlier could not be brought to disk. Nothing is written then.
        """
        pool, page = self.pool, self.pool.page
        if pool.failure is not None:
            pool.report()
        values, count = self._checked(new)
        firsts = [first] * len(self.table) if isinstance(first, int) else first.tolist()
        for b, (begin, end) in enumerate(zip(firsts, self.ends)):
            if not 0 <= begin <= end:
                raise ValueError(
                    f"first={begin} of row {b}: must lie in [0, {end}], the entries that it has; write without gaps."
                )
        if count == 0:
            return
        for b, begin in enumerate(firsts):
            inside, row = begin // page, self.table[b]
            last = (begin + count - 1) // page
            if last >= len(row) or inside != last or not pool.writable(row[inside], begin - inside * page):
                self._make_writable(firsts, count)
                break
        self._fill(firsts, count, values)
        if not isinstance(first, int):
            self._clips = self._clips or len(set(firsts)) > 1
        self.ends = [max(end, begin + count) for begin, end in zip(firsts, self.ends)]

    def _checked(self, new: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
        """Return the new entries as the pool holds them, and T."""
        if new.keys() != self.fields.keys():
            raise ValueError(f"fields {sorted(new)}: must be {sorted(self.fields)}; write all of them together.")
        values, count = {}, None
        for name, field in self.fields.items():
            value = new[name]
            count = value.shape[1] if count is None else count
            if value.shape != (len(self.table), count, *field.shape):
                raise ValueError(
                    f"{name} of shape {list(value.shape)}: must be {[len(self.table), count, *field.shape]}, [B, T, "
                    "entry]; give every row the same number of new entries."
                )
            if not value.is_cpu or value.dtype != field.dtype:
                value = value.to("cpu", field.dtype)
            values[name] = value.detach() if value.requires_grad else value
        return values, count

    def _make_writable(self, firsts: list[int], count: int) -> None:
        """Give every row pages of its own for entries first .. first + count - 1."""
        pool, page = self.pool, self.pool.page
        copies, missing = [], []
        for b, begin in enumerate(firsts):
            row, upto = self.table[b], (begin + count - 1) // page + 1
            for i in range(begin // page, min(upto, len(row))):
                if not pool.writable(row[i], max(begin - i * page, 0)):
                    copies.append((b, i))
            missing.append(max(upto - len(row), 0))
        taken = pool.take(len(copies) + sum(missing))
        for (b, i), fresh in zip(copies, taken):
            row = self.table[b]
            for name in self.fields:
                pool.contents(name, fresh).copy_(pool.contents(name, row[i]))
            old, row[i] = row[i], fresh
            pool.release([old])
            self.epoch += (i + 1) * page <= self.ends[b]
            self._settled[b] = min(self._settled[b], i)
        own = taken[len(copies) :]
        for b, more in enumerate(missing):
            row = self.table[b]
            row += own[:more]
            own = own[more:]
            rest = len(row) * page - firsts[b] - count
            if more and rest:  # so that what is undefined is at least no other row's
                for name in self.fields:
                    pool.contents(name, row[-1])[-rest:] = 0
            self._settle(b, firsts[b] // page)
        self._moved()

    def _settle(self, b: int, upto: int) -> None:
        """Tell the pool of the pages of row b before `upto`."""
        if upto > self._settled[b]:
            self.pool.settle(self.table[b][self._settled[b] : upto])
            self._settled[b] = upto

    def _fill(self, firsts: list[int], count: int, values: dict[str, torch.Tensor]) -> None:
        """Copy new entries into pages that are there and writable, run by run of pages that lie side by side."""
        pool, page = self.pool, self.pool.page
        if count == 1:
            places = [(self.table[b][i // page] - pool.shift) * page + i % page for b, i in enumerate(firsts)]
            index = places[0] if len(places) == 1 else torch.tensor(places)
            for name, value in values.items():
                if len(places) == 1:
                    pool.flat[name][index] = value[0, 0]
                else:
                    pool.flat[name].index_copy_(0, index, value[:, 0])
            return
        for b, begin in enumerate(firsts):
            row, end, at = self.table[b], begin + count, begin
            while at < end:
                i = at // page
                start, upto = (row[i] - pool.shift) * page + at - i * page, (i + 1) * page
                while upto < end and row[i + 1] == row[i] + 1:
                    i, upto = i + 1, upto + page
                upto = min(upto, end)
                for name, value in values.items():
                    pool.flat[name][start : start + upto - at] = value[b, at - begin : upto - begin]
                at = upto

    # Reading ---------------------------------------------------------------------------------------------------------
    def read(self, name: str, place: torch.Tensor) -> torch.Tensor:
        """Return the entries at `place`, a new tensor on its device.

        Args:
            place: int64 `[B, G, U]`, for each head its own, of a field whose entries are `[G, ...]`; or `[B, U]`, whole
                entries. Places lie below what the longest row has had at any time; behind a row's own last entry is
                read what is undefined, but of this row alone.

        Returns:
            `[B, G, U, ...]`, or `[B, U, *shape]`.
        """
        field, where, device = self.fields[name], place.shape, place.device
        by_head = place.dim() == 3
        self._started(name)
        heads = field.shape[0] if by_head else 1
        entry = place.cpu()
        if self._clips:
            entry = entry.clamp(max=self._width() * self.page - 1)
        if self._base is None:
            inside = entry // self.page if self._bits is None else entry >> self._bits
            if where[0] == 1:
                entry = entry + self._by_page().take(inside)
            else:
                entry = entry + self._by_page().gather(1, inside.flatten(1)).view(where)
        if (name, heads) not in self._heads:
            first = torch.arange(heads) + (self._base or 0) * self.page * heads
            self._heads[name, heads] = first[:, None] if by_head else first
        entry = torch.add(self._heads[name, heads], entry, alpha=heads)
        found = self.pool.gather(name, entry.reshape(-1), self.page * heads)
        found = found.view(*where, *field.shape[1 if by_head else 0 :])
        return found if place.is_cpu else found.to(device)

    def dense(self, name: str, upto: int) -> torch.Tensor:
        """Return the first `upto` entries of every row in host memory, `[B, G, upto, ...]`, or `[B, upto]` without G.

        A view of the pool where the pages of a single row lie one behind the other, else a copy: read it before the
        next write. What stands behind a row's last entry is undefined.
        """
        field = self.fields[name]
        self._started(name)
        most = self._width() * self.page
        if self._base is not None:
            found = self.pool.contents(name, self._base, self._width())[None, : min(upto, most)]
        else:
            count = min(-(-upto // self.page), self._width())
            index = self._by_page()[:, :count] // self.page + torch.arange(count)
            found = self.pool.gather(name, index.flatten(), 1)
            found = found.view(len(self.table), count * self.page, *field.shape)[:, :upto]
        if found.shape[1] < upto:
            found = F.pad(found, [0, 0] * len(field.shape) + [0, upto - found.shape[1]])
        return found.transpose(1, 2) if field.shape else found

    def _started(self, name: str) -> None:
        if not self.length:
            raise ValueError(f"{name}: nothing has been written, so nothing can be read; write entries first.")

    def _width(self) -> int:
        """Pages of the row that has most."""
        return max(map(len, self.table))

    def _by_page(self) -> torch.Tensor:
        """Return `[B, pages]`, what turns a place of a row into an entry of the pool, added to it, by its page."""
        if self._offsets is None:
            width = self._width()
            numbers = torch.tensor([row + row[-1:] * (width - len(row)) for row in self.table])
            self._offsets = (numbers - torch.arange(width)) * self.page
        return self._offsets

    # Rows ------------------------------------------------------------------------------------------------------------
    def select(self, index: torch.Tensor | Sequence[int]) -> None:
        """Let row i be what row index[i] was, `[B']`: in another order, several times or not at all."""
        chosen = index.tolist() if isinstance(index, torch.Tensor) else list(index)
        if any(not 0 <= b < len(self.table) for b in chosen):
            raise ValueError(f"index={chosen}: must lie in [0, {len(self.table) - 1}], the rows; give rows that exist.")
        if chosen == list(range(len(self.table))):
            return
        settled, before = self._settled, self.table
        for b, row in enumerate(before):
            more = chosen.count(b) - 1
            if more > 0:
                self.pool.share(row, more)
            elif more < 0:
                self.pool.release(row)
        self._begin([list(before[b]) for b in chosen], [self.ends[b] for b in chosen])
        self._settled = [settled[b] for b in chosen]
        self.epoch += 1

    def cut(self, lengths: Sequence[int] | torch.Tensor) -> None:
        """Let row b have its first lengths[b] entries only; pages behind them are given back, but for a row's first."""
        lengths = lengths.tolist() if isinstance(lengths, torch.Tensor) else list(lengths)
        if len(lengths) != len(self.ends) or any(not 0 <= n <= end for n, end in zip(lengths, self.ends)):
            raise ValueError(f"lengths={lengths}: must lie in [0, what the rows have], {self.ends}; give fewer.")
        for b, row in enumerate(self.table):
            self.epoch += lengths[b] // self.page < self.ends[b] // self.page
            kept = max(-(-lengths[b] // self.page), 1)
            self.pool.release(row[kept:])
            del row[kept:]
            self._settled[b] = min(self._settled[b], lengths[b] // self.page)
        self._clips = self._clips or self.ends != lengths
        self.ends = lengths
        self._moved()

    def clear(self, batch: int | None = None) -> None:
        """Give all entries back; B is `batch` then, or what it was."""
        for row in self.table:
            self.pool.release(row)
        batch = len(self.table) if batch is None else batch
        self._begin([[] for _ in range(batch)], [0] * batch)
        self.epoch += 1

    def adopt(self, table: list[list[int]], ends: list[int]) -> None:
        """Let the rows be these pages, counted already, with so many entries each; what was before is forgotten."""
        empty = [row for row in table if not row] if any(table) else []
        for row, page in zip(empty, self.pool.take(len(empty))):  # a row that is read beside others has a page
            row.append(page)
            for name in self.fields:
                self.pool.contents(name, page).zero_()
        self._begin(table, ends)
        self._clips = True

    # Copies ----------------------------------------------------------------------------------------------------------
    def copy(self) -> "Pages":
        """Return Pages of their own that share all pages with these; both may go on writing.

        Of pages in files the copy keeps what it writes itself in host memory.
        """
        copy = Pages(self.fields, 0, pool=self.pool.forked())
        for row in self.table:
            copy.pool.share(row)
        copy._begin([list(row) for row in self.table], list(self.ends))
        return copy

    __copy__ = copy

    def __deepcopy__(self, memo: dict) -> "Pages":
        return self.copy()

    def __del__(self):
        if hasattr(self, "table"):  # otherwise it was never made
            self.pool.drop(self.table)

    def __reduce__(self):
        dense = {name: self._rows(name).clone() for name in self.fields} if self.length else {}
        return _restored, (self.fields, self.page, list(self.ends), dense)

    def _rows(self, name: str) -> torch.Tensor:
        """Return the entries of all rows as they are written, `[B, S, *shape]`."""
        dense = self.dense(name, self.length)
        return dense.transpose(1, 2) if self.fields[name].shape else dense

    @classmethod
    def joined(cls, several: Sequence["Pages"]) -> "Pages":
        """Return the rows of several, one behind the other, in host memory; the pages of one pool stay shared.

        Raises:
            ValueError: if their fields or page sizes differ.
        """
        head = several[0]
        for each in several[1:]:
            if each.fields != head.fields or each.page != head.page:
                raise ValueError(
                    f"fields {each.fields} in pages of {each.page}: must be {head.fields} in pages of {head.page}, as "
                    "the first has them; join what one model has written."
                )
        if all(each.pool is head.pool for each in several) and head.pool.forked() is head.pool:
            joined = cls(head.fields, 0, pool=head.pool)
            tables = [row for each in several for row in each.table]
            for row in tables:
                joined.pool.share(row)
        else:
            joined = cls(head.fields, 0, head.page)
            tables = [row for each in several for row in _moved_pages(each, joined.pool)]
        joined.adopt([list(row) for row in tables], [end for each in several for end in each.ends])
        return joined


def _moved_pages(pages: Pages, pool: Pool) -> list[list[int]]:
    """Copy pages into another pool, each once, and return the table there."""
    distinct = sorted(set().union(*pages.table))
    numbers = dict(zip(distinct, pool.take(len(distinct))))
    for old, new in numbers.items():
        for name in pages.fields:
            pool.contents(name, new).copy_(pages.pool.contents(name, old))
    table = [[numbers[page] for page in row] for row in pages.table]
    for row in table:
        pool.share(row)
    pool.release(list(numbers.values()))
    return table


def _restored(fields: dict[str, Field], page: int, ends: list[int], dense: dict[str, torch.Tensor]) -> Pages:
    """Return what was pickled, in host memory."""
    pages = Pages(fields, len(ends), page)
    if dense:
        pages.write(0, **dense)
        pages.cut(ends)
    return pages


__all__ = ["Field", "Pages"]
