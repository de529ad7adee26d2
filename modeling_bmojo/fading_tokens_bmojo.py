"""FadingTokens: SSM outputs as tokens that the attention sees (B'MOJO, Algorithm 1, line 5).

    query t sees fading token y_p, p = s - 1, 2 s - 1, ..., iff p + d <= t < p + d + F s

With d = W, the paper's form, they are those just beyond the window; with d = 0 and s = 1 a query sees what the SSM
answers to its own token. Fading token i is made at position (i + 1) s - 1, so n tokens make n // s. The d / s that are
not yet shown wait in a delay line, if there are any; it and the visible ones in the key buffer are rings: number i lies
at place i mod size.

Shapes: R rows (B in a cache), n fading tokens, G key/value heads, D head dim, W window, F fading tokens, s stride, d
delay.
"""

from typing import Any, NamedTuple

import torch

from .attention_ops import KeySet
from .memory_ops import NEVER
from .parts_bmojo import MemoryPart, Observed, Tokens, require
from .states_bmojo import State, read, take, write


class FadingContext(NamedTuple):
    """Fading tokens from old to new: those of a cache (visible, then delayed), then the new ones.

    keys, values: `[R, n, G, D]`. positions: `[R, n]`, each s after the one before it, negative = empty.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor


class FadingTokens(MemoryPart):
    """The F fading tokens, shown d tokens after they were made (the paper: W, so beyond the window)."""

    bounded = True

    def __init__(self, config, spec):
        super().__init__(config, spec)
        self.delay, self.stride, self.delayed = spec.waits, spec.stride, spec.delayed
        self.places = spec.fading
        self.heads, self.head_dim = config.num_key_value_heads, config.head_dim

    @classmethod
    def belongs(cls, config, spec):
        return spec.fading > 0

    def states(self):
        return dict.fromkeys(self.delay_line, State((self.delayed, self.heads, self.head_dim)))

    @property
    def delay_line(self) -> tuple[str, ...]:
        """Names of the states in which those that are not yet shown wait; none where each is shown at once."""
        return ("delay_keys", "delay_values") if self.delayed else ()

    def _waiting(self, layer: Any) -> list[torch.Tensor]:
        return [getattr(layer, name) for name in self.delay_line]

    def observe(self, tokens: Tokens, layer: Any, left, kernels) -> Observed:
        if tokens.steps:
            return self._step(tokens, layer)
        if tokens.fading is None:
            return Observed()
        past = self.recall(layer) if layer is not None and layer.started else None
        context = self._context(tokens, layer, past)
        if context.keys.shape[1] == 0:
            return Observed()
        offers = [self._offer(tokens, layer, context)] if tokens.queries > 0 else []
        if layer is not None:
            self._commit(context, tokens, layer, past)
        return Observed(offers)

    def makes_one(self, counted: bool, layer: Any) -> bool:
        """Whether the next token may make a fading token, as far as that is known without looking at tensors.

        Args:
            counted: a number says what every row has read (`Tokens.counted`).
        """
        return not counted or (layer.columns + 1) % self.stride == 0

    # Many tokens -----------------------------------------------------------------------------------------------------
    def recall(self, layer: Any) -> FadingContext:
        """Return what the cache holds of them."""
        count = (layer.seen // self.stride)[:, None]
        visible = (count - self.delayed + torch.arange(self.places, device=count.device)) % self.places
        keys, values = (take(buffer, visible + self.first) for buffer in layer.by_token())
        if self.delayed:
            delay = (count + torch.arange(self.delayed, device=count.device)) % self.delayed
            waiting = (take(ring, delay) for ring in self._waiting(layer))
            keys, values = (torch.cat(both, dim=1) for both in zip((keys, values), waiting))
        number = count + torch.arange(-self.places - self.delayed, 0, device=count.device)
        return FadingContext(keys, values, (number + 1) * self.stride - 1)

    def _context(self, tokens: Tokens, layer: Any, past: FadingContext | None) -> FadingContext:
        keys, values = tokens.fading
        seen = torch.zeros(len(keys), dtype=torch.int64, device=keys.device) if layer is None else layer.seen
        number = (seen // self.stride)[:, None] + torch.arange(keys.shape[1], device=keys.device)
        new = FadingContext(keys, values, (number + 1) * self.stride - 1)
        if past is None:
            return new
        return FadingContext(*(torch.cat([old.to(each), each], dim=1) for old, each in zip(past, new)))

    def _offer(self, tokens: Tokens, layer: Any, context: FadingContext):
        """Return the fading tokens as a set, and which of them each block of queries is offered: those made from d to
        d + F s - 1 tokens ago. Entries behind a row's last token are seen by pads alone."""
        block, reach = min(tokens.block, tokens.queries), self.places * self.stride
        positions = context.positions
        start = tokens.front if layer is None else layer.seen[:, None] + tokens.front
        count, coordinate = positions.shape[1], positions - start
        if self.stride == 1:
            offered = (1 - self.delay - reach, -self.delay)
        else:
            # Block j sees those after j L - d - F s, the first of which is number `oldest`, until its last query.
            blocks = torch.arange(0, tokens.queries, block, device=positions.device)
            oldest = (blocks - self.delay - reach - coordinate[:, :1]).div(self.stride, rounding_mode="floor") + 1
            width = self.places - (1 - block) // self.stride
            offered = oldest[..., None] + torch.arange(width, device=positions.device)
            offered = torch.where((offered >= 0) & (offered < count), offered, -1)
        begin = coordinate + self.delay
        end = torch.where(positions >= 0, begin + reach, -NEVER)
        return KeySet(context.keys, context.values, begin, end, positions, tokens.queries - count), offered

    @torch.no_grad()
    def _commit(self, context: FadingContext, tokens: Tokens, layer: Any, past: FadingContext | None) -> None:
        """Let the cache hold the visible and the delayed ones as they are after each row's last real token."""
        before, after = (layer.seen // self.stride)[:, None], ((layer.seen + tokens.real()) // self.stride)[:, None]
        start = (0 if past is None else past.positions.shape[1]) + after - before
        # Place r of a ring of size n whose last token is e - 1 holds the (r - e mod n)-th of the n tokens up to e.
        place = torch.arange(self.places, device=after.device)
        visible = start - self.delayed - self.places + (place - after + self.delayed) % self.places
        empty, visible = visible < 0, visible.clamp(min=0)
        own, made = self.own, (context.keys, context.values)
        for buffer, new in zip(layer.by_token(), made):
            buffer[:, own] = take(new, visible).to(buffer.dtype)
        if self.delayed:
            delay = start - self.delayed + (torch.arange(self.delayed, device=after.device) - after) % self.delayed
            for ring, new in zip(self._waiting(layer), made):
                ring.copy_(take(new, delay.clamp(min=0)))
        layer.positions[:, own] = context.positions.gather(1, visible).masked_fill(empty, -1).clamp(min=-1)

    # One token -------------------------------------------------------------------------------------------------------
    def _step(self, tokens: Tokens, layer: Any) -> Observed:
        """Let a fading token that the new token makes join the delay line, and the one that it replaces there, d tokens
        older, become visible; without a delay that is the new one itself."""
        known = tokens.counted
        seen = layer.columns if known else layer.seen
        leaving = seen - self.delay
        if tokens.fading is not None:
            active = None if tokens.lengths is None else tokens.lengths > 0
            number = seen // self.stride
            visible = (number - self.delayed) % self.places + self.first
            if known:
                position = max(leaving, -1)
            else:
                position = leaving.clamp(min=-1)
                due = (seen + 1) % self.stride == 0
                active = due if active is None else active & due
            rows = torch.arange(layer.seen.shape[0], device=layer.seen.device)
            delayed = number % self.delayed if self.delayed else None
            for buffer, ring, new in zip(layer.by_token(), self._waiting(layer) or (None, None), tokens.fading):
                write(buffer, rows, visible, new[:, 0] if ring is None else read(ring, rows, delayed), active)
                if ring is not None:
                    write(ring, rows, delayed, new[:, 0], active)
            write(layer.positions, rows, visible, position, active)
        return Observed(full=known and (leaving + 1) // self.stride >= self.places)

    def arrange(self, states):
        own, count = self.own, (states["seen"] // self.stride)[:, None]
        empty = states["positions"][:, own] < 0
        for name in ("keys", "values"):
            states[name][:, :, own] = states[name][:, :, own].masked_fill(empty[:, None, :, None], 0.0)
        if not self.delayed:
            return
        empty = count < self.delayed - (torch.arange(self.delayed, device=count.device) - count) % self.delayed
        for name in self.delay_line:
            states[name] = states[name].masked_fill(empty[..., None, None], 0.0)

    # What a file may hold --------------------------------------------------------------------------------------------
    def check(self, states, seen):
        """Place r holds the newest fading token that is shown whose number is r mod F, at (number + 1) s - 1."""
        newest = (seen // self.stride - self.delayed - 1)[:, None]
        place = torch.arange(self.places, device=seen.device)
        number = newest - (newest - place) % self.places
        expected = torch.where(number >= 0, (number + 1) * self.stride - 1, -1)
        own = self.own
        wrong = states["positions"][:, own] != expected
        require({"do not follow from the tokens read": wrong}, "'positions' of fading tokens")
        require({"are not 0 for fading tokens": states["innovations"][:, own] != 0}, "'innovations'")


__all__ = ["FadingTokens"]
