"""EideticMemory: what a layer remembers verbatim, the window and the tokens beyond it that it could not predict.

    a token is visible to query t iff s <= t < expiry_s      (`memory_ops`; B'MOJO, Algorithm 1, lines 1 and 4)

Window (short-term) and eidetic memory (long-term) are one part, because a token that passes from one to the other stays
where it lies: a token of the key buffer is in the window if its position is at least `seen - W`, else in the eidetic
memory. Their order means nothing (positions are in the keys), and a new token takes the place of the one that is
forgotten. With M = 0 the part is a sliding window.

Scores fade with age, which is counted in tokens or in what has surprised since (`decay_clock`). A token's clock is its
position, or E_s = e_0 + ... + e_s, summed in float64 from left to right however the text is cut.

Shapes: R rows (B in a cache), T new tokens, S tokens of a context, G key/value heads, D head dim, W window, M slots.
"""

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from .attention_ops import KeySet
from .memory_ops import presence, retention_key, widest
from .parts_bmojo import Left, MemoryPart, Observed, Tokens, require
from .states_bmojo import State, read, take, write


LARGEST_INNOVATION = 2.01  # 2 by its definition; the rest is rounding


class Context(NamedTuple):
    """Tokens from old to new: M slots and W window tokens of a cache (-1 = empty), then the new ones.

    keys, values: `[R, S, G, D]`. positions, innovations, clocks: `[R, S]`; the clocks are the positions, or E.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    innovations: torch.Tensor
    clocks: torch.Tensor


class EideticMemory(MemoryPart):
    """The last W tokens and M surprising ones before them."""

    bounded = True

    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.window, self.slots, self.decay = spec.window, spec.slots, config.eidetic_decay
        self.places = self.window + self.slots
        self.gain = config.innovation_gradient
        self.ages_by_innovation = self.slots > 0 and self.decay > 0 and config.decay_clock == "innovation"

    @classmethod
    def belongs(cls, config, spec):
        return spec.has_attention and spec.window is not None

    def states(self):
        if not self.ages_by_innovation:
            return {}
        return {"clock": State((), "widest"), "clocks": State((self.places,), "widest")}

    def observe(self, tokens: Tokens, layer: Any, left, kernels) -> Observed:
        if tokens.steps:
            return self._step(tokens, layer)
        past = self.recall(layer) if layer is not None and layer.started else None
        context = self._context(tokens, layer, past)
        if tokens.queries <= 0:  # nothing is beyond the window yet
            self._commit(context, None, tokens, layer)
            return Observed()
        gated = context.values
        if context.innovations.requires_grad and self.slots:
            gated = gated * presence(context.innovations, self.gain)[..., None, None].to(gated.dtype)
        context = context._replace(innovations=context.innovations.detach())
        slots, before = (0, tokens.front) if past is None else (self.slots, self.window)
        first = -slots - before
        block = min(tokens.block, tokens.queries)
        valid = context.positions >= 0
        ranked = retention_key(context.innovations, context.clocks, self.decay)
        sizes = (self.window, self.slots, block, tokens.queries, slots, before)
        chosen = kernels.run("expiry", ranked, valid, *sizes)
        coordinate = torch.arange(first, tokens.queries, device=valid.device).expand(valid.shape)
        # A pad sees itself, so that no softmax is empty; nobody else does, because pads come last.
        end = torch.where(valid | (coordinate < 0), chosen.expiry, coordinate + 1)
        everything = KeySet(context.keys, context.values, coordinate, end, context.positions, first)
        local = KeySet(*(value[:, slots:] for value in everything[:5]), -before)
        offers = [(local, (1 - self.window, 0))]
        if gated is not context.values:
            everything = everything._replace(values=gated)
            offers = self._apart(local, gated[:, slots:], block)
        if self.slots:
            offers.append((everything, chosen.slots))
        self._commit(context, chosen.expiry - first, tokens, layer)
        out = Left(*context[:4], chosen.expiry) if tokens.wants_left else None
        return Observed(offers, left=out)

    def _apart(self, local: KeySet, gated: torch.Tensor, block: int) -> list[tuple[KeySet, tuple[int, int]]]:
        """Offer the local tokens in two: as long as they are in the window, and kept ones, whose values are `gated`."""
        left = local.begin + self.window
        offers = [(local._replace(end=torch.minimum(local.end, left)), (1 - self.window, 0))]
        if block > 1:  # else all kept tokens are in the slots when the block starts
            offers.append((local._replace(values=gated, begin=left), (1 - self.window, -self.window)))
        return offers

    # Many tokens -----------------------------------------------------------------------------------------------------
    def recall(self, layer: Any) -> Context:
        """Return what the cache holds of it, by position; empty entries come first."""
        order = layer.positions[:, self.own].argsort(dim=1, stable=True) + self.first
        keys, values = (take(buffer, order) for buffer in layer.by_token())
        positions, innovations = layer.positions.gather(1, order), layer.innovations.gather(1, order)
        clocks = layer.clocks.gather(1, order - self.first) if self.ages_by_innovation else positions
        return Context(keys, values, positions, innovations, clocks)

    def _context(self, tokens: Tokens, layer: Any, past: Context | None) -> Context:
        positions, innovation = tokens.positions(layer), tokens.innovation
        if innovation is None:
            innovation = torch.zeros(positions.shape, dtype=torch.float32, device=positions.device)
        clocks = self._clocks(innovation.detach(), positions, layer) if self.ages_by_innovation else positions
        new = Context(tokens.keys, tokens.values, positions, innovation, clocks)
        if past is None:
            return new
        joined = [torch.cat([old.to(each), each], dim=1) for old, each in zip(past[:4], new)]
        clocks = torch.cat([past.clocks, clocks], dim=1) if self.ages_by_innovation else joined[2]
        return Context(*joined, clocks)

    def _clocks(self, innovation: torch.Tensor, positions: torch.Tensor, layer: Any) -> torch.Tensor:
        """Return E `[R, T]` of the new tokens; a pad has that of the token before it."""
        wide = innovation.to(widest(innovation.device)).masked_fill(positions < 0, 0.0)
        before = wide.new_zeros(len(wide)) if layer is None else layer.clock
        return torch.cat([before[:, None], wide], dim=1).cumsum(dim=1)[:, 1:]

    @torch.no_grad()
    def _commit(self, context: Context, expiry: torch.Tensor | None, tokens: Tokens, layer: Any) -> None:
        """Let the cache hold the window and the eidetic memory as they are after each row's last real token.

        Args:
            expiry: `[R, S]` of the context's tokens, as indices into it; None: no token is beyond the window.
        """
        if layer is None:
            return
        lengths = tokens.real()
        count, total = tokens.query.shape[1], context.positions.shape[1]
        last = total - count + lengths - 1
        keep = (last + 1)[:, None] + torch.arange(-self.window, 0, device=lengths.device)
        if self.slots and expiry is None:
            keep = torch.cat([keep.new_full((len(keep), self.slots), -1), keep], dim=1)
        elif self.slots:
            keep = torch.cat([self._kept(context.positions, expiry, last), keep], dim=1)
        empty, keep = keep < 0, keep.clamp(min=0)
        own, (keys, values) = self.own, layer.by_token()
        keys[:, own] = take(context.keys, keep).to(keys.dtype)
        values[:, own] = take(context.values, keep).to(values.dtype)
        layer.positions[:, own] = context.positions.gather(1, keep).masked_fill(empty, -1)
        layer.innovations[:, own] = context.innovations.gather(1, keep).to(layer.innovations.dtype)
        if self.ages_by_innovation:
            layer.clocks.copy_(context.clocks.gather(1, keep))
            layer.clock.copy_(context.clocks[:, -1])

    def _kept(self, positions: torch.Tensor, expiry: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Return the tokens in the eidetic memory after each row's last real token, oldest first.

        Args:
            positions, expiry: `[R, S]` of the context, expiry as indices into it. last: `[R]` index of the last token.

        Returns:
            `[R, M]` indices into the context, -1 = empty slot.
        """
        count = positions.shape[1]
        index = torch.arange(count, device=positions.device)
        last = last[:, None]
        kept = (positions >= 0) & (index <= last - self.window) & (expiry > last)
        place = torch.where(kept, index, count)
        order = F.pad(place, (0, max(self.slots - count, 0)), value=count).sort(dim=1).values[:, : self.slots]
        return order.masked_fill(order == count, -1)

    # One token -------------------------------------------------------------------------------------------------------
    def _step(self, tokens: Tokens, layer: Any) -> Observed:
        """Put the new token in the place of the one that is forgotten, with fixed shapes; nothing moves."""
        active = None if tokens.lengths is None else tokens.lengths > 0
        known = tokens.counted
        seen = layer.columns if known else layer.seen
        rows = torch.arange(layer.seen.shape[0], device=layer.seen.device)
        leaving = seen - self.window
        full = known and seen >= self.places
        place = self._forgotten(layer, leaving if known else leaving[:, None], full)
        left = self._left(layer, rows, place, active) if tokens.wants_left else None
        for buffer, new in zip(layer.by_token(), (tokens.keys, tokens.values)):
            write(buffer, rows, place, new[:, 0], active)
        write(layer.positions, rows, place, seen, active)
        if tokens.innovation is not None:
            write(layer.innovations, rows, place, tokens.innovation[:, 0], active)
        if self.ages_by_innovation:
            new = tokens.innovation[:, 0].to(layer.clock.dtype)
            layer.clock += new if active is None else new.masked_fill(~active, 0.0)
            write(layer.clocks, rows, place - self.first, layer.clock, active)
        return Observed(full=known and seen + 1 >= self.places, left=left)

    def _forgotten(self, layer: Any, leaving: torch.Tensor | int, full: bool) -> torch.Tensor:
        """Return the entry `[B]` of the key buffer whose token the next one replaces (Algorithm 1, line 4).

        Up for it are an empty entry, the kept tokens, and the one that leaves the window, at position `leaving`, a
        number or `[B, 1]`. The weakest goes: the smallest retention key, among equals the youngest. full: no entry is
        empty.
        """
        positions = layer.positions[:, self.own]
        clocks = layer.clocks if self.ages_by_innovation else positions
        ranked = retention_key(layer.innovations[:, self.own], clocks, self.decay)
        ranked = ranked.masked_fill(positions > leaving, torch.inf)
        if not full:
            # An empty entry, position -1, counts as the weakest and the youngest: the sign bit goes.
            ranked = ranked.masked_fill(positions < 0, -torch.inf)
            positions = positions & torch.iinfo(positions.dtype).max
        weakest = ranked == ranked.amin(dim=1, keepdim=True)
        return torch.where(weakest, positions, -1).argmax(dim=1) + self.first

    def _left(self, layer: Any, rows: torch.Tensor, place: torch.Tensor, active: torch.Tensor | None) -> Left:
        """Return the token that lies where the next one goes: copies, because it is about to be overwritten."""
        positions, innovations = (read(buffer, rows, place)[:, None] for buffer in (layer.positions, layer.innovations))
        if active is not None:
            positions = positions.masked_fill(~active[:, None], -1)
        keys, values = (read(buffer, rows, place)[:, None] for buffer in layer.by_token())
        return Left(keys, values, positions, innovations, torch.zeros_like(positions))

    def arrange(self, states):
        own = self.own
        order = states["positions"][:, own].argsort(dim=1)
        empty = states["positions"][:, own].gather(1, order) < 0
        for name in ("positions", "innovations"):
            states[name][:, own] = states[name][:, own].gather(1, order)
        states["innovations"][:, own] = states["innovations"][:, own].masked_fill(empty, 0.0)
        if self.ages_by_innovation:
            states["clocks"] = states["clocks"].gather(1, order).masked_fill(empty, 0.0)
        for name in ("keys", "values"):
            entries = take(states[name].transpose(1, 2)[:, own], order).masked_fill(empty[..., None, None], 0.0)
            states[name][:, :, own] = entries.transpose(1, 2)

    # What a file may hold --------------------------------------------------------------------------------------------
    def check(self, states, seen):
        """Check that the last W tokens are there, each once; before them older ones, as many as have room."""
        innovations = states["innovations"][:, self.own]
        seen = seen[:, None]
        newest = states["positions"][:, self.own].sort(dim=1, descending=True).values
        rank = torch.arange(self.places, device=seen.device)
        filled, recent = rank < seen, rank < seen.clamp(max=self.window)
        rules = {
            "hold a position below -1": newest < -1,
            "hold a position beyond the tokens read": newest >= seen,
            "do not hold as many tokens as there is room for": (newest >= 0) != filled,
            "do not hold the last tokens, each once": recent & (newest != seen - 1 - rank),
            "hold a token twice": filled[:, 1:] & (newest[:, 1:] == newest[:, :-1]),
        }
        require(rules, "'positions' of window and memory")
        rules = {
            "are negative": innovations < 0,
            "are larger than an innovation can be, 2": innovations > LARGEST_INNOVATION,
        }
        require(rules, "'innovations'")
        if self.ages_by_innovation:
            beyond = states["clocks"] > states["clock"][:, None]
            require({"are negative or beyond 'clock'": (states["clocks"] < 0) | beyond}, "'clocks'")


__all__ = ["EideticMemory"]
