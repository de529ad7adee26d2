"""Storage: every token that has left the window, of which each query fetches the few that matter to it.

    S_t = { s : expiry_s <= t }             stored for query t: neither in the window nor in the eidetic memory
    candidates: the first C of S_t by the sketch;  fetched: the first K of those by exact scores (`storage_ops`)
    blocks: the mean key and value of b 2^l tokens, with log(tokens of it that are not kept nor fetched) on the score

Tokens are written where they are read: entry = position, nothing moves and nothing is overwritten, pads excepted. What
a query is offered is a matter of masks. The choice carries no gradient, what is fetched does.

Shapes: R rows (B in a cache), T new tokens, Q queries, S entries, H query heads, G key/value heads, D head dim, N
blocks, n blocks of queries, L their length.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .attention_ops import BlockKeys, Lazy, Seen
from .block_means_bmojo import Blocks, Means, Pyramid, fetched_inside, inside, token_means
from .distance_bmojo import correction, scores
from .eidetic_bmojo import EideticMemory
from .fields_bmojo import is_int, reject, require_int, require_number
from .memory_ops import NEVER, widest
from .parts_bmojo import MemoryPart, Observed, Tokens
from .states_bmojo import State, append, grow
from .storage_ops import largest, places_of_first
from .storage_steps_bmojo import Paged, Step, at, blocks_now, fetch, mass, some


LARGEST_BLOCK = 1 << 20


class Entries(NamedTuple):
    """Everything that was read, entry = position.

    keys, values: `[R, G, S, D]`, or where they are read from. sketches: `[R, G, r, S]` or None. clocks: `[R, S]`, E of
    each token, or None. means: of blocks, or None. expiry: `[R, S]`, the position from which on a token is in none of
    the other memories, or None: W after it.
    """

    keys: "torch.Tensor | Paged"
    values: "torch.Tensor | Paged"
    sketches: torch.Tensor | None
    clocks: torch.Tensor | None
    means: Means | None
    expiry: torch.Tensor | None


class Asking(NamedTuple):
    """Queries of some blocks.

    query: `[R, H, Q, D]`. far: the same at D_max, or None. sketched: `[R, H, Q, r]`, or None. positions: `[R, Q]`, -1
    for a pad.
    """

    query: torch.Tensor
    far: torch.Tensor | None
    sketched: torch.Tensor | None
    positions: torch.Tensor


class Storage(MemoryPart):
    """Every token read, of which a query fetches K, and the mass of the others."""

    bounded = True

    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.fetched, self.candidates = spec.stored, config.storage_candidates
        self.limit, self.decay = config.storage_limit, config.storage_decay
        self.sketch_size = config.storage_sketch_size
        self.window, self.size, self.shown = spec.window, spec.stride, spec.blocks
        distances = config.max_rope_distance, config.max_rope_distance_start
        self.pyramid = Pyramid(spec.window, spec.stride, spec.blocks, *distances)
        self.heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.takes_left = spec.slots > 0

    @classmethod
    def check_config(cls, config):
        require_int(config, "storage_size", 0, "use 0 to store nothing")
        require_number(config, "storage_decay", 0, False, "use 0 for no forgetting")
        size, candidates, sketch = config.storage_size, config.storage_candidates, config.storage_sketch_size
        if candidates is not None and (not is_int(candidates) or candidates < size):
            reject("storage_candidates", candidates, f"must be an integer >= storage_size={size}", "null is for all")
        if sketch is not None and (not is_int(sketch) or not 1 <= sketch <= config.head_dim):
            reject("storage_sketch_size", sketch, f"must lie in [1, head_dim={config.head_dim}]", "null is for none")
        if size and candidates is not None and sketch is None:
            reject("storage_candidates", candidates, "needs a sketch that names them", "set storage_sketch_size")
        if config.storage_limit is not None:
            require_int(config, "storage_limit", 1, "null is no limit; storage_size=0 stores nothing")
        if config.fading_mass and config.fading_size and not size:
            reject(
                "fading_mass",
                True,
                "needs storage_size > 0: a mean misses the few tokens that carry most, so that alone it does harm",
                "set storage_size, or fading_mass=False",
            )
        if config.fading_mass and config.fading_size and not 2 <= config.fading_stride <= LARGEST_BLOCK:
            rule = f"must lie in [2, {LARGEST_BLOCK:,}] with fading_mass"
            reject("fading_stride", config.fading_stride, rule, "e.g. 16 tokens a block")

    @classmethod
    def belongs(cls, config, spec):
        return spec.stored > 0

    def states(self):
        entry = State((self.heads, 0, self.head_dim), grows=1)
        found = {"stored_keys": entry._replace(pages="keys"), "stored_values": entry._replace(pages="values")}
        if self.sketch_size:
            found["sketches"] = State(  # as their products read them
                (self.heads, self.sketch_size, 0), "byte", grows=2, pages="sketches", mirrored=True
            )
        if self.decay:
            found |= {"surprise": State((), "widest"), "surprises": State((0,), "widest", grows=0)}
        if self.shown:
            levels = functools.partial(_levels_after, self.pyramid)
            mean = State((self.heads, 0, self.pyramid.places, self.head_dim), grows=1, needs=levels)
            found |= {"mean_keys": mean, "mean_values": mean}
        return found

    def observe(self, tokens: Tokens, layer: Any, left, kernels) -> Observed:
        entries = self._take_in(tokens, layer)
        if tokens.queries <= 0:
            return Observed()
        if self._is_plain_step(tokens):
            return Observed(self._offer_now(tokens, entries, layer))
        positions = tokens.positions(layer)
        now = positions[:, tokens.front :]
        # Where the first query stands in the row that has read most, so that a number says what is offered at most.
        last = positions.shape[1] + (0 if layer is None else layer.columns)
        start = last - tokens.queries
        entries = entries._replace(expiry=self._expiry(tokens, layer, left, now, last))
        blocks = self.pyramid.levels(last - self.window) * (self.shown + 1) if self.shown else 0
        width = max(last - self.window, 0) + blocks
        even = tokens.lengths is None and (layer is None or layer.even)
        named = self.candidates is not None and self.candidates < last - self.window
        asked = tokens.asked() if named else None
        make = functools.partial(self._offer, tokens, entries, asked, now, start, even)
        return Observed([Lazy(width, make)])

    def _is_plain_step(self, tokens: Tokens) -> bool:
        """Whether `storage_steps_bmojo` answers: what is offered is then a slice, and nothing is added to scores."""
        return tokens.counted and self.limit is None and not self.decay

    def _offer_now(self, tokens: Tokens, entries: Entries, layer: Any) -> list[Seen]:
        """Return what a step sees whose rows have all read `layer.columns` tokens before it."""
        own, scaling = self._by_group(tokens.query.transpose(1, 2))[..., 0, :], tokens.scaling
        stored, sketched, far = layer.columns + 1 - self.window, None, tokens.far
        if self.candidates is not None and self.candidates < stored:
            sketched = tokens.asked()[:, 0].unflatten(1, (self.heads, -1))
        if far is not None:
            far = far.query[:, 0].unflatten(1, (self.heads, -1)), far
        step = Step(own, far, sketched, scaling, layer.columns, self.window)
        if step.stored == 0:
            return []
        kept = layer.positions[:, layer.memory.part(EideticMemory).own] if self.takes_left else None
        seen, place = fetch(step, entries, kept, self.fetched, self.candidates)
        if not self.shown or place is None:
            return [seen]  # whatever is stored is there itself
        blocks = blocks_now(step, self.pyramid)
        return [seen, mass(step, entries, blocks, kept, place)] if len(blocks.first) else [seen]

    # Taking in -------------------------------------------------------------------------------------------------------
    def _take_in(self, tokens: Tokens, layer: Any) -> Entries:
        sketches = None if tokens.sketches is None else tokens.sketches.permute(0, 2, 3, 1)
        keys, values = tokens.keys.transpose(1, 2), tokens.values.transpose(1, 2)
        clocks = self._clocks(tokens, layer)
        if layer is not None:
            self._write(tokens, layer, sketches, clocks)
        if self._is_plain_step(tokens):
            means = self._step_means(layer) if self.shown else None
            return Entries(*self._kept(layer), layer.sketches if self.sketch_size else None, None, means, None)
        if layer is not None and layer.started:
            upto = layer.columns + keys.shape[2]
            keys, values = self._joined(tokens, layer, upto)
            sketches = None if sketches is None else layer.sketches[..., :upto]
            clocks = None if clocks is None else layer.surprises[:, :upto]
        means = self._means(tokens, layer, keys, values) if self.shown else None
        return Entries(keys, values, sketches, clocks, means, None)

    @staticmethod
    def _kept(layer: Any) -> "tuple[torch.Tensor | Paged, torch.Tensor | Paged]":
        """Return keys and values of all that was read, in the layer's tensors or in its pages."""
        if layer.pages is not None:
            return Paged(layer.pages, "keys", layer.seen.device), Paged(layer.pages, "values", layer.seen.device)
        return layer.stored_keys, layer.stored_values

    def _joined(self, tokens: Tokens, layer: Any, upto: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values, differentiable in the new ones if a gradient is wanted."""
        if layer.pages is not None and not tokens.needs_grad:
            return self._kept(layer)
        found = []
        for stored, new in zip(self._kept(layer), (tokens.keys, tokens.values)):
            part = at(stored, None, upto).to(new.device, new.dtype)
            if tokens.needs_grad:
                rows, index = self._places(tokens, layer)
                part = part.transpose(1, 2).index_put((rows, index), new).transpose(1, 2)
            found.append(part)
        return found[0], found[1]

    @staticmethod
    def _places(tokens: Tokens, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        index = layer.seen[:, None] + torch.arange(tokens.keys.shape[1], device=layer.seen.device)
        return torch.arange(len(index), device=index.device)[:, None], index

    def _clocks(self, tokens: Tokens, layer: Any) -> torch.Tensor | None:
        """Return E `[R, T]` of the new tokens, summed in float64 from left to right; a pad has that before it."""
        if not self.decay or tokens.innovation is None:  # nobody judges a text inside the window that no cache keeps
            return None
        pads = tokens.positions(layer) < 0
        wide = tokens.innovation.to(widest(pads.device)).masked_fill(pads, 0.0)
        before = wide.new_zeros(len(wide)) if layer is None else layer.surprise
        return torch.cat([before[:, None], wide], dim=1).cumsum(dim=1)[:, 1:]

    @torch.no_grad()
    def _write(self, tokens: Tokens, layer: Any, sketches: torch.Tensor | None, clocks: torch.Tensor | None) -> None:
        count = tokens.keys.shape[1]
        upto = layer.columns + count
        index = slice(upto - 1, upto) if tokens.counted else self._places(tokens, layer)[1]
        new = {"stored_keys": tokens.keys, "stored_values": tokens.values}
        if layer.pages is not None:
            uneven = tokens.lengths is not None or not layer.even
            fields = {} if sketches is None else {"sketches": tokens.sketches}
            layer.pages.write(layer.seen if uneven else layer.columns, keys=tokens.keys, values=tokens.values, **fields)
            new = {}
        if sketches is not None:
            layer.sketches = grow(layer.sketches, 3, upto)
            if tokens.counted:
                layer.sketches[..., upto - 1 :][..., :1] = sketches
            else:
                append(layer.sketches.permute(0, 3, 1, 2), index, sketches.permute(0, 3, 1, 2))
        for name, value in new.items():
            setattr(layer, name, grow(getattr(layer, name), 2, upto))
            self._put(getattr(layer, name), index, value)
        if clocks is not None:
            layer.surprises = grow(layer.surprises, 1, upto)
            append(layer.surprises, self._places(tokens, layer)[1], clocks)
            layer.surprise.copy_(clocks[:, -1])

    @staticmethod
    def _put(buffer: torch.Tensor, index: torch.Tensor | slice, new: torch.Tensor) -> None:
        """Write new `[B, T, G, D]` into a buffer `[B, G, S, D]`."""
        if isinstance(index, slice):
            buffer[:, :, index] = new.detach().transpose(1, 2)
        else:
            append(buffer.transpose(1, 2), index, new)

    # Means of blocks -------------------------------------------------------------------------------------------------
    def _means(self, tokens: Tokens, layer: Any, keys, values) -> Means:
        """Return the means that the queries are shown, of all keys and values, and let the cache keep the last ones."""
        low, high, seen, rings = 0, tokens.keys.shape[1], None, None
        if layer is not None and layer.started:
            low, rings = layer.columns, (layer.mean_keys, layer.mean_values)
            high += low
            if not layer.even:
                low, seen = int(layer.seen.min()), layer.seen
        means = self.pyramid.means(functools.partial(self._of_tokens, keys, values), low, high, rings, seen)
        if layer is not None:
            after = layer.seen + tokens.real()
            rings = self.pyramid.rings(means, (layer.mean_keys, layer.mean_values), after, high)
            layer.mean_keys, layer.mean_values = rings
        return means

    def _step_means(self, layer: Any) -> Means:
        """Return what the cache keeps, with the block that the token completes which leaves the window now."""
        rings = layer.mean_keys, layer.mean_values
        now = functools.partial(self._of_tokens, *self._kept(layer))
        layer.mean_keys, layer.mean_values = self.pyramid.step(rings, layer.columns + 1 - self.window, now)
        return Means(layer.mean_keys.flatten(2, 3), layer.mean_values.flatten(2, 3), ())

    def _of_tokens(self, keys, values, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the means of the smallest blocks from number `first` to `last`, `[R, G, last - first, D]` each."""
        return tuple(token_means(some(each, first * self.size, last * self.size), self.size) for each in (keys, values))

    # What is offered -------------------------------------------------------------------------------------------------
    def _expiry(self, tokens: Tokens, layer: Any, left: list, now: torch.Tensor, count: int) -> torch.Tensor | None:
        """Return the position `[R, S]` from which on no other memory shows a token; None: W after its own."""
        if not self.takes_left:
            return None
        expiry = torch.zeros(now.shape[0], count + 1, dtype=torch.int64, device=now.device)
        if tokens.steps:
            own = layer.positions[:, layer.memory.part(EideticMemory).own]
            expiry.scatter_(1, torch.where(own < 0, count, own), NEVER)
            return expiry[:, :-1]
        seen = 0 if layer is None else layer.seen[:, None]
        for each in left:
            at = (each.out_at + seen + tokens.front).clamp(max=NEVER)
            expiry.scatter_(1, torch.where(each.positions < 0, count, each.positions), at)
        return expiry[:, :-1]

    def _offer(
        self, tokens: Tokens, entries: Entries, asked, now: torch.Tensor, start: int, even: bool, blocks: slice
    ) -> list[BlockKeys]:
        """Return what the queries of some blocks are offered.

        Args:
            asked: `[R, T, H, r]` what they ask sketches, None where they take all. now: `[R, T - front]` positions, -1
                for a pad. start: the position of the first query in the row that has read most. even: in every row.
        """
        block = min(tokens.block, tokens.queries)
        count, first = blocks.stop - blocks.start, blocks.start * block
        queries, length = min(count * block, now.shape[1] - first), count * block
        positions = F.pad(now[:, first : first + queries], (0, length - queries), value=-1)

        def part(value: torch.Tensor | None) -> torch.Tensor | None:
            """`[R, T, H, ...]` to `[R, H, Q, ...]` of these queries."""
            if value is None:
                return None
            value = value[:, tokens.front + first : tokens.front + first + queries].transpose(1, 2)
            return F.pad(value, (0, 0, 0, length - queries)) if length > queries else value

        asking = Asking(
            part(tokens.query),
            part(None if tokens.far is None else tokens.far.query),
            part(asked),
            positions,
        )
        upto = max(start + first + queries - self.window, 0)
        entry = torch.arange(upto, device=now.device)
        gone = offered = entry <= positions[..., None] - self.window  # [R, Q, S]
        if entries.expiry is not None:
            offered = offered & (entries.expiry[:, None, :upto] <= positions[..., None])
        kept = None if entries.expiry is None else gone & ~offered
        if self.limit is not None and self.limit < upto:
            offered = offered & (entry > positions[..., None] - self.window - self.limit)
        offers, place, meant = [], None, offered[:, None]
        if upto:
            uneven = entries.expiry is not None or not even or queries < length
            limited = self.limit is not None and self.limit < upto
            common = 0 if uneven or limited else max(start + first - self.window + 1, 0)
            fetched, place, meant = self._fetch(tokens, entries, asking, meant, common, count)
            offers.append(fetched)
        if self.shown:
            low, high = start + first, start + first + queries
            if not even:
                low = max(int(torch.where(positions < 0, high, positions).min()), 0)
            found = self.pyramid.between(low, high, entries.means.offsets, now.device)
            if len(found.node):
                inner = inside(meant, found, self.size) if place is None else fetched_inside(place, meant, found)
                if kept is not None:
                    inner = inner + inside(kept, found, self.size)[:, None]
                offers.append(self._mass(tokens, entries, found, inner, asking, count))
        return offers

    def _fetch(
        self, tokens: Tokens, entries: Entries, asking: Asking, offered: torch.Tensor, common: int, count: int
    ) -> tuple[BlockKeys, torch.Tensor | None, torch.Tensor]:
        """Let each query choose. Only what some query has chosen is looked at further.

        Args:
            offered: bool `[R, 1, Q, S]`. common: entries, the first ones, that are offered to all queries. count:
                blocks that the queries are in.

        Returns:
            what they are offered, the fetched places `[R, G, U]` (None: all), and which each query means, bool
            `[R, G, Q, U]`.
        """
        upto = offered.shape[-1]
        place, meant = None, offered.expand(-1, self.heads, -1, -1)
        if self.candidates is not None and self.candidates < upto:
            with torch.no_grad():
                sketches = entries.sketches[..., :upto].to(asking.sketched.dtype)
                folded = self._by_group(asking.sketched).flatten(2, 3)
                wanted = largest((folded @ sketches).unflatten(2, (-1, offered.shape[-2])))
                wanted = self._aged(wanted, entries, asking, place, upto)
                place, meant = places_of_first(wanted, meant, self.candidates, common)
                common = 0
        if self.fetched < (upto if self.candidates is None else min(self.candidates, upto)):
            with torch.no_grad():
                wide = torch.promote_types(asking.query.dtype, torch.float32)
                keys = at(entries.keys, place, upto).to(wide)
                exact = scores(self._by_group(asking.query).to(wide), keys[:, :, None], tokens.scaling)
                if asking.far is not None:
                    change = self._change(tokens, asking, keys, place)
                    exact = exact if change is None else exact + change
                wanted = self._aged(largest(exact), entries, asking, place, upto)
                among, meant = places_of_first(wanted, meant, self.fetched, common)
                if among is not None:
                    place = among if place is None else place.gather(-1, among)
        keys, values = (at(value, place, upto).to(asking.query.dtype) for value in (entries.keys, entries.values))
        change = None if asking.far is None else self._change(tokens, asking, keys, place)
        bias = keys.new_zeros(()) if change is None else change.flatten(1, 2).to(keys.dtype)
        position = torch.arange(upto, device=keys.device).expand(len(keys), self.heads, -1) if place is None else place
        return _offered(keys, values, position, bias, meant, count), place, meant

    def _aged(self, wanted, entries: Entries, asking: Asking, place: torch.Tensor | None, upto: int) -> torch.Tensor:
        """Return A `[R, G, Q, U]` with the decay of the entries at `place`."""
        if not self.decay:
            return wanted
        # From the newest token that may be stored, so that what is far back alone runs into the end of the scores.
        now = entries.clocks.gather(1, (asking.positions - self.window).clamp(min=0))[:, None, :, None]
        clocks = entries.clocks[:, None, :upto].expand(-1, self.heads, -1)
        return wanted + self.decay * ((clocks if place is None else clocks.gather(-1, place))[:, :, None] - now)

    def _by_group(self, query: torch.Tensor) -> torch.Tensor:
        """`[R, H, Q, D]` to `[R, G, H / G, Q, D]`."""
        return query.unflatten(1, (self.heads, -1))

    def _change(self, tokens: Tokens, asking: Asking, keys: torch.Tensor, place: torch.Tensor | None):
        """Return what `correction` says of keys `[R, G, U, D]`, `[R, G, H / G, Q, U]`; None: nothing is far."""
        if place is None:
            place = torch.arange(keys.shape[2], device=keys.device).expand(keys.shape[:3])
        bound, whole = asking.positions - tokens.far.limit, keys.shape[2]
        bound = bound.masked_fill(asking.positions < tokens.far.start, 0)
        if not torch.compiler.is_compiling():
            some = (place < bound.max()).flatten(0, -2).any(dim=0).nonzero()  # places rise: what is far comes first
            if not len(some):
                return None
            keys, place = (value[:, :, : int(some[-1]) + 1] for value in (keys, place))
        own, other = self._by_group(asking.query), self._by_group(asking.far)
        distant = place[:, :, None] < bound[:, None, :, None]
        change = correction(tokens.far, own, other, keys[:, :, None], place, distant)
        return F.pad(change, (0, whole - change.shape[-1]))

    def _mass(self, tokens: Tokens, entries: Entries, blocks: Blocks, inner, asking: Asking, count: int) -> BlockKeys:
        """Return the blocks, each with the log of how many of its tokens are not there themselves.

        Args:
            inner: `[R, G, Q, N]`, how many are.
        """
        dtype, now = asking.query.dtype, asking.positions[..., None]
        keys, values = (value[:, :, blocks.node].to(dtype) for value in entries.means[:2])
        shown = (blocks.begin <= now) & (now < blocks.end)
        rest = blocks.size - inner
        seen = shown[:, None] & (rest > 0)
        bias = rest.clamp(min=1).to(torch.promote_types(dtype, torch.float32)).log()
        position = (blocks.first + blocks.size - 1).expand(len(keys), self.heads, -1)
        return _offered(keys, values, position, bias.to(dtype), seen, count)

    # What a file may hold, and comparing -----------------------------------------------------------------------------
    def arrange(self, states):
        seen = states["seen"]
        for name in ("stored_keys", "stored_values", "sketches", "surprises"):
            if name in states:
                value, axis = states[name], {"surprises": 1, "sketches": 3}.get(name, 2)
                read = torch.arange(value.shape[axis], device=seen.device) < seen[:, None]
                shape = (len(seen), *(1,) * (axis - 1), -1, *(1,) * (value.dim() - axis - 1))
                states[name] = value.masked_fill(~read.view(shape), 0).narrow(axis, 0, int(seen.max()))
        for name in ("mean_keys", "mean_values"):
            if name in states:
                states[name] = self.pyramid.arranged(states[name], seen)


def _levels_after(pyramid: Pyramid, columns: int) -> int:
    return pyramid.levels(columns - pyramid.window)


def _offered(keys, values, position, bias, seen, count: int) -> BlockKeys:
    """Return keys and values `[R, G, U, D]`, offered to `count` blocks of queries alike.

    Args:
        position: `[R, G, U]`. bias: `[R, G or H, Q, U]` or one number. seen: bool `[R, G, Q, U]`.
    """
    if bias.dim() and bias.shape[1] > seen.shape[1]:
        seen = seen.repeat_interleave(bias.shape[1] // seen.shape[1], dim=1)
    bias = torch.where(seen, bias, -torch.inf).unflatten(2, (count, -1)).transpose(1, 2)
    keys, values, position = (value[:, None].expand(-1, count, *value.shape[1:]) for value in (keys, values, position))
    return BlockKeys(keys, values, None, None, position, bias)


__all__ = ["Storage"]
