"""Taking back the last tokens that a cache has read.

A state of constant size has forgotten what it was. So the cache keeps a few copies of its states, and what was read
since the oldest of them: to go back to column c it takes the newest copy from before c, and the model reads what lies
between with the next tokens, in one forward. Any split of a text gives the same logits, so this is exact. What follows
the text, entry by entry, is not copied: what lies behind its end is written anew.

    copies at columns c_0 < c_1 < ...     c_1 > C - limit after C columns, so that every column from C - limit on can be
                                          reached; limit / 2 apart, except the last, made before a forward of several
                                          columns, so that what it drafts is taken back at once

Shapes: B rows, T columns, E hidden size.
"""

import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from .fields_bmojo import is_int


DRAFTED = 64  # columns that generate() may take back
SHOWN = ("output_attentions", "output_hidden_states")  # what a forward returns of each layer, of all columns it reads


class Columns(NamedTuple):
    """Input columns.

    embeds: `[B, T, E]`. mask: `[B, T]` bool, None: all real. positions: `[B, T]`, None: counted.
    """

    embeds: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor | None

    @property
    def count(self) -> int:
        return self.embeds.shape[1]

    def part(self, first: int, last: int) -> "Columns":
        """Return columns `first` ... `last` - 1."""
        return Columns(*(None if value is None else value[:, first:last] for value in self))

    def with_next(self, new: "Columns") -> "Columns":
        """Return these columns and then `new`, where those are."""
        mask, positions, device = None, None, new.embeds.device
        if self.mask is not None or new.mask is not None:
            mask = torch.cat([self.real().to(device), new.real()], dim=1)
        if self.positions is not None:
            positions = torch.cat([self.positions.to(new.positions), new.positions], dim=1)
        return Columns(torch.cat([self.embeds.to(new.embeds), new.embeds], dim=1), mask, positions)

    def copied(self) -> "Columns":
        """Return a copy without gradients, of what else may belong to others or be a view of more."""
        return Columns(*(None if value is None else value.detach().clone() for value in self))

    def fits(self, new: "Columns") -> bool:
        """Whether both count their positions themselves or both say them."""
        return (self.positions is None) == (new.positions is None)

    def real(self) -> torch.Tensor:
        """Return the mask, `[B, T]` bool."""
        return self.embeds.new_ones(self.embeds.shape[:2], dtype=torch.bool) if self.mask is None else self.mask


class Kept(NamedTuple):
    """A layer's states after `columns` columns, without those that follow the text."""

    states: dict[str, torch.Tensor]
    columns: int
    even: bool


class Rollback:
    """What a cache needs to take back its last `limit` columns.

    copies: of the states, each a `Kept` per layer. read: what was read since the first of them, and what waits at its
    end: columns that layers have taken back although the cache counts them, to be read again.

    Raises:
        ValueError: unless limit is an integer of 1 or more.
    """

    def __init__(self, limit: int):
        if not is_int(limit) or limit < 1:
            raise ValueError(
                f"rollback_limit={limit!r}: must be an integer >= 1, the columns that can be taken back; leave it out "
                "for a cache that takes nothing back and costs nothing more."
            )
        self.limit = limit
        self.copies: list[list[Kept]] = []
        self.read: list[Columns] = []
        self.waiting = 0
        # Of a generate() that drafts: whether it does, and columns of its prompt that were read before it.
        self.drafting, self.known = False, 0
        self._reader: Any = None

    # Reading ---------------------------------------------------------------------------------------------------------
    def waits(self) -> Columns | None:
        """Return what has to be read before anything new; None: nothing."""
        return self._last(self.waiting) if self.waiting else None

    def take(self) -> Columns | None:
        """Return what waits, which is about to be read: it waits no more."""
        found = self.waits()
        if found is not None:
            held = self._held()
            self.read = [self._last(held).part(0, held - found.count)] if held > found.count else []
            self.waiting = 0
        return found

    def put_back(self, columns: Columns) -> None:
        """Undo `take`: nothing was read."""
        self.read.append(columns)
        self.waiting = columns.count

    def before(self, layers: list, new: Columns) -> None:
        """Copy the states if that is due, because `new` are about to be read."""
        here, columns = layers[0].columns, new.count
        if self.read and not self.read[-1].fits(new):
            self.reset()  # counted positions and given ones cannot be read again as one text
        if self.copies:
            since = here - self._at(-1)
            if since == 0 or (columns == 1 and since < self.limit / 2):
                return
            if len(self.copies) > 1 and self._at(-1) - self._at(-2) < self.limit / 2:
                del self.copies[-1]
        self.copies.append([layer.kept() for layer in layers])

    def after(self, new: Columns, reader: Any) -> None:
        """Take note of what was read by which model."""
        self.read.append(new.copied())
        self._reader = weakref.ref(reader)
        here = self._at(0) + self._held()
        while len(self.copies) > 1 and self._at(1) <= here - self.limit:
            self._forget(self._at(1) - self._at(0))
            del self.copies[0]

    def reader(self) -> Any:
        """Return the model that read last; None if it is gone."""
        return None if self._reader is None else self._reader()

    # Taking back -----------------------------------------------------------------------------------------------------
    def check(self, count: int) -> None:
        """Raise ValueError if `count` columns are more than the limit, or than were read since it is allowed."""
        held = self._held()
        if count <= min(self.limit, held):
            return
        why, remedy = f"rollback_limit={self.limit}", "make the cache with a larger one, or "
        if count <= self.limit:
            why, remedy = f"{held} were read since it is allowed and are not settled", ""
        raise ValueError(
            f"crop of {count} columns: {why}, so that at most {min(self.limit, held)} can be taken back; {remedy}go "
            "back to a copy.deepcopy of the cache."
        )

    def back(self, layers: list, count: int) -> None:
        """Take back the last `count` columns, as many as `check` lets."""
        held = self._held()
        target = self._at(0) + held - count
        while self._at(-1) > target:
            del self.copies[-1]
        for layer, kept in zip(layers, self.copies[-1]):
            layer.back_to(kept)
        self.read = [self._last(held).part(0, held - count)] if held > count else []
        self.waiting = target - self._at(-1)

    # What operations on the cache do to it ---------------------------------------------------------------------------
    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Do to everything what is done to a cache's states: choose rows, or move."""
        self.copies = [
            [kept._replace(states={name: function(value) for name, value in kept.states.items()}) for kept in copy]
            for copy in self.copies
        ]
        self.read = [Columns(*(None if value is None else function(value) for value in part)) for part in self.read]

    def reset(self) -> None:
        """Forget everything."""
        self.copies, self.read, self.waiting, self.known = [], [], 0, 0

    @property
    def nbytes(self) -> int:
        """Return the bytes of copies and of what was read."""
        tensors = [value for copy in self.copies for kept in copy for value in kept.states.values()]
        tensors += [value for part in self.read for value in part if value is not None]
        return sum(value.numel() * value.element_size() for value in tensors)

    def _held(self) -> int:
        return sum(part.count for part in self.read)

    def _at(self, number: int) -> int:
        return self.copies[number][0].columns

    def _last(self, count: int) -> Columns:
        """Return the last `count` columns in one piece."""
        joined = self.read[0]
        for part in self.read[1:]:
            joined = joined.with_next(part)
        return joined.part(joined.count - count, joined.count)

    def _forget(self, count: int) -> None:
        """Let go of the first `count` columns of what was read."""
        while count:
            first = self.read.pop(0)
            if first.count > count:
                self.read.insert(0, first.part(count, first.count).copied())
            count -= min(count, first.count)

    def __deepcopy__(self, memo: dict) -> "Rollback":
        """Return a copy; tensors are shared, because nothing here is written in place."""
        new = type(self)(self.limit)
        new.drafting, new.known = self.drafting, self.known
        new.copies, new.read, new.waiting, new._reader = [*self.copies], [*self.read], self.waiting, self._reader
        return new

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}


