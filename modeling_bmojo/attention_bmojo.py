"""Attention of a B'MOJO layer over [eidetic | fading | local], with and without a cache (Algorithm 1, lines 1, 4, 5).

Three evaluations of one rule, "query t sees input s iff s <= t < expiry_s, and fading token y_s iff
s + W <= t < s + W + F":

    no token is beyond the window yet     plain causal attention
    many tokens                           blocks of queries, gathered keys (`attention_ops`)
    one token and a cache                 the cache's entries, updated in place, are exactly what the query sees

Projections run on the input's columns `[B, T, E]`, attention on mixer rows, whose real tokens come first
(layout_bmojo.py). Fading tokens are the exception: tied `k_proj` and `v_proj` run a second time, on SSM outputs, of
which a stride takes only some.

Shapes: B rows, T tokens (R and T' where it matters that they are mixer rows), E hidden size, H query heads, G key/value
heads, D head dim, W window, M eidetic slots, F fading tokens, L block length.
"""

import torch
from torch import nn

from .attention_ops import KeySet, causal_attention, weights_by_position
from .cache_layer_bmojo import BMojoCacheLayer, Past
from .configuration_bmojo import BMojoConfig
from .dispatch_bmojo import Kernels
from .inputs_bmojo import Rows
from .layout_bmojo import to_columns, to_rows
from .linear_bmojo import listeners, project
from .memory_ops import NEVER, key_innovation, retention_key, widest


