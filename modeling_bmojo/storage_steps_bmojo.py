"""A single token's query to the storage: the same choice as in `storage_bmojo`, in as few operations as it takes.

Every row has read the same number of tokens, which is a number here: what is offered is a slice, and masks are needed
only where the eidetic memory keeps some of it. Of what is stored, entries come as `storage_bmojo.Entries`.

Shapes: B rows, S stored tokens, U places, K fetched, G key/value heads, n query heads of each, D head dim, N blocks.
"""

import functools
from typing import Any, NamedTuple

import torch

from .attention_ops import Seen
from .block_means_bmojo import Pyramid
from .distance_bmojo import Far, step_correction
from .storage_ops import chosen_places, in_steps, largest


SCAN = 16384  # sketches that are multiplied at a time: what they become fits into a cache
WORTH_MOVING = 0.4  # of the entries: where more are fetched all are read where they lie


class Step(NamedTuple):
    """What a step asks with.

    query: `[B, G, n, D]`. far: the same at D_max, and D_max; or None. sketched: `[B, G, n, r]` or None. scaling: sigma.
    now: the token's position. window: W.
    """

    query: torch.Tensor
    far: tuple[torch.Tensor, Far] | None
    sketched: torch.Tensor | None
    scaling: float
    now: int
    window: int

    @property
    def stored(self) -> int:
        """Return how many tokens have left the window."""
        return max(self.now - self.window + 1, 0)


class Paged(NamedTuple):
    """Entries that lie in pages: read as `at` says, wherever those are.

    pages: `Pages` of the layer. name: which field. device: where what is read goes.
    """

    pages: Any
    name: str
    device: torch.device

    def some(self, first: int, last: int) -> torch.Tensor:
        """Return entries `first` ... `last` - 1."""
        place = torch.arange(first, last).expand(self.pages.batch, -1)
        return self.pages.read(self.name, place).transpose(1, 2).to(self.device)

    def at(self, place: torch.Tensor | None, count: int) -> torch.Tensor:
        """Return `at` of them."""
        if place is None:
            return self.pages.dense(self.name, count).to(self.device)
        return self.pages.read(self.name, place)


class BlocksNow(NamedTuple):
    """What each place of the rings holds for one query, `[N]` each; zeros where it is shown nothing.

    first: the block's first token. end: behind its last. size: its tokens, float32 at least.
    """

    first: torch.Tensor
    end: torch.Tensor
    size: torch.Tensor


def blocks_now(step: Step, pyramid: Pyramid) -> BlocksNow:
    """Return the blocks that a step's query is shown."""
    wide = torch.promote_types(step.query.dtype, torch.float32)
    return _blocks_now(step.now, pyramid, step.query.device, wide, torch.is_inference_mode_enabled())


@functools.lru_cache(maxsize=4)  # every layer asks the same; tensors made in inference mode stay there
def _blocks_now(now: int, pyramid: Pyramid, device: torch.device, wide: torch.dtype, mode: bool) -> BlocksNow:
    spans = pyramid.spans(now, now + 1)
    rows = [(0, 0)] * (len(spans) * pyramid.places)
    for level, span in enumerate(spans):
        size = pyramid.size << level
        for number in range(*span):
            if now >= pyramid.queries(level, number)[1]:
                continue
            rows[level * pyramid.places + number % pyramid.places] = number * size, (number + 1) * size
    first, end = torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 2).t().contiguous()
    return BlocksNow(first, end, (end - first).to(wide))


@torch.no_grad()
def fetch(
    step: Step, stored, kept: torch.Tensor | None, fetched: int, candidates: int | None
) -> tuple[Seen, torch.Tensor | None]:
    """Return what the query fetches, and its places `[B, G, K]`; None: all that is stored.

    Args:
        stored: `Entries`. kept: `[B, M]` positions in the eidetic memory, others than stored ones count for nothing;
            None: it keeps none. fetched: K. candidates: C, None: all.
    """
    count, place, meant = step.stored, None, None
    if candidates is not None and candidates < count:
        wanted = in_steps(_guessed(step.sketched, stored.sketches, count))
        place, meant = chosen_places(_without(wanted, kept), candidates)
    if fetched < (count if place is None else place.shape[-1]):
        keys = at(stored.keys, place, count)
        wide = torch.promote_types(step.query.dtype, torch.float32)
        exact = (step.query.to(wide) @ keys.to(wide).transpose(-1, -2)) * step.scaling
        if step.far is not None:
            change = _change(step, keys, _place(place, keys))
            exact = exact if change is None else exact + change
        wanted = in_steps(largest(exact))
        wanted = _without(wanted, kept) if place is None else wanted
        wanted = wanted if meant is None else wanted.masked_fill_(~meant, -torch.inf)
        place, meant = chosen_places(wanted, fetched, place)
    elif place is None and kept is not None:
        zeros = torch.zeros(len(kept), 1, count, device=kept.device)
        meant = _without(zeros, kept) == 0
    bias = None if meant is None else torch.where(meant, 0.0, -torch.inf)
    read = place
    if place is not None and place.shape[-1] > WORTH_MOVING * count:
        unseen = torch.full((*place.shape[:2], count), -torch.inf, device=place.device)
        read, bias = None, unseen.scatter_(-1, place, 0.0 if bias is None else bias)
    keys, values = (at(value, read, count).to(step.query.dtype) for value in (stored.keys, stored.values))
    bias = None if bias is None else bias[:, :, None].to(keys.dtype)
    if step.far is not None:
        bias = _added(bias, _change(step, keys, _place(read, keys)), keys.dtype)
    seen = Seen(keys, values, bias, _place(read, keys))
    if place is None or meant is None:
        return seen, place
    return seen, torch.where(meant, place, -1).sort(dim=-1).values


