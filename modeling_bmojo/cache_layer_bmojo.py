"""One layer's memory: its states, how tokens enter them in blocks and one at a time, and what transformers asks of it.

States (sizes in `LayerSpec`), with `seen` = real tokens of each row so far; pads are never counted:

    keys, values    [B, M + F + W, G, D]   eidetic slots | visible fading tokens | window, all that the next query sees
    positions       [B, M + F + W]         position of each entry in its row, -1 = empty
    innovations     [B, M + F + W]         e of eidetic and window entries (0 for fading tokens)
    delay_*         [B, W, G, D]           keys and values of SSM outputs that are not yet beyond the window (F > 0)
    outputs         [B, k, E]              last k SSM outputs, for the predictor of `innovation="output"`
    conv            [B, K - 1, C]          last inputs of the SSM's convolution
    ssm             [B, H, P, N]           SSM state (S6: H P channels), fp32 (fp64 for fp64 models) in any dtype
    last_hidden     [B, E]                 last layer only: the model's output for the last real token

Window, delay line and visible fading tokens are rings: position p sits in slot p mod size. A full-attention layer keeps
every token: `keys`, `values` `[B, capacity, G, D]`, position = slot.
"""

from typing import NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin

from .configuration_bmojo import LayerSpec
from .memory_ops import retention_key


GROWTH = 256  # tokens by which a full-attention layer's buffer grows at least


