"""One layer's memory: its states, how tokens enter them in blocks and one at a time, and what transformers asks of it.

States (sizes in `LayerSpec`), with `seen` = real tokens of each row so far; pads are never counted:

    keys, values    [B, G, F + M + W, D]   visible fading tokens | pool of eidetic and window tokens: what a query sees
    positions       [B, F + M + W]         position of each entry in its row, -1 = empty
    innovations     [B, F + M + W]         e of the pool's tokens (0 for fading tokens)
    delay_*         [B, W / s, G, D]       keys and values of fading tokens not yet beyond the window (F > 0)
    outputs         [B, k, E]              last k SSM outputs, for the predictor of `innovation="output"`
    key_sum         [B, G, D]              sum of all keys without positions, for `innovation="key"`; float64
    conv            [B, K - 1, C]          last inputs of the SSM's convolution
    ssm             [B, H, P, N]           SSM state (S6: H P channels), fp32 (fp64 for fp64 models) in any dtype
    pads            [B]                    first layer only: fingerprint of the pads (`cache_pads_bmojo`); None: no pads
    last_hidden     [B, E]                 last layer only: the model's output for the last real token

A pool token is in the window if its position is at least `seen - W`, else in the eidetic memory. Their order means
nothing (positions are in the keys), so a token that moves from window to memory stays where it is, and a new one takes
the place of the one that is forgotten. Fading token i is made at position (i + 1) s - 1, so n tokens make n // s;
delay line and visible fading tokens are rings: number i sits in slot i mod size. A full-attention layer keeps every
token: `keys`, `values` `[B, G, capacity, D]`, position = slot.

`keys` and `values` stand head by head, as in transformers' caches and as attention reads them; tokens come and go as
`[B, T, G, D]`, like everywhere else in this package.
"""

from typing import NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin

from .configuration_bmojo import LayerSpec
from .memory_ops import retention_key, widest


GROWTH = 256  # tokens by which a full-attention layer's buffer grows at least