@torch.no_grad()
def mass(step: Step, stored, blocks: BlocksNow, kept: torch.Tensor | None, place: torch.Tensor) -> Seen:
    """Return the blocks, each with the log of how many of its tokens are neither kept nor fetched.

    Args:
        place: `[B, G, K]` what is fetched, rising, -1 for none.
    """
    if kept is not None:
        place = torch.cat([place, kept[:, None].expand(-1, place.shape[1], -1)], dim=-1).sort(dim=-1).values
    edges = torch.stack([blocks.first, blocks.end]).flatten().expand(*place.shape[:2], -1)
    first, end = torch.searchsorted(place.contiguous(), edges.contiguous()).tensor_split(2, dim=-1)
    bias = (blocks.size - (end - first)).log_()[:, :, None]  # log 0: not there
    keys, values = (value.to(step.query.dtype) for value in stored.means[:2])
    return Seen(keys, values, bias.to(keys.dtype), (blocks.end - 1).expand(*keys.shape[:2], -1))


def at(entries: torch.Tensor | Paged, place: torch.Tensor | None, count: int) -> torch.Tensor:
    """Return entries `[B, G, S, D]` at places `[B, G, U]`: `[B, G, U, D]`; None: the first `count`."""
    if isinstance(entries, Paged):
        return entries.at(place, count)
    if place is None:
        return entries[:, :, :count]
    rows, heads, size, dim = entries.shape
    # As one long list of vectors: ten times as fast as gather, which asks for every number where it lies.
    if entries.is_contiguous():
        flat, own = entries.view(-1, dim), (heads * size, size, 1)
    elif entries.transpose(1, 2).is_contiguous():
        flat, own = entries.transpose(1, 2).reshape(-1, dim), (heads * size, 1, heads)
    else:
        return entries.gather(2, place[..., None].expand(-1, -1, -1, dim))
    first = _first(rows, heads, *own, place.device, torch.is_inference_mode_enabled())
    index = torch.add(first, place, alpha=own[2])
    return flat.index_select(0, index.flatten()).view(*place.shape, dim)


def some(entries: torch.Tensor | Paged, first: int, last: int) -> torch.Tensor:
    """Return entries `first` ... `last` - 1 of `[B, G, S, D]`."""
    if isinstance(entries, Paged):
        return entries.some(first, last)
    return entries[:, :, first:last]


@functools.lru_cache(maxsize=8)  # every layer asks the same; tensors made in inference mode stay there
def _first(rows: int, heads: int, row: int, head: int, step: int, device: torch.device, mode: bool) -> torch.Tensor:
    """Return where the entries of each row and head begin, `[B, G, 1]`."""
    by_row = torch.arange(rows, device=device).view(-1, 1, 1) * row
    return by_row + torch.arange(heads, device=device).view(-1, 1) * head


def _place(place: torch.Tensor | None, keys: torch.Tensor) -> torch.Tensor:
    if place is not None:
        return place
    return torch.arange(keys.shape[2], device=keys.device).expand(keys.shape[:3])


def _without(wanted: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Return wanted `[B, G, S]` with -inf for tokens that are kept."""
    if kept is None:
        return wanted
    count = wanted.shape[-1]
    room = torch.nn.functional.pad(wanted, (0, 1))
    index = torch.where((kept >= 0) & (kept < count), kept, count)[:, None].expand(-1, wanted.shape[1], -1)
    return room.scatter_(2, index, -torch.inf)[..., :count]


def _guessed(sketched: torch.Tensor, sketches: torch.Tensor, count: int) -> torch.Tensor:
    """Return A `[B, G, count]` by the sketches `[B, G, r, S]`, piece by piece, because bytes become four times as large
    to be multiplied."""
    found, size = [], SCAN if sketches.is_cpu else count
    for first in range(0, count, size):
        part = sketches[..., first : min(first + size, count)].to(sketched.dtype)
        found.append(largest(sketched @ part))
    return torch.cat(found, dim=-1) if len(found) > 1 else found[0]


def _added(bias: torch.Tensor | None, change: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    if bias is None or change is None:
        return bias if change is None else change.to(dtype)
    return bias + change.to(dtype)


def _change(step: Step, keys: torch.Tensor, origin: torch.Tensor) -> torch.Tensor | None:
    """Return what makes the scores of far pairs those at D_max, `[B, G, n, S]`; keys are at origin `[B, G, S]`. None:
    nothing is far."""
    far_query, far = step.far
    return step_correction(far, step.query, far_query, keys, origin, step.now)


__all__ = ["BlocksNow", "Paged", "Step", "at", "blocks_now", "fetch", "mass", "some"]
