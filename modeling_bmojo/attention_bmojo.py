"""Attention of a B'MOJO layer over [eidetic | fading | local], with and without a cache (Algorithm 1, lines 1, 4, 5).

Three evaluations of one rule, "query t sees input s iff s <= t < expiry_s, and fading token y_s iff
s + W <= t < s + W + F":

    no token is beyond the window yet     plain causal attention
    many tokens                           blocks of queries, gathered keys (`attention_ops`)
    one token and a cache                 the cache's entries, updated in place, are exactly what the query sees

Shapes: B rows, T tokens (real ones first), E hidden size, H query heads, G key/value heads, D head dim, W window,
M eidetic slots, F fading tokens, L block length.
"""

import torch
from torch import nn

from .attention_ops import KeySet, banded, causal_attention, gathered, weights_by_position
from .cache_layer_bmojo import BMojoCacheLayer, Past
from .configuration_bmojo import BMojoConfig
from .dispatch_bmojo import Kernels
from .memory_ops import NEVER, retention_key


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
    """RoPE on `[B, T, H, D]` with cos and sin `[B, T, R]`; channels beyond R (partial RoPE) stay as they are."""
    if rotary is None:
        return x
    cos, sin = (value.unsqueeze(2) for value in rotary)
    size = cos.shape[-1]
    turned, still = x[..., :size], x[..., size:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, still], dim=-1) if still.shape[-1] else turned


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
        self.scaling = spec.head_dim**-0.5
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
        if config.qk_norm == "head":
            self.q_norm = BMojoRMSNorm(spec.head_dim, config.rms_norm_eps)
            self.k_norm = BMojoRMSNorm(spec.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        lengths: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
        fading: torch.Tensor | None = None,
        innovation: torch.Tensor | None = None,
        cache: BMojoCacheLayer | None = None,
        columns: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends, and lets the cache take the tokens in.

        Args:
            hidden_states: `[B, T, E]`. lengths: `[B]` real tokens per row, which come first.
            rotary: cos and sin of the tokens' positions. fading: `[B, T, E]` SSM outputs or None.
            innovation: `[B, T]` or None. cache: the layer's states or None.
            columns: if given, the attention weights are returned with one column per token position.

        Returns:
            `[B, T, E]`, and weights `[B, H, T, columns]` or None.
        """
        rotary = rotary if self.use_rope else None
        query = rotate(self.q_norm(self._heads(self.q_proj(hidden_states))), rotary)
        keys, values = self._keys_values(hidden_states, self.k_proj, self.v_proj, rotary)
        faded = None
        if fading is not None and self.spec.fading:
            projections = (self.k_proj, self.v_proj) if self.tied else (self.fading_k_proj, self.fading_v_proj)
            faded = self._keys_values(fading, *projections, rotary)
        live = torch.is_grad_enabled() and any(value.requires_grad for value in (query, keys, values))
        if self.spec.window is None:
            out, weights = self._full(query, keys, values, cache, columns, live)
        elif (cache is None or cache.columns == 0) and query.shape[1] <= self.spec.window:
            out, weights = self._attend(query, keys, values, None, columns)
            if cache is not None:
                cache.commit(keys, values, innovation, faded, lengths, None)
        elif cache is not None and query.shape[1] == 1 and not live:
            out, weights = self._step(query, keys, values, innovation, faded, lengths, cache, columns)
        else:
            out, weights = self._blocks(query, keys, values, innovation, faded, lengths, cache, columns)
        if self.training and fading is not None:
            out = out + _zero_anchor(fading, faded).to(out.dtype)
        return self.o_proj(out.flatten(2)), weights if columns is not None else None

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _keys_values(self, x, k_proj, v_proj, rotary) -> tuple[torch.Tensor, torch.Tensor]:
        return rotate(self.k_norm(self._heads(k_proj(x))), rotary), self._heads(v_proj(x))

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
        empty = cache.columns == 0
        all_keys, all_values = cache.append(keys, values, live)
        if empty:
            return self._attend(query, keys, values, None, columns)
        slot = torch.arange(all_keys.shape[1], device=query.device)
        now = cache.seen[:, None] + torch.arange(query.shape[1], device=query.device)
        return self._attend(query, all_keys, all_values, slot <= now[..., None], columns)

    def _step(self, query, keys, values, innovation, faded, lengths, cache: BMojoCacheLayer, columns):
        """One token: the cache admits, forgets and takes it in; its entries are then exactly what the token sees."""
        # A row that reads a pad sees anything at all: a softmax over nothing would be NaN.
        visible = cache.step(keys, values, innovation, faded, lengths, self.decay) | (lengths == 0)[:, None]
        out, weights = self._attend(query, cache.keys, cache.values, visible[:, None], columns)
        if columns is not None:
            weights = weights_by_position(weights, cache.positions, columns)
        return out, weights

    def _blocks(self, query, keys, values, innovation, faded, lengths, cache: BMojoCacheLayer | None, columns):
        """Many tokens: list the tokens from old to new, select, and offer each block of queries its keys."""
        spec, tokens = self.spec, query.shape[1]
        seen = lengths.new_zeros(lengths.shape) if cache is None else cache.seen
        past = cache.recall() if cache is not None and cache.columns > 0 else None
        offset = torch.arange(tokens, device=query.device)
        positions = torch.where(offset < lengths[:, None], seen[:, None] + offset, -1)
        if innovation is None:
            innovation = torch.zeros(positions.shape, dtype=torch.float32, device=query.device)
        line = Past(keys, values, positions, innovation, *(faded or (None, None)), positions if faded else None)
        held = window = 0
        if past is not None:
            held, window = spec.slots, spec.window
            line = Past(*(None if new is None else torch.cat([old.to(new), new], 1) for old, new in zip(past, line)))

        block = min(self.block, tokens)
        valid = line.positions >= 0
        ranked = retention_key(line.innovations, line.positions, self.decay)
        chosen = self.kernels.run("expiry", ranked, valid, spec.window, spec.slots, block, tokens, held, window)
        coordinate = torch.arange(-held - window, tokens, device=query.device).expand(valid.shape)
        # A pad sees itself, so that no softmax is empty; nobody else does, because pads come last.
        end = torch.where(valid | (coordinate < 0), chosen.expiry, coordinate + 1)
        tokens_seen = KeySet(line.keys, line.values, coordinate, end, line.positions, -held - window)
        blocks = -(-tokens // block)
        local = KeySet(*(value[:, held:] for value in tokens_seen[:5]), -window)
        offers = [banded(local, 1 - spec.window, 0, blocks, block)]
        if spec.slots:
            offers.append(gathered(tokens_seen, chosen.slots))
        if faded:
            offers.append(self._fading_offer(line, blocks, block, tokens))
        out, weights = self.kernels.run(
            "memory_attention", query, offers, block, **self._softmax_options(columns), columns=columns
        )
        if cache is not None:
            eidetic = _still_held(line, coordinate, chosen.expiry, lengths, spec.window, spec.slots)
            cache.commit(keys, values, innovation, faded, lengths, eidetic)
        return out, weights

    def _fading_offer(self, line: Past, blocks: int, block: int, tokens: int):
        """SSM outputs are seen from W tokens after they were made, F of them at a time."""
        window, fading = self.spec.window, self.spec.fading
        count = line.fading_keys.shape[1]
        coordinate = torch.arange(tokens - count, tokens, device=line.keys.device).expand(line.fading_positions.shape)
        end = torch.where(line.fading_positions >= 0, coordinate + window + fading, -NEVER)
        keyset = KeySet(
            line.fading_keys,
            line.fading_values,
            coordinate + window,
            end,
            line.fading_positions,
            tokens - count,
        )
        return banded(keyset, 1 - window - fading, -window, blocks, block)


def _zero_anchor(fading: torch.Tensor, faded: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Zero, but connected to the fading memory: where no query sees it yet, its parameters get a gradient of zero.

    Data-parallel training waits for a gradient of every parameter and would otherwise stop at the first short batch.
    """
    ends = (fading,) if faded is None else faded
    return 0.0 * sum(end[:, :1].float().mean() for end in ends)


@torch.no_grad()
def _still_held(
    line: Past, coordinate: torch.Tensor, expiry: torch.Tensor, lengths: torch.Tensor, window: int, slots: int
) -> Past | None:
    """The tokens that are in the eidetic memory after each row's last real token, oldest first, as M slots."""
    if slots == 0:
        return None
    last = lengths[:, None] - 1
    held = (line.positions >= 0) & (coordinate <= last - window) & (expiry > last)
    count = held.shape[1]
    place = torch.where(held, torch.arange(count, device=held.device), count)
    order = torch.nn.functional.pad(place, (0, max(slots - count, 0)), value=count).sort(dim=1).values[:, :slots]
    empty = order == count
    order = order.clamp(max=count - 1)
    rows = torch.arange(order.shape[0], device=order.device)[:, None]
    keys, values = line.keys[rows, order], line.values[rows, order]
    positions = line.positions.gather(1, order).masked_fill(empty, -1)
    return Past(keys, values, positions, line.innovations.gather(1, order), None, None, None)