class BMojoRMSNorm(nn.Module):
    """RMSNorm over the last dimension, computed in fp32 at least."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """RoPE on `[B, T, H, D]`; channels beyond R (partial RoPE) stay as they are.

    Args:
        rotary: cos and sin `[B, T, 1, R]` of the tokens' positions, the first half of sin negated; None: no positions.
    """
    if rotary is None:
        return x
    cos, sin = rotary
    size = cos.shape[-1]
    if size == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(size // 2, dims=-1), sin)
    turned = x[..., :size]
    turned = torch.addcmul(turned * cos, turned.roll(size // 2, dims=-1), sin)
    return torch.cat([turned, x[..., size:]], dim=-1)


class BMojoAttention(nn.Module):
    """Multi-head attention with B'MOJO's memories; also a plain windowed or full attention, by its layer's type.

    Args:
        config: the model's configuration. layer_idx: which layer.
    """

    def __init__(self, config: BMojoConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.spec = spec = config.layer_spec(layer_idx)
        self.head_dim = spec.head_dim
        multiplier = config.attention_multiplier
        self.scaling = spec.head_dim**-0.5 if multiplier is None else multiplier
        self.decay = config.eidetic_decay
        self.block = config.memory_block_size
        self.dropout = config.attention_dropout
        self.kernels = Kernels(config)
        self.use_rope = config.no_rope_layers is None or bool(config.no_rope_layers[layer_idx])

        query_size, key_size = config.num_attention_heads * spec.head_dim, spec.kv_heads * spec.head_dim
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        self.tied = config.tie_fading_projections
        if spec.fading and not self.tied:
            self.fading_k_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
            self.fading_v_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.norm_joins_heads = config.qk_norm == "full"
        if config.qk_norm is None:
            self.q_norm = self.k_norm = nn.Identity()
        else:
            sizes = (query_size, key_size) if self.norm_joins_heads else (spec.head_dim, spec.head_dim)
            self.q_norm, self.k_norm = (BMojoRMSNorm(size, config.rms_norm_eps) for size in sizes)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rows: Rows,
        fading: torch.Tensor | None = None,
        innovation: torch.Tensor | None = None,
        cache: BMojoCacheLayer | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends, and lets the cache take the tokens in.

        Args:
            hidden_states: `[B, T, E]`. rows: how they are cut into mixer rows, and where those stand. If
                `rows.columns` is given, the attention weights are returned with one column per token position.
            fading: `[B, T, E]` SSM outputs or None.
            innovation: `[B, T]`, or None if the layer keeps nothing or measures it here, on its keys.
            cache: the layer's states or None.

        Returns:
            `[B, T, E]`, and weights `[B, H, T, S]` or None.
        """
        query = self._normed_heads(project(self.q_proj, hidden_states), self.q_norm)
        keys, values = self._keys_values(hidden_states, self.k_proj, self.v_proj)
        live = torch.is_grad_enabled() and any(value.requires_grad for value in (query, keys, values))
        stepping = cache is not None and cache.started and query.shape[1] == 1 and not live
        none = [None] * len(rows.lengths)
        groups = zip(
            *(to_rows(rows.layout, value) for value in (query, keys, values)),
            none if innovation is None else to_rows(rows.layout, innovation),
            none if fading is None else self._fading_rows(fading, rows),
            rows.lengths,
            rows.rotary if self.use_rope else none,
        )
        mixed = [self._mix(*group, cache, rows.columns, live, stepping) for group in groups]
        out = project(self.o_proj, to_columns(rows.layout, [part for part, _ in mixed]).flatten(2))
        if rows.columns is None:
            return out, None
        weights = mixed[0][1]
        return out, weights if rows.layout is None else rows.layout.merge_weights(weights)

    def _mix(self, query, keys, values, innovation, fading, lengths, rotary, cache, columns, live, stepping):
        """Attention of one group of mixer rows, which the cache takes in.

        Args:
            query `[R, T', H, D]`, keys, values `[R, T', G, D]`: without positions. innovation: `[R, T']` or None.
            fading: what `_fading_rows` gives, or None. lengths: `[R]` real tokens, or None: all T'.

        Returns:
            `[R, T', H, D]`, and weights `[R, H, T', columns]` or None.
        """
        if self.spec.averages_keys and (cache is not None or query.shape[1] > self.spec.window):
            innovation = _surprise_of_keys(keys, lengths, cache)
        query, keys = rotate(query, rotary), rotate(keys, rotary)
        faded = self._fade(fading, rotary, lengths, cache, stepping)
        if lengths is None and not stepping:
            lengths = torch.full((query.shape[0],), query.shape[1], device=query.device)
        if self.spec.window is None:
            out, weights = self._full(query, keys, values, cache, columns, live)
        elif (cache is None or not cache.started) and query.shape[1] <= self.spec.window:
            out, weights = self._attend(query, keys, values, None, columns)
            if cache is not None:
                line = self._line(keys, values, innovation, faded, lengths, cache, None)
                empty = lengths.new_full((lengths.shape[0], self.spec.slots), -1) if self.spec.slots else None
                cache.commit(line, None, empty, lengths)
        elif stepping:
            out, weights = self._step(query, keys, values, innovation, faded, lengths, cache, columns)
        else:
            out, weights = self._blocks(query, keys, values, innovation, faded, lengths, cache, columns)
        if self.training and fading is not None:
            out = out + _zero_anchor((*fading, *(faded or ()))).to(out.dtype)
        return out, weights

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _normed_heads(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        return self._heads(norm(x)) if self.norm_joins_heads else norm(self._heads(x))

    def _keys_values(self, x: torch.Tensor, k_proj: nn.Module, v_proj: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys, without positions, and values of x `[B, T, E]`: `[B, T, G, D]` each."""
        return self._normed_heads(project(k_proj, x), self.k_norm), self._heads(project(v_proj, x))

    def _fading_projections(self) -> tuple[nn.Module, nn.Module]:
        return (self.k_proj, self.v_proj) if self.tied else (self.fading_k_proj, self.fading_v_proj)

    def check_hooks(self, rows: Rows, columns: int) -> None:
        """Refuses hooks on tied projections that would look at other columns than the `columns` of the input.

        Raises:
            ValueError: if there are some.
        """
        if not (self.tied and self._moves_columns(rows, columns)):
            return
        heard = self._listeners(rows, *self._fading_projections())
        if heard:
            raise ValueError(
                f"layer {self.layer_idx}: {heard[0]} is hooked onto the tied k_proj or v_proj, which with fading_size="
                f"{self.spec.fading} run a second time, on SSM outputs in mixer rows, where a column is another token "
                "than in the input (pads, packing, fading_stride); hook another module (q_proj, o_proj, in_proj, ...), "
                "or use a model with tie_fading_projections=False or fading_size=0."
            )

    def _moves_columns(self, rows: Rows, columns: int) -> bool:
        """Whether what fading tokens are made of has other columns than the `columns` of the input."""
        spec = self.spec
        return bool(spec.fading) and (rows.layout is not None or (spec.stride > 1 and columns > 1))

    def _listeners(self, rows: Rows, *modules: nn.Module) -> list[str]:
        """Hooks on these modules that may look at columns."""
        packed = rows.layout is not None and rows.layout.packed
        return [hook for module in modules for hook in listeners(module, packed)]

    def _fading_rows(self, fading: torch.Tensor, rows: Rows) -> list[tuple[torch.Tensor, ...]]:
        """What fading tokens are made of, by group of mixer rows: SSM outputs `[R, T', E]`, of which `_fade` projects
        those that become one.

        Where somebody listens to the projections it is their keys and values `[R, T', G, D]` instead: a stride, or
        the mixer rows, would show the listener other columns than the input's.
        """
        if not self._moves_columns(rows, fading.shape[1]):
            return [(part,) for part in to_rows(rows.layout, fading)]
        projections, made_of = self._fading_projections(), (fading,)
        if self._listeners(rows, *projections, self.k_norm):
            made_of = self._keys_values(fading, *projections)
        return list(zip(*(to_rows(rows.layout, value) for value in made_of)))

    def _fade(self, fading, rotary, lengths, cache: BMojoCacheLayer | None, stepping: bool):
        """Keys and values `[R, n, G, D]` of the fading tokens, which are made of what `_fading_rows` gives, or None.

        They stand at positions s - 1, 2 s - 1, ... of each row; behind a row's last one may stand others, which
        pads alone see. A single step makes one of its only output, and the cache knows whether to take it.
        """
        if fading is None or not self.spec.fading or (stepping and not cache.makes_fading(lengths)):
            return None
        made_of, stride, tokens = fading, self.spec.stride, fading[0].shape[1]
        if stride > 1 and not stepping:
            taken = (*fading, *(rotary or ()))
            if cache is None or (cache.even and not torch.compiler.is_compiling()):
                part = slice(-(1 if cache is None else cache.columns + 1) % stride, None, stride)
                taken = [value[:, part] for value in taken]
            else:
                first = (-cache.seen - 1) % stride
                index = first[:, None] + torch.arange(0, tokens, stride, device=first.device)
                numbers = torch.arange(len(first), device=first.device)[:, None]
                index = index.clamp(max=tokens - 1)
                taken = [value.expand(len(first), *value.shape[1:])[numbers, index] for value in taken]
            made_of, rotary = taken[: len(fading)], tuple(taken[len(fading) :]) or None
        keys, values = made_of if len(made_of) == 2 else self._keys_values(*made_of, *self._fading_projections())
        return rotate(keys, rotary), values

    def _softmax_options(self, columns: int | None) -> dict:
        # SDPA forms no weights: whoever asks for them gets the eager form.
        implementation = "eager" if columns is not None else self.config._attn_implementation or "sdpa"
        if implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"attn_implementation={implementation!r}: must be 'eager' or 'sdpa'; load with one of them."
            )
        return {
            "scaling": self.scaling,
            "dropout": self.dropout if self.training else 0.0,
            "implementation": implementation,
        }

    def _attend(self, query, keys, values, visible, columns) -> tuple[torch.Tensor, torch.Tensor | None]:
        keys, values = keys.to(query.dtype), values.to(query.dtype)
        return causal_attention(query, keys, values, visible, **self._softmax_options(columns))

    def _full(self, query, keys, values, cache: BMojoCacheLayer | None, columns: int | None, live: bool):
        """Full attention with a growing cache: slot = position, so query i of a row sees slots up to seen + i."""
        if cache is None:
            return self._attend(query, keys, values, None, columns)
        empty = not cache.started
        all_keys, all_values = cache.append(keys, values, live)
        if empty:
            return self._attend(query, keys, values, None, columns)
        slot = torch.arange(all_keys.shape[1], device=query.device)
        now = cache.seen[:, None] + torch.arange(query.shape[1], device=query.device)
        return self._attend(query, all_keys, all_values, slot <= now[..., None], columns)

    def _step(self, query, keys, values, innovation, faded, lengths, cache: BMojoCacheLayer, columns):
        """One token: the cache admits, forgets and takes it in; its entries are then exactly what the token sees."""
        active = None if lengths is None else lengths > 0
        visible = cache.step(keys, values, innovation, faded, active, self.decay)
        if visible is not None:
            # A row that reads a pad sees anything at all: a softmax over nothing would be NaN.
            visible = (visible if active is None else visible | ~active[:, None])[:, None]
        out, weights = self._attend(query, *cache.by_token(), visible, columns)
        if columns is not None:
            weights = weights_by_position(weights, cache.positions, columns)
        return out, weights

    def _blocks(self, query, keys, values, innovation, faded, lengths, cache: BMojoCacheLayer | None, columns):
        """Many tokens: list the tokens from old to new, select, and offer each block of queries its keys.

        Without a past, the first W tokens see each other and nothing else; for the others they are the past.
        """
        window, slots = self.spec.window, self.spec.slots
        before = cache.recall() if cache is not None and cache.started else None
        line = self._line(keys, values, innovation, faded, lengths, cache, before)
        if before is not None:
            out, weights, eidetic = self._attend_line(query, line, slots, cache.seen[:, None], columns)
        else:
            start, start_weights = self._attend(query[:, :window], keys[:, :window], values[:, :window], None, columns)
            out, weights, eidetic = self._attend_line(query[:, window:], line, 0, window, columns)
            out = torch.cat([start, out], dim=1)
            if columns is not None:
                start_weights = nn.functional.pad(start_weights, (0, columns - window))
                weights = torch.cat([start_weights, weights], dim=2)
        if cache is not None:
            last = line.positions.shape[1] - query.shape[1] + lengths - 1
            cache.commit(line, before, _still_held(line.positions, eidetic, last, window, slots), lengths)
        return out, weights

    def _line(self, keys, values, innovation, faded, lengths, cache: BMojoCacheLayer | None, before: Past | None):
        """The tokens from old to new: what the cache recalls, then the T new ones."""
        seen = lengths.new_zeros(lengths.shape) if cache is None else cache.seen
        offset = torch.arange(keys.shape[1], device=keys.device)
        positions = torch.where(offset < lengths[:, None], seen[:, None] + offset, -1)
        if innovation is None:
            innovation = torch.zeros(positions.shape, dtype=torch.float32, device=keys.device)
        made = None
        if faded is not None:
            stride = self.spec.stride
            number = (seen // stride)[:, None] + torch.arange(faded[0].shape[1], device=keys.device)
            made = (number + 1) * stride - 1
        new = Past(keys, values, positions, innovation, *(faded or (None, None)), made)
        if before is None:
            return new
        return Past(*(None if n is None else torch.cat([old.to(n), n], dim=1) for old, n in zip(before, new)))

    def _attend_line(self, query, line: Past, held: int, start: torch.Tensor | int, columns: int | None):
        """The last T tokens of the line, whose positions begin at `start` (a number or `[B, 1]`), attend to it; before
        them stand `held` kept tokens and W window tokens.

        Returns:
            `[B, T, H, D]`, weights or None, and the expiry of the line's tokens `[B, S]` as indices into it.
        """
        spec, tokens = self.spec, query.shape[1]
        first = -held - spec.window
        block = min(self.block, tokens)
        valid = line.positions >= 0
        ranked = retention_key(line.innovations, line.positions, self.decay)
        chosen = self.kernels.run("expiry", ranked, valid, spec.window, spec.slots, block, tokens, held, spec.window)
        coordinate = torch.arange(first, tokens, device=query.device).expand(valid.shape)
        # A pad sees itself, so that no softmax is empty; nobody else does, because pads come last.
        end = torch.where(valid | (coordinate < 0), chosen.expiry, coordinate + 1)
        tokens_seen = KeySet(line.keys, line.values, coordinate, end, line.positions, first)
        local = KeySet(*(value[:, held:] for value in tokens_seen[:5]), -spec.window)
        sets = [(local, (1 - spec.window, 0))]
        if spec.slots:
            sets.append((tokens_seen, chosen.slots))
        if line.fading_keys is not None and line.fading_keys.shape[1]:
            sets.append(self._fading_set(line, tokens, block, start))
        out, weights = self.kernels.run(
            "memory_attention", query, sets, block, **self._softmax_options(columns), columns=columns
        )
        return out, weights, chosen.expiry - first

    def _fading_set(self, line: Past, tokens: int, block: int, start: torch.Tensor | int):
        """Fading tokens as a set, and what it offers to each block: those made from W to W + F s - 1 tokens ago.

        Entries behind a row's last token are seen by pads alone.
        """
        window, stride, reach = self.spec.window, self.spec.stride, self.spec.fading * self.spec.stride
        made = line.fading_positions
        count, coordinate = made.shape[1], made - start
        if stride == 1:
            offered = (1 - window - reach, -window)
        else:
            # Block j sees those after j L - W - F s, the first of which is number `oldest`, until its last query.
            blocks = torch.arange(0, tokens, block, device=made.device)
            oldest = (blocks - window - reach - coordinate[:, :1]).div(stride, rounding_mode="floor") + 1
            offered = oldest[..., None] + torch.arange(self.spec.fading - (1 - block) // stride, device=made.device)
            offered = torch.where((offered >= 0) & (offered < count), offered, -1)
        end = torch.where(made >= 0, coordinate + window + reach, -NEVER)
        begin = coordinate + window
        return KeySet(line.fading_keys, line.fading_values, begin, end, made, tokens - count), offered


def _surprise_of_keys(keys: torch.Tensor, lengths: torch.Tensor | None, cache: BMojoCacheLayer | None) -> torch.Tensor:
    """Innovation `[B, T]` of keys `[B, T, G, D]`, without positions, against all before, whose sum the cache keeps."""
    if cache is None:
        nothing = torch.zeros(keys.shape[0], *keys.shape[2:], dtype=widest(keys.device), device=keys.device)
        return key_innovation(keys, nothing, torch.zeros(keys.shape[0], dtype=torch.int64, device=keys.device))
    surprise = key_innovation(keys, cache.key_sum, cache.seen)
    cache.add_keys(keys, lengths)
    return surprise


def _zero_anchor(ends: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Zero, but connected to the fading memory's `ends`: where no query sees it yet, its parameters get a gradient of
    zero.

    Data-parallel training waits for a gradient of every parameter and would otherwise stop at the first short batch.
    """
    return 0.0 * sum(end[:, :1].float().sum() for end in ends)


@torch.no_grad()
def _still_held(
    positions: torch.Tensor, expiry: torch.Tensor, last: torch.Tensor, window: int, slots: int
) -> torch.Tensor | None:
    """The tokens that are in the eidetic memory after each row's last real token, oldest first.

    Args:
        positions: `[B, S]` of the line, -1 = no token. expiry: `[B, S]`, as indices into the line. last: `[B]` index of
        the last real token.

    Returns:
        `[B, M]` indices into the line, -1 = empty slot; None if M = 0.
    """
    if slots == 0:
        return None
    count = positions.shape[1]
    index = torch.arange(count, device=positions.device)
    last = last[:, None]
    held = (positions >= 0) & (index <= last - window) & (expiry > last)
    place = torch.where(held, index, count)
    order = nn.functional.pad(place, (0, max(slots - count, 0)), value=count).sort(dim=1).values[:, :slots]
    return order.masked_fill(order == count, -1)