class Past(NamedTuple):
    """Tokens of a windowed layer in reading order, for reading many tokens at once.

    What a cache recalls: keys, values `[B, M + W, G, D]`, positions (-1 = empty), innovations `[B, M + W]`; the fading
    tokens (visible, then delayed) `[B, F + W / s, G, D]` and their positions (each s after the one before it, negative
    = empty), or None. New tokens come behind.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    innovations: torch.Tensor
    fading_keys: torch.Tensor | None
    fading_values: torch.Tensor | None
    fading_positions: torch.Tensor | None


class BMojoCacheLayer(CacheLayerMixin):
    """All states of one layer. Written by the model; every operation treats every state alike, by `states()`.

    Where gradients are off it is by a block and not by a decorator: torch.compile cannot enter a decorated method of an
    object that is made inside the compiled code, as a model's own cache is.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    STATES = (
        "keys",
        "values",
        "positions",
        "innovations",
        "delay_keys",
        "delay_values",
        "outputs",
        "key_sum",
        "conv",
        "ssm",
        "seen",
        "pads",
        "last_hidden",
    )

    def __init__(self, spec: LayerSpec):
        super().__init__()
        self.spec = spec
        self.columns = 0  # columns of input read, pads included: what transformers calls the sequence length
        self.even = True  # no pad was ever read, so that `seen` is `columns` in every row
        self.unfinished = False  # first layer only: whoever wrote to the layers has not come to an end
        self.device: torch.device | None = None
        for name in self.STATES:
            setattr(self, name, None)

    @property
    def started(self) -> bool:
        """Whether anything was read."""
        return self.columns > 0

    @property
    def made(self) -> torch.Tensor:
        """Fading tokens made so far, `[B]`."""
        return self.seen // self.spec.stride

    # --- allocation -------------------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Allocates every state for the batch size, dtype and device of `key_states` `[B, ...]`."""
        spec, batch = self.spec, key_states.shape[0]
        dtype, self.device = key_states.dtype, key_states.device
        wide = torch.promote_types(dtype, torch.float32)

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(batch, *shape, dtype=dtype, device=self.device)

        self.seen = torch.zeros(batch, dtype=torch.int64, device=self.device)
        if spec.has_attention and spec.window is None:
            self.keys, self.values = (zeros(spec.kv_heads, 0, spec.head_dim) for _ in range(2))
        elif spec.has_attention:
            entries = spec.slots + spec.fading + spec.window
            self.keys, self.values = (zeros(spec.kv_heads, entries, spec.head_dim) for _ in range(2))
            self.positions = zeros(entries, dtype=torch.int64) - 1
            self.innovations = zeros(entries, dtype=wide)
        if spec.fading:
            self.delay_keys, self.delay_values = (zeros(spec.delayed, spec.kv_heads, spec.head_dim) for _ in range(2))
        if spec.taps:
            self.outputs = zeros(spec.taps, spec.hidden)
        if spec.averages_keys:
            self.key_sum = zeros(spec.kv_heads, spec.head_dim, dtype=widest(self.device))
        if spec.has_ssm:
            self.conv = zeros(spec.conv_kernel - 1, spec.conv_channels)
            self.ssm = zeros(spec.ssm_heads, spec.ssm_head_dim, spec.ssm_state, dtype=wide)
        self.is_initialized = True

    def prepare(self, hidden: torch.Tensor) -> None:
        """Makes the layer ready for input `hidden` `[B, T, E]`: allocated, on its device."""
        if not self.is_initialized:
            self.lazy_initialization(hidden)
            return
        if self.seen.device != hidden.device:
            self.to(hidden.device)
            self.device = hidden.device
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return
        if any(value.is_inference() for value in self.states().values()):
            # Read under inference_mode, continued outside (generate() uses no_grad): such tensors refuse writes.
            self._map(torch.clone)

    def states(self) -> dict[str, torch.Tensor]:
        """Every allocated state by name."""
        return {name: value for name in self.STATES if (value := getattr(self, name)) is not None}

    def restore(self, states: dict[str, torch.Tensor], columns: int) -> None:
        """Takes in the states that a layer of the same spec had after `columns` columns."""
        for name, value in states.items():
            setattr(self, name, value)
        self.columns, self.device, self.is_initialized = columns, self.seen.device, True
        self.even = bool((self.seen == columns).all())
        if self.even:
            self.pads = None

    # --- windowed layers: reading in blocks -------------------------------------------------------------------------

    def recall(self) -> Past:
        """The memories in reading order, by position; empty entries come first."""
        spec = self.spec
        pool = self.positions[:, spec.fading :].argsort(dim=1, stable=True) + spec.fading
        kept_keys, kept_values = self.by_token()
        keys, values = _take(kept_keys, pool), _take(kept_values, pool)
        positions, innovations = self.positions.gather(1, pool), self.innovations.gather(1, pool)
        if not spec.fading:
            return Past(keys, values, positions, innovations, None, None, None)
        visible = self._ring_order(spec.fading, behind=spec.delayed)
        delay = self._ring_order(spec.delayed)
        fading_keys = torch.cat([_take(kept_keys, visible), _take(self.delay_keys, delay)], dim=1)
        fading_values = torch.cat([_take(kept_values, visible), _take(self.delay_values, delay)], dim=1)
        number = self.made[:, None] + torch.arange(-spec.fading - spec.delayed, 0, device=self.seen.device)
        fading_positions = (number + 1) * spec.stride - 1
        return Past(keys, values, positions, innovations, fading_keys, fading_values, fading_positions)

    def by_token(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Views `[B, S, G, D]` of keys and values."""
        return self.keys.transpose(1, 2), self.values.transpose(1, 2)

    def _ring_order(self, size: int, behind: int = 0) -> torch.Tensor:
        """Slots of a ring from old to new, `[B, size]`, for a ring whose last fading token is `made - behind - 1`."""
        return (self.made[:, None] - behind + torch.arange(size, device=self.seen.device)) % size

    def commit(self, line: Past, before: Past | None, eidetic: torch.Tensor | None, lengths: torch.Tensor) -> None:
        """Takes in T tokens that the layer has just attended to.

        Args:
            line: what was recalled and the new tokens behind it. before: what was recalled, None for the first tokens.
            eidetic: `[B, M]` the entries of `line` to hold from now on, -1 = empty; None if M = 0.
            lengths: `[B]` real tokens per row, which come first among the new ones.
        """
        with torch.no_grad():
            spec = self.spec
            start = 0 if before is None else before.positions.shape[1]
            keep = start + lengths[:, None] + torch.arange(-spec.window, 0, device=lengths.device)
            keep = keep if eidetic is None else torch.cat([eidetic, keep], dim=1)
            empty, keep = keep < 0, keep.clamp(min=0)
            part = slice(spec.fading, None)
            keys, values = self.by_token()
            keys[:, part] = _take(line.keys, keep).to(keys.dtype)
            values[:, part] = _take(line.values, keep).to(values.dtype)
            self.positions[:, part] = line.positions.gather(1, keep).masked_fill(empty, -1)
            self.innovations[:, part] = line.innovations.gather(1, keep).to(self.innovations.dtype)
            if line.fading_keys is None or line.fading_keys.shape[1] == 0:
                return
            after = ((self.seen + lengths) // spec.stride)[:, None]
            start = (0 if before is None else before.fading_positions.shape[1]) + after - self.made[:, None]
            # Slot r of a ring of size n whose last token is e - 1 holds the (r - e mod n)-th of the n tokens up to e.
            ring = torch.arange(spec.fading, device=lengths.device)
            visible = start - spec.delayed - spec.fading + (ring - after + spec.delayed) % spec.fading
            empty, visible = visible < 0, visible.clamp(min=0)
            delay = start - spec.delayed + (torch.arange(spec.delayed, device=lengths.device) - after) % spec.delayed
            for buffer, ring, new in (
                (keys, self.delay_keys, line.fading_keys),
                (values, self.delay_values, line.fading_values),
            ):
                buffer[:, : spec.fading] = _take(new, visible).to(buffer.dtype)
                ring.copy_(_take(new, delay.clamp(min=0)))
            self.positions[:, : spec.fading] = (
                line.fading_positions.gather(1, visible).masked_fill(empty, -1).clamp(min=-1)
            )

    # --- windowed layers: one token ---------------------------------------------------------------------------------

    def step(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        innovations: torch.Tensor | None,
        fading: tuple[torch.Tensor, torch.Tensor] | None,
        active: torch.Tensor | None,
        decay: float,
    ) -> torch.Tensor | None:
        """Takes in one token per row, in place and with fixed shapes.

        A fading token becomes visible, and the new token takes the place of the one that is forgotten: nothing moves.

        Args:
            keys, values: `[B, 1, G, D]`. innovations: `[B, 1]` or None if M = 0. fading: keys and values of the SSM
            output, or None if F = 0 or the token makes no fading token (see `makes_fading`). active: `[B]` bool, rows
            where it is False stay as they are; None: all read. decay: g.

        Returns:
            `[B, F + M + W]` bool: which entries the token's query sees; None: all of them.
        """
        with torch.no_grad():
            spec, known = self.spec, self._counts(active)
            seen = self.columns if known else self.seen
            rows = torch.arange(self.seen.shape[0], device=self.seen.device)
            leaving = seen - spec.window
            kept = self.by_token()
            if fading is not None:
                self._fade(rows, seen, kept, fading, active)
            full = known and seen >= spec.slots + spec.window
            slot = self._forgotten(leaving if known else leaving[:, None], decay, full)
            for buffer, new in zip(kept, (keys, values)):
                _write(buffer, rows, slot, new[:, 0], active)
            _write(self.positions, rows, slot, seen, active)
            if innovations is not None:
                _write(self.innovations, rows, slot, innovations[:, 0], active)
            if known and seen + 1 >= spec.slots + spec.window and (leaving + 1) // spec.stride >= spec.fading:
                return None
            return self.positions >= 0

    def makes_fading(self, lengths: torch.Tensor | None) -> bool:
        """Whether the next token may make a fading token, as far as that is known without looking at tensors.

        Args:
            lengths: `[B]` real tokens of the step, None: one in every row.
        """
        return not self._counts(lengths) or (self.columns + 1) % self.spec.stride == 0

    def _counts(self, lengths: torch.Tensor | None) -> bool:
        """Whether a number says what every row has read, so that nothing has to be computed to know it. In compiled
        code it does not, because each number would compile a step anew; nor in a CUDA graph, which would keep it."""
        if not self.even or lengths is not None or torch.compiler.is_compiling():
            return False
        return not (self.seen.is_cuda and torch.cuda.is_current_stream_capturing())

    def _fade(
        self,
        rows: torch.Tensor,
        seen: torch.Tensor | int,
        kept: tuple[torch.Tensor, torch.Tensor],
        fading: tuple[torch.Tensor, torch.Tensor],
        active: torch.Tensor | None,
    ) -> None:
        """Where the token at position `seen` makes a fading token: it joins the delay line, and the one that it
        replaces there, W tokens older, becomes visible. kept: what `by_token` gives."""
        spec, number = self.spec, seen // self.spec.stride
        delayed, visible = number % spec.delayed, (number - spec.delayed) % spec.fading
        leaving = seen - spec.window
        if isinstance(seen, int):
            leaving = max(leaving, -1)
        else:
            leaving = leaving.clamp(min=-1)
            due = (seen + 1) % spec.stride == 0
            active = due if active is None else active & due
        for buffer, delay, new in zip(kept, (self.delay_keys, self.delay_values), fading):
            _write(buffer, rows, visible, _read(delay, rows, delayed), active)
            _write(delay, rows, delayed, new[:, 0], active)
        _write(self.positions, rows, visible, leaving, active)

    def _forgotten(self, leaving: torch.Tensor | int, decay: float, full: bool) -> torch.Tensor:
        """The slot `[B]` whose token the next one replaces (Algorithm 1, line 4).

        Up for it are an empty slot, the kept tokens, and the one that leaves the window, at position `leaving`, a
        number or `[B, 1]`. The weakest goes: the smallest retention key, among equals the youngest. full: no slot is
        empty.
        """
        fading = self.spec.fading
        positions = self.positions[:, fading:]
        ranked = retention_key(self.innovations[:, fading:], positions, decay)
        ranked = ranked.masked_fill(positions > leaving, torch.inf)
        if not full:
            # An empty slot, position -1, counts as the weakest and the youngest: the sign bit goes.
            ranked = ranked.masked_fill(positions < 0, -torch.inf)
            positions = positions & torch.iinfo(positions.dtype).max
        weakest = ranked == ranked.amin(dim=1, keepdim=True)
        return torch.where(weakest, positions, -1).argmax(dim=1) + fading

    # --- full attention ---------------------------------------------------------------------------------------------

    def append(self, keys: torch.Tensor, values: torch.Tensor, live: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Full attention: writes T tokens behind the `seen` ones of each row; pads are overwritten by the next tokens.

        Args:
            live: a gradient is wanted: the buffers are replaced instead of written in place.

        Returns:
            keys and values `[B, columns + T, G, D]`, differentiable in the new ones if `live`.
        """
        upto = self.columns + keys.shape[1]
        capacity = self.keys.shape[2]
        if capacity < upto:
            room = (0, 0, 0, max(upto - capacity, GROWTH, capacity // 2))
            self.keys, self.values = (torch.nn.functional.pad(value, room) for value in (self.keys, self.values))
        index = self.seen[:, None] + torch.arange(keys.shape[1], device=keys.device)
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
        if live:
            grown = tuple(
                buffer.to(new.dtype).index_put((rows, index), new)
                for buffer, new in zip(self.by_token(), (keys, values))
            )
            self.keys, self.values = (value.detach().to(self.keys.dtype).transpose(1, 2) for value in grown)
            return grown[0][:, :upto], grown[1][:, :upto]
        kept_keys, kept_values = self.by_token()
        kept_keys[rows, index] = keys.to(kept_keys.dtype)
        kept_values[rows, index] = values.to(kept_values.dtype)
        return kept_keys[:, :upto].to(keys.dtype), kept_values[:, :upto].to(values.dtype)

    # --- SSM states -------------------------------------------------------------------------------------------------

    def shift(self, name: str, new: torch.Tensor, lengths: torch.Tensor | None, first: int = 0) -> None:
        """Moves the history `name` `[B, k, C]` on by the first `lengths` (None: all) rows of `new` `[B, T, C']`.

        Where C' < C only the channels from `first` on move; the caller moves the others.
        """
        with torch.no_grad():
            history = getattr(self, name)[..., first : first + new.shape[-1]]
            if history.shape[1] == 0:
                return
            if lengths is None:
                kept = history.shape[1]
                history.copy_(torch.cat([history, new[:, -kept:].to(history.dtype)], dim=1)[:, -kept:])
                return
            index = lengths[:, None] + torch.arange(-history.shape[1], 0, device=history.device)
            fresh = _take(new, index.clamp(min=0)).to(history.dtype)
            older = _take(history, (index + history.shape[1]).clamp(max=history.shape[1] - 1))
            history.copy_(torch.where((index >= 0)[..., None], fresh, older))

    def add_keys(self, keys: torch.Tensor, lengths: torch.Tensor | None) -> None:
        """Adds the first `lengths` (None: all) of the keys `[B, T, G, D]` of each row to `key_sum`."""
        with torch.no_grad():
            if lengths is not None:
                pads = torch.arange(keys.shape[1], device=keys.device) >= lengths[:, None]
                keys = keys.masked_fill(pads[..., None, None], 0.0)
            self.key_sum += keys.sum(dim=1, dtype=self.key_sum.dtype)

    def advance(self, lengths: torch.Tensor | None, columns: int) -> None:
        """Counts `columns` columns as read, `lengths` `[B]` of them real (None: all). Called last, once per forward."""
        self.seen += columns if lengths is None else lengths
        self.even = self.even and lengths is None
        self.columns += columns

    # --- what transformers' Cache asks of a layer -------------------------------------------------------------------

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        raise ValueError(
            "update(key_states, value_states): a B'MOJO layer also stores innovations, fading tokens and SSM states; "
            "pass the cache to a B'MOJO model as past_key_values and let its layers write it."
        )

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    @property
    def batch_size(self) -> int:
        return -1 if self.seen is None else self.seen.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.states().values())

    def reset(self) -> None:
        """Forgets everything; the next input may have another batch size, dtype or device."""
        for name in self.states():
            setattr(self, name, None)
        self.columns, self.even, self.is_initialized = 0, True, False

    def _map(self, function) -> None:
        for name, value in {name: function(value) for name, value in self.states().items()}.items():
            setattr(self, name, value)

    def to(self, device: torch.device | str) -> "BMojoCacheLayer":
        self._map(lambda value: value.to(device))
        return self

    def offload(self) -> None:
        self.to("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self.to(self.device)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda value: value.index_select(0, beam_idx.to(value.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda value: value.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda value: value[indices.to(value.device)])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove == 0:
            return
        raise ValueError(
            f"tokens_to_remove={tokens_to_remove}: a B'MOJO memory has forgotten what it would have to restore; keep a "
            "copy.deepcopy of the cache (its size is constant) and go back to that."
        )


def _take(value: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `index` `[B, k]` of `value` `[B, S, ...]`."""
    rows = torch.arange(index.shape[0], device=index.device)[:, None]
    return value[rows, index]


def _read(buffer: torch.Tensor, rows: torch.Tensor, slot: torch.Tensor | int) -> torch.Tensor:
    """buffer[b, slot[b]] `[B, ...]`; a number is one slot for all rows."""
    return buffer[:, slot] if isinstance(slot, int) else buffer[rows, slot]


def _write(
    buffer: torch.Tensor,
    rows: torch.Tensor,
    slot: torch.Tensor | int,
    value: torch.Tensor | int,
    active: torch.Tensor | None,
) -> None:
    """buffer[b, slot[b]] = value[b] where `active[b]`, in place and without a data-dependent shape."""
    if isinstance(value, torch.Tensor) and value.dtype != buffer.dtype:
        value = value.to(buffer.dtype)
    if active is not None:
        value = torch.where(active.view(active.shape + (1,) * (buffer.dim() - 2)), value, _read(buffer, rows, slot))
    if isinstance(slot, int):
        buffer[:, slot] = value
    else:
        buffer[rows, slot] = value