def read_with_rollback(model: Any, new: Columns, cache: Any, packing: dict, **kwargs: Any) -> Any:
    """Let a model read `new` into a cache that can take columns back, and before it what waits there.

    Args:
        model: a `BMojoModel`. packing, kwargs: as its `_read` takes them.
    """
    rollback = cache.rollback
    return_dict = kwargs.pop("return_dict", getattr(model.config, "return_dict", True))
    shown = [kwargs.get(name) or getattr(model.config, name, False) for name in SHOWN]
    whole = any(shown) or any(value is not None for value in packing.values())
    # What a cache holds is detached: a gradient that goes through all of it needs it read at once.
    whole = whole or (torch.is_grad_enabled() and new.embeds.requires_grad)
    if new.positions is not None:
        new = new._replace(positions=new.positions.expand(len(new.embeds), -1))
    waiting = rollback.waits()
    if waiting is not None and (whole or not waiting.fits(new)):
        read_waiting(model, cache)
        waiting = None
    if waiting is None:
        out = _read(model, new, cache, whole, packing=packing, **kwargs)
    else:
        before = cache.layers[0].columns
        rollback.take()
        try:
            out = _read(model, waiting.with_next(new), cache, whole, packing=packing, **kwargs)
        except BaseException:
            if cache.layers[0].columns == before:
                rollback.put_back(waiting)
            raise
        out.last_hidden_state = out.last_hidden_state[:, waiting.count :]
    return out if return_dict is not False else out.to_tuple()


def read_waiting(model: Any, cache: Any) -> None:
    """Let a model read what waits in a cache."""
    waiting = cache.rollback.take()
    try:
        _read(model, waiting, cache, True, packing=dict.fromkeys(("seq_idx", "cu_seq_lens")))
    except BaseException:
        cache.rollback.put_back(waiting)
        raise


def _read(model: Any, columns: Columns, cache: Any, whole: bool, **kwargs: Any) -> Any:
    """Read columns, the last `limit` of many by themselves, so that there is a copy from before them.

    Args:
        whole: whether they have to be read at once all the same.
    """
    rollback, count = cache.rollback, columns.count
    edges = [0, count] if whole or count <= 2 * rollback.limit else [0, count - rollback.limit, count]
    found = []
    for first, last in pairwise(edges):
        part = columns.part(first, last)
        try:
            rollback.before(cache.layers, part)
            out = model._read(part, cache, return_dict=True, **kwargs)
            rollback.after(part, model)
        except BaseException:
            cache.layers[0].unfinished |= first > 0  # half of it was read
            raise
        found.append(out.last_hidden_state)
    if len(found) > 1:
        out.last_hidden_state = torch.cat(found, dim=1)
    return out


__all__ = ["DRAFTED", "Columns", "Kept", "Rollback", "read_waiting", "read_with_rollback"]
