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

from .attention_ops import BlockKeys, Lazy
from .distance_bmojo import correction, in_blocks_of, scores
from .eidetic_bmojo import EideticMemory
from .fields_bmojo import is_int, reject, require_int, require_number
from .memory_ops import NEVER, widest
from .parts_bmojo import MemoryPart, Observed, Tokens
from .states_bmojo import State, append, grow, take
from .storage_ops import Blocks, blocks_between, first_by, inside, inside_of, places_of_first, pooled


class Entries(NamedTuple):
    """Everything that was read, entry = position.

    keys, values: `[R, G, S, D]`. sketches: `[R, G, S, r]` or None. clocks: `[R, S]`, E of each token, or None.
    mean_keys, mean_values: `[R, G, N', D]`, by `Blocks.node`, or None. expiry: `[R, S]`, the position from which on a
    token is in none of the other memories, or None: W after it.
    """

    keys: torch.Tensor
    values: torch.Tensor
    sketches: torch.Tensor | None
    clocks: torch.Tensor | None
    mean_keys: torch.Tensor | None
    mean_values: torch.Tensor | None
    expiry: torch.Tensor | None


class Storage(MemoryPart):
    """Every token read, of which a query fetches K, and the mass of the others."""

    bounded = True

    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.fetched, self.candidates = spec.stored, config.storage_candidates
        self.limit, self.decay = config.storage_limit, config.storage_decay
        self.sketch_size = config.storage_sketch_size
        self.window, self.size, self.shown = spec.window, spec.stride, spec.blocks
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
        if config.fading_mass and config.fading_size and config.fading_stride < 2:
            reject("fading_stride", config.fading_stride, "must be >= 2 with fading_mass", "e.g. 16 tokens a block")

    @classmethod
    def belongs(cls, config, spec):
        return spec.stored > 0

    def states(self):
        entry = State((self.heads, 0, self.head_dim), grows=1)
        found = {"stored_keys": entry, "stored_values": entry}
        if self.sketch_size:
            found["sketches"] = State((self.heads, 0, self.sketch_size), "byte", grows=1)
        if self.decay:
            found |= {"surprise": State((), "widest"), "surprises": State((0,), "widest", grows=0)}
        if self.shown:
            # A tree of blocks has two nodes per block.
            mean = State((self.heads, 0, self.head_dim), grows=1, stride=self.size // 2)
            found |= {"mean_keys": mean, "mean_values": mean}
        return found

    def observe(self, tokens: Tokens, layer: Any, left, kernels) -> Observed:
        entries = self._take_in(tokens, layer)
        if tokens.queries <= 0:
            return Observed()
        positions = tokens.positions(layer)
        now = positions[:, tokens.front :]
        if tokens.steps and not torch.compiler.is_compiling():
            offers = self._step(tokens, layer, entries, now)
            return Observed([Lazy(sum(each.keys.shape[3] for each in offers), lambda blocks: offers)])
        # Where the first query stands in the row that has read most, so that a number says what is offered at most.
        last = positions.shape[1] + (0 if layer is None else layer.columns)
        start = last - tokens.queries
        entries = entries._replace(expiry=self._expiry(tokens, layer, left, now, entries.keys.shape[2]))
        block = min(tokens.block, tokens.queries)
        width = max(last - self.window, 0) + (2 * self.shown + 2 if self.shown else 0)
        even = tokens.lengths is None and (layer is None or layer.even)
        make = functools.partial(self._offer, tokens, entries, now, start, even, block)
        return Observed([Lazy(width, make)])

    # Taking in -------------------------------------------------------------------------------------------------------
    def _take_in(self, tokens: Tokens, layer: Any) -> Entries:
        sketches = None if tokens.sketches is None else tokens.sketches[0].transpose(1, 2)
        keys, values = tokens.keys.transpose(1, 2), tokens.values.transpose(1, 2)
        clocks = self._clocks(tokens, layer)
        if layer is not None:
            self._write(tokens, layer, sketches, clocks)
        means = (None, None)
        if layer is None or not layer.started:
            if self.shown:
                means = self._tree(keys), self._tree(values)
        else:
            upto = layer.columns + keys.shape[2]
            keys, values = self._joined(tokens, layer, upto)
            sketches = None if sketches is None else layer.sketches[:, :, :upto]
            clocks = None if clocks is None else layer.surprises[:, :upto]
            if self.shown and tokens.needs_grad:
                means = self._tree(keys), self._tree(values)
            elif self.shown:
                means = layer.mean_keys, layer.mean_values
        return Entries(keys, values, sketches, clocks, *means, None)

    def _joined(self, tokens: Tokens, layer: Any, upto: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all keys and values, differentiable in the new ones if a gradient is wanted."""
        found = []
        for stored, new in ((layer.stored_keys, tokens.keys), (layer.stored_values, tokens.values)):
            part = stored[:, :, :upto].to(new.dtype)
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
        if not self.decay:
            return None
        pads = tokens.positions(layer) < 0
        wide = tokens.innovation.to(widest(pads.device)).masked_fill(pads, 0.0)
        before = wide.new_zeros(len(wide)) if layer is None else layer.surprise
        return torch.cat([before[:, None], wide], dim=1).cumsum(dim=1)[:, 1:]

    @torch.no_grad()
    def _write(self, tokens: Tokens, layer: Any, sketches: torch.Tensor | None, clocks: torch.Tensor | None) -> None:
        count = tokens.keys.shape[1]
        upto = layer.columns + count
        _, index = self._places(tokens, layer)
        new = {"stored_keys": tokens.keys, "stored_values": tokens.values}
        if sketches is not None:
            new["sketches"] = sketches.transpose(1, 2)
        for name, value in new.items():
            setattr(layer, name, grow(getattr(layer, name), 2, upto))
            append(getattr(layer, name).transpose(1, 2), index, value)
        if clocks is not None:
            layer.surprises = grow(layer.surprises, 1, upto)
            append(layer.surprises, index, clocks)
            layer.surprise.copy_(clocks[:, -1])
        if self.shown:
            self._extend_means(tokens, layer, upto)

    # Means of blocks -------------------------------------------------------------------------------------------------
    def _tree(self, entries: torch.Tensor) -> torch.Tensor:
        """Means of all complete blocks of entries `[R, G, S, D]`, `[R, G, N', D]` by `Blocks.node`."""
        whole = entries.shape[2] // self.size
        wide = torch.promote_types(entries.dtype, torch.float32)
        level = entries[:, :, : whole * self.size].unflatten(2, (whole, self.size)).to(wide).mean(dim=3)
        nodes, found, height = [], [], 0
        while level.shape[2]:
            nodes.append(torch.arange(level.shape[2], device=level.device) * (2 << height) + (1 << height) - 1)
            found.append(level.to(entries.dtype))
            pairs = level.shape[2] // 2
            level = found[-1][:, :, : 2 * pairs].unflatten(2, (pairs, 2)).to(wide).mean(dim=3)
            height += 1
        if not found:
            return entries[:, :, :0]
        tree = found[0].new_zeros(*entries.shape[:2], 2 * whole, entries.shape[3])
        return tree.index_copy(2, torch.cat(nodes), torch.cat(found, dim=2))

    def _extend_means(self, tokens: Tokens, layer: Any, upto: int) -> None:
        """Write the means of the blocks that the new tokens complete, level by level."""
        before, after = layer.seen, layer.seen + tokens.real()
        layer.mean_keys, layer.mean_values = (
            grow(value, 2, upto // (self.size // 2) + 2) for value in (layer.mean_keys, layer.mean_values)
        )
        size, level = self.size, 0
        while size <= upto:
            first, count = before // size, after // size - before // size
            most = tokens.keys.shape[1] // size + 1
            if layer.even and tokens.lengths is None:
                most = upto // size - layer.columns // size
            number = first[:, None] + torch.arange(most, device=first.device)
            done = torch.arange(most, device=first.device) < count[:, None]
            if most == 0:
                break  # no block of a larger size either
            pairs = (layer.stored_keys, layer.mean_keys), (layer.stored_values, layer.mean_values)
            for stored, means in pairs:
                place = number * (2 << level) + (1 << level) - 1
                place = torch.where(done, place, means.shape[2] - 1)  # a place that belongs to nobody yet
                if level == 0:
                    parts = number[..., None] * size + torch.arange(size, device=number.device)
                    source, limit = stored, stored.shape[2] - 1
                else:
                    half = 1 << (level - 1)
                    parts = 2 * number[..., None] + torch.arange(2, device=number.device)
                    parts, source, limit = parts * (2 * half) + half - 1, means, means.shape[2] - 1
                found = take(source.transpose(1, 2), parts.clamp(max=limit).flatten(1)).unflatten(1, parts.shape[1:])
                wide = torch.promote_types(found.dtype, torch.float32)
                append(means.transpose(1, 2), place, found.to(wide).mean(dim=2))
            size, level = 2 * size, level + 1

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
        self, tokens: Tokens, entries: Entries, now: torch.Tensor, start: int, even: bool, block: int, blocks: slice
    ) -> list[BlockKeys]:
        """Return what the queries of some blocks are offered.

        Args:
            now: `[R, T - front]` positions, -1 for a pad. start: the position of the first query in the row that has
                read most. even: in every row.
        """
        count, first = blocks.stop - blocks.start, blocks.start * block
        queries = min(count * block, now.shape[1] - first)
        place = tokens.front + first
        query = in_blocks_of(tokens.query[:, : tokens.front + first + queries], place, 1, count * block)[:, 0]
        positions = torch.nn.functional.pad(now[:, first : first + queries], (0, count * block - queries), value=-1)
        upto = min(max(start + first + queries - self.window, 0), entries.keys.shape[2])
        far = None
        if tokens.far is not None:
            far = in_blocks_of(tokens.far.query[:, : tokens.front + first + queries], place, 1, count * block)[:, 0]
        offers = []
        entry = torch.arange(upto, device=now.device)
        gone = offered = entry <= positions[..., None] - self.window  # [R, Q, S]
        if entries.expiry is not None:
            offered = offered & (entries.expiry[:, None, :upto] <= positions[..., None])
        kept = None if entries.expiry is None else gone & ~offered
        if self.limit is not None:
            offered = offered & (entry > positions[..., None] - self.window - self.limit)
        keys, values = entries.keys[:, :, :upto], entries.values[:, :, :upto]
        exact, change = scores(query, keys, tokens.scaling), None
        if far is not None:
            distant = gone & (entry < positions[..., None] - tokens.far.limit)
            change = correction(tokens.far, query, far, keys, entry.expand(len(keys), -1), distant)
            exact = exact + change.to(exact.dtype)
        with torch.no_grad():
            fetched = self._choose(tokens, entries, exact, offered, entry, place, count * block)
        if upto:
            bias = torch.zeros((), dtype=query.dtype, device=query.device) if change is None else change.to(query.dtype)
            offers.append(_offered(keys, values, entry, bias, fetched, count))
        if self.shown:
            low, high = start + first, start + first + queries
            if not even:
                low = int(torch.where(positions < 0, high, positions).min())
            found = blocks_between(low, high, self.window, self.size, self.shown, now.device)
            if len(found.node):
                there = fetched if kept is None else fetched | kept[:, None]
                inner = inside(there, found, self.size)
                offers.append(self._mass(tokens, entries, found, inner, query, far, positions, count))
        return offers

    # One token -------------------------------------------------------------------------------------------------------
    def _step(self, tokens: Tokens, layer: Any, entries: Entries, now: torch.Tensor) -> list[BlockKeys]:
        """Return what the only query is offered: the fetched tokens by themselves, without a look at the other keys.

        Args:
            now: `[R, 1]` positions, -1 for a pad.
        """
        upto = layer.columns + 1 - self.window
        if upto <= 0:
            return []
        query, offers = tokens.query.transpose(1, 2), []  # [R, H, 1, D]
        far = None if tokens.far is None else tokens.far.query.transpose(1, 2)
        entry = torch.arange(upto, device=now.device)
        offered = entry <= now[..., None] - self.window  # [R, 1, S]
        held = None
        if self.takes_left:
            held = layer.positions[:, layer.memory.part(EideticMemory).own]
            taken = torch.zeros(len(held), upto + 1, dtype=torch.bool, device=held.device)
            taken.scatter_(1, torch.where((held < 0) | (held >= upto), upto, held), True)
            offered = offered & ~taken[:, None, :-1]
        if self.limit is not None:
            offered = offered & (entry > now[..., None] - self.window - self.limit)
        place, meant = entry.expand(len(now), self.heads, 1, -1), offered[:, None].expand(-1, self.heads, -1, -1)
        if self.candidates is not None and self.candidates < upto:
            asked = tokens.sketches[1].transpose(1, 2)
            wanted = pooled(scores(asked, entries.sketches[:, :, :upto].to(asked.dtype), 1.0), self.heads)
            place, meant = places_of_first(self._aged(wanted, entries, place), offered[:, None], self.candidates)
        keys = self._at(entries.keys, place, upto).to(query.dtype)
        if self.fetched < place.shape[-1]:
            exact = scores(self._by_group(query), keys[:, :, None], tokens.scaling)
            if far is not None:
                exact = exact + self._change(tokens, query, far, keys, place, now)
            wanted = pooled(exact.flatten(1, 2), self.heads)
            among, meant = places_of_first(self._aged(wanted, entries, place), meant, self.fetched)
            place = place.gather(-1, among)
            keys = keys.gather(2, among[:, :, 0, :, None].expand(-1, -1, -1, keys.shape[-1]))
        values = self._at(entries.values, place, upto).to(query.dtype)
        bias = torch.zeros((), dtype=query.dtype, device=query.device)
        seen = meant
        if far is not None:
            bias = self._change(tokens, query, far, keys, place, now).flatten(1, 2).to(query.dtype)
            seen = seen.repeat_interleave(query.shape[1] // self.heads, dim=1)
        bias = torch.where(seen, bias, -torch.inf)[:, None]
        offers.append(BlockKeys(keys[:, None], values[:, None], None, None, place[:, None, :, 0], bias))
        if self.shown:
            low = layer.columns if layer.even and tokens.lengths is None else max(int(now.min()), 0)
            found = blocks_between(low, layer.columns + 1, self.window, self.size, self.shown, now.device)
            if len(found.node):
                there = torch.where(meant, place, -1)
                if held is not None:
                    held = held[:, None, None].expand(-1, self.heads, 1, -1)
                    there = torch.cat([there, held], dim=-1)
                inner = inside_of(there, found)
                offers.append(self._mass(tokens, entries, found, inner, query, far, now, 1))
        return offers

    def _aged(self, wanted: torch.Tensor, entries: Entries, place: torch.Tensor) -> torch.Tensor:
        """Return A `[R, G, 1, S]` with the decay of the entries at `place`."""
        if not self.decay:
            return wanted
        clocks = entries.clocks[:, None, None].expand(-1, self.heads, 1, -1).gather(-1, place)
        return wanted + self.decay * clocks

    def _by_group(self, query: torch.Tensor) -> torch.Tensor:
        """`[R, H, 1, D]` to `[R, G, H / G, 1, D]`."""
        return query.unflatten(1, (self.heads, -1))

    def _change(self, tokens, query, far, keys, place, now) -> torch.Tensor:
        """Return what `correction` says of gathered keys `[R, G, k, D]`, `[R, G, H / G, 1, k]`."""
        place = place[:, :, 0]
        distant = (place < now[..., None] - tokens.far.limit)[:, :, None]
        own, other = self._by_group(query), self._by_group(far)
        return correction(tokens.far, own, other, keys[:, :, None], place, distant)

    @staticmethod
    def _at(entries: torch.Tensor, place: torch.Tensor, upto: int) -> torch.Tensor:
        """Entries `[R, G, S, D]` at places `[R, G, 1, k]`: `[R, G, k, D]`."""
        if place.shape[-1] == upto:
            return entries[:, :, :upto]
        return entries.gather(2, place[:, :, 0, :, None].expand(-1, -1, -1, entries.shape[-1]))

    def _choose(self, tokens, entries, exact, offered, entry, place, queries) -> torch.Tensor:
        """Return which entries each query fetches, bool `[R, G, Q, S]`."""
        upto = len(entry)
        offered, bias = offered[:, None], None
        if self.decay:
            bias = (self.decay * entries.clocks[:, None, None, :upto]).to(torch.float64)
        if self.candidates is not None and self.candidates < upto:
            asked = in_blocks_of(tokens.sketches[1], place, 1, queries)[:, 0]
            found = scores(asked, entries.sketches[:, :, :upto].to(asked.dtype), 1.0)
            wanted = pooled(found, self.heads)
            wanted = wanted if bias is None else wanted + bias
            offered = first_by(wanted, offered, self.candidates)
        if self.fetched >= upto:
            return offered.expand(-1, self.heads, -1, -1)
        wanted = pooled(exact, self.heads)
        return first_by(wanted if bias is None else wanted + bias, offered, self.fetched)

    def _mass(self, tokens, entries, blocks: Blocks, inner, query, far, positions, count: int) -> BlockKeys:
        """Return the blocks, each with the log of how many of its tokens are not there themselves.

        Args:
            inner: `[R, G, Q, N]`, how many are.
        """
        keys, values = (value[:, :, blocks.node].to(query.dtype) for value in (entries.mean_keys, entries.mean_values))
        now = positions[..., None]
        shown = (blocks.begin <= now) & (now < blocks.end)
        rest = blocks.size - inner
        seen = shown[:, None] & (rest > 0)
        bias = rest.clamp(min=1).to(torch.promote_types(query.dtype, torch.float32)).log()
        if far is not None:
            distant = shown & (now - blocks.first > tokens.far.limit)
            change = correction(tokens.far, query, far, keys, blocks.first.expand(len(keys), -1), distant)
            bias = bias.repeat_interleave(query.shape[1] // bias.shape[1], dim=1) + change.to(query.dtype)
        return _offered(keys, values, blocks.first + blocks.size - 1, bias, seen, count)

    # What a file may hold, and comparing -----------------------------------------------------------------------------
    def arrange(self, states):
        seen = states["seen"]
        for name in ("stored_keys", "stored_values", "sketches", "surprises"):
            if name in states:
                value, axis = states[name], 1 if name == "surprises" else 2
                read = torch.arange(value.shape[axis], device=seen.device) < seen[:, None]
                shape = (len(seen), *(1,) * (axis - 1), -1, *(1,) * (value.dim() - axis - 1))
                states[name] = value.masked_fill(~read.view(shape), 0).narrow(axis, 0, int(seen.max()))
        for name in ("mean_keys", "mean_values"):
            if name in states:
                value, most = states[name], 2 * (int(seen.max()) // self.size)
                node = torch.arange(value.shape[2], device=seen.device)
                level = _level(node)
                ends = ((node >> (level + 1)) + 1) * (self.size << level)
                done = ends <= seen[:, None]
                states[name] = value.masked_fill(~done[:, None, :, None], 0)[:, :, :most]


def _offered(keys, values, position, bias, seen, count: int) -> BlockKeys:
    """Return keys and values `[R, G, S, D]`, offered to `count` blocks of queries alike.

    Args:
        position: `[S]`. bias: `[R, G or H, Q, S]` or one number. seen: bool `[R, G, Q, S]`.
    """
    if bias.dim() and bias.shape[1] > seen.shape[1]:
        seen = seen.repeat_interleave(bias.shape[1] // seen.shape[1], dim=1)
    bias = torch.where(seen, bias, -torch.inf).unflatten(2, (count, -1)).transpose(1, 2)
    keys, values = (value[:, None].expand(-1, count, -1, -1, -1) for value in (keys, values))
    return BlockKeys(keys, values, None, None, position.expand(len(keys), count, -1), bias)


def _level(node: torch.Tensor) -> torch.Tensor:
    """How many ones a node's number ends in: its level in the tree."""
    level, rest = torch.zeros_like(node), node.clone()
    for _ in range(62):
        ones = rest & 1
        level += ones
        rest = torch.where(ones > 0, rest >> 1, 0)
        if not bool(rest.any()):
            break
    return level


__all__ = ["Storage"]