class Past(NamedTuple):
    """The state of a windowed layer in reading order (slots, then window), for prefill after the first tokens.

    keys, values `[B, M + W, G, D]`, positions, innovations `[B, M + W]`; the fading tokens (visible, then delayed)
    `[B, F + W, G, D]` and their positions `[B, F + W]`, or None.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    innovations: torch.Tensor
    fading_keys: torch.Tensor | None
    fading_values: torch.Tensor | None
    fading_positions: torch.Tensor | None


class BMojoCacheLayer(CacheLayerMixin):
    """All states of one layer. Written by the model; every operation treats every state alike, by `states()`."""

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
        "conv",
        "ssm",
        "seen",
        "last_hidden",
    )

    def __init__(self, spec: LayerSpec):
        super().__init__()
        self.spec = spec
        self.columns = 0  # columns of input read, pads included: what transformers calls the sequence length
        self.device: torch.device | None = None
        for name in self.STATES:
            setattr(self, name, None)

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
            self.keys, self.values = (zeros(0, spec.kv_heads, spec.head_dim) for _ in range(2))
        elif spec.has_attention:
            entries = spec.slots + spec.fading + spec.window
            self.keys, self.values = (zeros(entries, spec.kv_heads, spec.head_dim) for _ in range(2))
            self.positions = zeros(entries, dtype=torch.int64) - 1
            self.innovations = zeros(entries, dtype=wide)
        if spec.fading:
            self.delay_keys, self.delay_values = (zeros(spec.window, spec.kv_heads, spec.head_dim) for _ in range(2))
        if spec.taps:
            self.outputs = zeros(spec.taps, spec.hidden)
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
        inference = any(value.is_inference() for value in self.states().values())
        if inference and not torch.is_inference_mode_enabled():
            # Read under inference_mode, continued outside (generate() uses no_grad): such tensors refuse writes.
            self._map(torch.clone)

    def states(self) -> dict[str, torch.Tensor]:
        """Every allocated state by name."""
        return {name: value for name in self.STATES if (value := getattr(self, name)) is not None}

    def restore(self, states: dict[str, torch.Tensor], columns: int) -> None:
        """Takes in states that another layer of the same spec had.

        Raises:
            ValueError: if a state is missing, unknown or of another shape than this layer's spec gives.
        """
        if "seen" not in states:
            raise ValueError("the state 'seen' is missing")
        model = BMojoCacheLayer(self.spec)
        kind = states.get("keys", states.get("conv", states["seen"])).dtype
        model.lazy_initialization(torch.empty(states["seen"].shape[0], dtype=kind, device="meta"))
        expected = model.states()
        optional = {"last_hidden"} & set(states)
        if optional:
            expected["last_hidden"] = torch.empty(model.batch_size, self.spec.hidden, device="meta")
        if set(states) != set(expected):
            wrong = sorted(set(states) ^ set(expected))
            raise ValueError(f"states {wrong} are missing or unknown")
        for name, value in expected.items():
            grows = self.spec.has_attention and self.spec.window is None and name in ("keys", "values")
            found = states[name].shape
            if found != value.shape and not (grows and (found[0], *found[2:]) == (value.shape[0], *value.shape[2:])):
                raise ValueError(f"the state {name!r} has shape {list(found)} instead of {list(value.shape)}")
            if states[name].is_floating_point() != value.is_floating_point():
                raise ValueError(f"the state {name!r} is of dtype {states[name].dtype}")
        for name, value in states.items():
            setattr(self, name, value)
        self.columns, self.device, self.is_initialized = columns, states["seen"].device, True

    # --- windowed layers: reading in blocks -------------------------------------------------------------------------

    def recall(self) -> Past:
        """The memories in reading order: eidetic tokens by age, window and fading tokens by position."""
        spec = self.spec
        slots = self.positions[:, : spec.slots].argsort(dim=1)
        window = self._ring_order(spec.window) + spec.slots + spec.fading
        order = torch.cat([slots, window], dim=1)
        keys, values = _take(self.keys, order), _take(self.values, order)
        positions, innovations = self.positions.gather(1, order), self.innovations.gather(1, order)
        if not spec.fading:
            return Past(keys, values, positions, innovations, None, None, None)
        # The visible ring holds F positions that end W before `seen`.
        visible = self._ring_order(spec.fading, behind=spec.window) + spec.slots
        delay = self._ring_order(spec.window)
        fading_keys = torch.cat([_take(self.keys, visible), _take(self.delay_keys, delay)], dim=1)
        fading_values = torch.cat([_take(self.values, visible), _take(self.delay_values, delay)], dim=1)
        fading_positions = torch.cat([self.positions.gather(1, visible), positions[:, spec.slots :]], dim=1)
        return Past(keys, values, positions, innovations, fading_keys, fading_values, fading_positions)

    def _ring_order(self, size: int, behind: int = 0) -> torch.Tensor:
        """Slots of a ring from old to new, `[B, size]`, for a ring whose last position is `seen - behind - 1`."""
        return (self.seen[:, None] - behind + torch.arange(size, device=self.seen.device)) % size

    @torch.no_grad()
    def commit(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        innovations: torch.Tensor | None,
        fading: tuple[torch.Tensor, torch.Tensor] | None,
        lengths: torch.Tensor,
        eidetic: Past | None,
    ) -> None:
        """Takes in T tokens that the layer has just attended to.

        Args:
            keys, values: `[B, T, G, D]`. innovations: `[B, T]` or None if M = 0. fading: keys and values of the SSM
            outputs, or None if F = 0. lengths: `[B]` real tokens per row, which come first.
            eidetic: the M tokens to hold from now on, or None to hold what is held.
        """
        spec, seen = self.spec, self.seen
        after = seen + lengths
        if fading is not None:
            source, is_new, was_delayed, last = self._ring_update(spec.fading, after - spec.window)
            delayed = source.clamp(min=0) % spec.window
            part = slice(spec.slots, spec.slots + spec.fading)
            for buffer, delay, new in zip((self.keys, self.values), (self.delay_keys, self.delay_values), fading):
                moved = torch.where(was_delayed[..., None, None], _take(delay, delayed), buffer[:, part])
                fresh = _take(new, (source - seen[:, None]).clamp(0, new.shape[1] - 1))
                buffer[:, part] = torch.where(is_new[..., None, None], fresh.to(buffer.dtype), moved)
            self.positions[:, part] = last
        source, is_new, _, last = self._ring_update(spec.window, after)
        pick = (source - seen[:, None]).clamp(0, keys.shape[1] - 1)
        part = slice(spec.slots + spec.fading, None)
        self._merge_ring(self.keys[:, part], keys, pick, is_new)
        self._merge_ring(self.values[:, part], values, pick, is_new)
        if innovations is not None:
            self._merge_ring(self.innovations[:, part], innovations, pick, is_new)
        self.positions[:, part] = last
        if fading is not None:
            self._merge_ring(self.delay_keys, fading[0], pick, is_new)
            self._merge_ring(self.delay_values, fading[1], pick, is_new)
        if eidetic is not None:
            self.keys[:, : spec.slots] = eidetic.keys.to(self.keys.dtype)
            self.values[:, : spec.slots] = eidetic.values.to(self.values.dtype)
            self.positions[:, : spec.slots] = eidetic.positions
            self.innovations[:, : spec.slots] = eidetic.innovations

    def _ring_update(self, size: int, end: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Which position each slot of a ring holds once its last position is `end - 1`.

        Returns:
            position `[B, size]`; is_new: it was just read; was_delayed: it comes from the delay line (it was in the
            window before); the position again, -1 where it is before the first token.
        """
        slot = torch.arange(size, device=end.device)
        position = end[:, None] - size + (slot - end[:, None]) % size
        is_new = position >= self.seen[:, None]
        was_delayed = ~is_new & (position >= self.seen[:, None] - self.spec.window)
        return position, is_new, was_delayed, position.clamp(min=-1)

    @staticmethod
    def _merge_ring(ring: torch.Tensor, new: torch.Tensor, pick: torch.Tensor, is_new: torch.Tensor) -> None:
        fresh = _take(new, pick).to(ring.dtype)
        ring.copy_(torch.where(is_new.view(is_new.shape + (1,) * (ring.dim() - 2)), fresh, ring))

    # --- windowed layers: one token ---------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        innovations: torch.Tensor | None,
        fading: tuple[torch.Tensor, torch.Tensor] | None,
        lengths: torch.Tensor,
        decay: float,
    ) -> torch.Tensor:
        """Takes in one token per row, in place and with fixed shapes; rows with `lengths` 0 stay as they are.

        First the token that leaves the window applies for the eidetic memory, then a fading token becomes visible,
        then the new token takes the freed slot. Arguments as in `commit`, with T = 1.

        Returns:
            `[B, M + F + W]` bool: which entries the token's query sees.
        """
        spec, seen = self.spec, self.seen
        rows = torch.arange(seen.shape[0], device=seen.device)
        active = lengths > 0
        slot = spec.slots + spec.fading + seen % spec.window
        if spec.slots:
            self._admit(rows, slot, active, decay)
        if fading is not None:
            delayed = seen % spec.window
            leaving = seen - spec.window
            target = spec.slots + leaving % spec.fading
            moves = active & (leaving >= 0)
            _write(self.keys, rows, target, self.delay_keys[rows, delayed], moves)
            _write(self.values, rows, target, self.delay_values[rows, delayed], moves)
            _write(self.positions, rows, target, leaving, moves)
            _write(self.delay_keys, rows, delayed, fading[0][:, 0], active)
            _write(self.delay_values, rows, delayed, fading[1][:, 0], active)
        _write(self.keys, rows, slot, keys[:, 0], active)
        _write(self.values, rows, slot, values[:, 0], active)
        _write(self.positions, rows, slot, seen, active)
        if innovations is not None:
            _write(self.innovations, rows, slot, innovations[:, 0], active)
        return self.positions >= 0

    def _admit(self, rows: torch.Tensor, slot: torch.Tensor, active: torch.Tensor, decay: float) -> None:
        """The token in `slot` leaves the window: it replaces the weakest kept token if it beats it (Algorithm 1, 4)."""
        count = self.spec.slots
        positions = self.positions[:, :count]
        keys = retention_key(self.innovations[:, :count], positions, decay).masked_fill(positions < 0, -torch.inf)
        leaving_position, leaving_innovation = self.positions[rows, slot], self.innovations[rows, slot]
        leaving_key = retention_key(leaving_innovation, leaving_position, decay)
        # The weakest: an empty slot, else the smallest key, and among equals the youngest.
        smallest = keys.min(dim=1, keepdim=True).values
        empty = positions < 0
        rank = torch.where(empty, self.columns + 1, torch.where(keys == smallest, positions, -1))
        weakest = rank.argmax(dim=1)
        wins = empty.any(dim=1) | (leaving_key > smallest[:, 0])
        admitted = active & (leaving_position >= 0) & wins
        _write(self.keys, rows, weakest, self.keys[rows, slot], admitted)
        _write(self.values, rows, weakest, self.values[rows, slot], admitted)
        _write(self.positions, rows, weakest, leaving_position, admitted)
        _write(self.innovations, rows, weakest, leaving_innovation, admitted)

    # --- full attention ---------------------------------------------------------------------------------------------

    def append(self, keys: torch.Tensor, values: torch.Tensor, live: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Full attention: writes T tokens behind the `seen` ones of each row; pads are overwritten by the next tokens.

        Args:
            live: a gradient is wanted: the buffers are replaced instead of written in place.

        Returns:
            keys and values `[B, columns + T, G, D]`, differentiable in the new ones if `live`.
        """
        upto = self.columns + keys.shape[1]
        if self.keys.shape[1] < upto:
            missing = max(upto - self.keys.shape[1], GROWTH, self.keys.shape[1] // 2)
            room = (0, 0, 0, 0, 0, missing)
            self.keys, self.values = (torch.nn.functional.pad(value, room) for value in (self.keys, self.values))
        index = self.seen[:, None] + torch.arange(keys.shape[1], device=keys.device)
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
        if live:
            grown = tuple(
                buffer.to(new.dtype).index_put((rows, index), new)
                for buffer, new in ((self.keys, keys), (self.values, values))
            )
            self.keys, self.values = (value.detach().to(self.keys.dtype) for value in grown)
            return grown[0][:, :upto], grown[1][:, :upto]
        self.keys[rows, index] = keys.to(self.keys.dtype)
        self.values[rows, index] = values.to(self.values.dtype)
        return self.keys[:, :upto].to(keys.dtype), self.values[:, :upto].to(values.dtype)

    # --- SSM states -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def shift(self, name: str, new: torch.Tensor, lengths: torch.Tensor) -> None:
        """Moves the history `name` `[B, k, E]` on by the first `lengths` rows of `new` `[B, T, E]`."""
        history = getattr(self, name)
        if history.shape[1] == 0:
            return
        index = lengths[:, None] + torch.arange(history.shape[1], device=history.device)
        history.copy_(_take(torch.cat([history, new.to(history.dtype)], dim=1), index))

    def advance(self, lengths: torch.Tensor, columns: int) -> None:
        """Counts `columns` columns, `lengths` `[B]` of them real, as read. Called last, once per forward."""
        self.seen += lengths
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
        self.columns, self.is_initialized = 0, False

    def _map(self, function) -> None:
        for name, value in self.states().items():
            setattr(self, name, function(value))

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


def _write(
    buffer: torch.Tensor, rows: torch.Tensor, slot: torch.Tensor, value: torch.Tensor, where: torch.Tensor
) -> None:
    """buffer[b, slot[b]] = value[b] where `where[b]`, in place and without a data-dependent shape."""
    keep = where.view(where.shape + (1,) * (value.dim() - 1))
    buffer[rows, slot] = torch.where(keep, value.to(buffer.dtype), buffer[rows, slot])
