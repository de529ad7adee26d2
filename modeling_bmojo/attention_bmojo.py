"""Attention of a B'MOJO layer over [eidetic | fading | local], with and without a cache (Algorithm 1, lines 1, 4, 5).

The layer's memory takes the tokens in and says what their queries see (`layer_memory_bmojo`); one softmax runs over
that (`attention_ops`), for many tokens in blocks of queries, for one token as a block of one. For the first tokens of a
text, which see nothing else, it is plain causal attention.

Projections run on the input's columns `[B, T, E]`, attention on mixer rows, whose real tokens come first
(layout_bmojo.py). Fading tokens are the exception: tied `k_proj` and `v_proj` run a second time, on SSM outputs, of
which a stride takes only some.

Shapes: B rows, T tokens (R and T' where it matters that they are mixer rows), E hidden size, H query heads, G key/value
heads, D head dim, W window, M eidetic slots, F fading tokens, L block length.
"""

from collections.abc import Callable

import torch
from torch import nn

from .attention_ops import Apart, Seen, Whole, causal_attention, joined, step_attention, weights_by_position
from .cache_layer_bmojo import BMojoCacheLayer
from .configuration_bmojo import BMojoConfig
from .dispatch_bmojo import Kernels
from .distance_bmojo import Far, rotate
from .fading_bmojo import Prediction
from .fading_tokens_bmojo import FadingTokens
from .layer_memory_bmojo import LayerMemory
from .layout_bmojo import Rows, Turns, to_columns, to_rows
from .linear_bmojo import listeners, project
from .memory_ops import at_least_fp32, cast
from .parts_bmojo import Tokens
from .share_bmojo import HEADS_STYLE, Cut, Share
from .sketch_bmojo import KeySketch


class BMojoRMSNorm(nn.Module):
    """RMSNorm over the last dimension, computed in fp32 at least."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.share: Share | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = at_least_fp32(x)
        weight, squares = self.weight, wide.square().mean(-1, keepdim=True)
        if self.share is not None:
            weight, squares = self._of_heads(squares, x.shape[-1])
        normed = wide * torch.rsqrt(squares + self.eps)
        return weight * cast(normed, x.dtype)

    def _of_heads(self, squares: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weight and the mean square for a device's heads, of a norm of each head or of all heads together,
        of which `size` channels are here."""
        share, whole = self.share, len(self.weight)
        if size == whole:
            return share.spread(self.weight), squares
        return Cut(share, [share.part(whole)])(self.weight), share.total(squares) / share.size

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class BMojoAttention(nn.Module):
    """Multi-head attention with B'MOJO's memories; also a plain windowed or full attention, by its layer's type.

    Args:
        config: the model's configuration. layer_idx: which layer.
    """

    def __init__(self, config: BMojoConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.accept_memory(LayerMemory(config, layer_idx))
        self.head_dim = size = config.head_dim
        multiplier = config.attention_multiplier
        self.scaling = size**-0.5 if multiplier is None else multiplier
        self.block = config.memory_block_size
        self.dropout = config.attention_dropout
        self.kernels = Kernels(config)
        self.use_rope = config.no_rope_layers is None or bool(config.no_rope_layers[layer_idx])

        query_size, key_size = config.num_attention_heads * size, config.num_key_value_heads * size
        bias = config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        self.tied = config.tie_fading_projections
        if self.spec.fading and not self.tied:
            self.fading_k_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
            self.fading_v_proj = nn.Linear(config.hidden_size, key_size, bias=bias)
        self.asks_apart = bool(self.spec.fading) and not config.tie_fading_queries
        if self.asks_apart:
            self.fading_q_proj = nn.Linear(config.hidden_size, query_size, bias=bias)
        self.norm_joins_heads = config.qk_norm == "full"
        sizes = (query_size, key_size) if self.norm_joins_heads else (size, size)
        for prefix in ("", *("fading_",) * self.asks_apart):
            for name, each in zip(("q_norm", "k_norm"), sizes):
                norm = nn.Identity() if config.qk_norm is None else BMojoRMSNorm(each, config.rms_norm_eps)
                setattr(self, prefix + name, norm)
        self.heads_here = config.num_attention_heads, config.num_key_value_heads
        sketched = self.spec.stored > 0 and config.storage_sketch_size is not None
        self.sketch = KeySketch(config) if sketched else None

    def accept_memory(self, memory: LayerMemory) -> None:
        """Read with this memory from now on."""
        self.memory, self.spec = memory, memory.spec
        self._fading_part = memory.part(FadingTokens)

    def accept_share(self, config: BMojoConfig, share: Share) -> None:
        """Attend with this share of the heads from now on; the memory that it takes says so, too."""
        local = share.config(config)
        self.heads_here = local.num_attention_heads, local.num_key_value_heads
        apart = (self.fading_q_norm, self.fading_k_norm) if self.asks_apart else ()
        for norm in (self.q_norm, self.k_norm, *apart):
            norm.share = share
        if self.sketch is not None:
            self.sketch.cut = Cut(share, [share.part(config.num_key_value_heads)])

    def forward(
        self,
        hidden_states: torch.Tensor,
        rows: Rows,
        fading: torch.Tensor | None = None,
        predictions: list[Prediction] | None = None,
        cache: BMojoCacheLayer | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend, and let the cache take the tokens in.

        Args:
            hidden_states: `[B, T, E]`. rows: how they are cut into mixer rows, and where those stand. If
                `rows.columns` is given, the attention weights are returned with one column per token position.
            fading: `[B, T, E]` SSM outputs or None. predictions: what the SSM said of its inputs, if the innovation
                test asks for that.
            cache: the layer's states or None.

        Returns:
            `[B, T, E]`, and weights `[B, H, T, S]` or None.
        """
        query = self._normed_heads(project(self.q_proj, hidden_states), self.q_norm)
        keys, values = self._keys_values(hidden_states, self.k_proj, self.v_proj, self.k_norm)
        own = self._fading_queries(hidden_states) if self.asks_apart and fading is not None else None
        self._check_heads(query.shape[2], keys.shape[2])
        needs_grad = torch.is_grad_enabled() and any(value.requires_grad for value in (query, keys, values))
        none = [None] * len(rows.lengths)
        groups = zip(
            *(to_rows(rows.layout, value) for value in (query, keys, values)),
            self._signals(fading, predictions, rows),
            none if fading is None or not self.spec.fading else self._fading_rows(fading, rows),
            none if own is None else to_rows(rows.layout, own),
            rows.lengths,
            rows.rotary if self.use_rope else none,
        )
        turns = rows.turns if self.use_rope else None
        mixed = [self._mix(*group, cache, rows.columns, needs_grad, turns) for group in groups]
        out = project(self.o_proj, to_columns(rows.layout, [part for part, _ in mixed]).flatten(2))
        if self.training and fading is not None and not self.spec.fading:
            out = out + _zero_anchor((fading,)).to(out.dtype)
        if rows.columns is None:
            return out, None
        weights = mixed[0][1]
        return out, weights if rows.layout is None else rows.layout.merge_weights(weights)

    def _check_heads(self, query_heads: int, key_heads: int) -> None:
        """Raise ValueError unless the heads are here that the layer knows of: a device with others would judge tokens
        by those alone, and keep other tokens than the next device."""
        wanted = self.heads_here
        if (query_heads, key_heads) != wanted:
            raise ValueError(
                f"layer {self.layer_idx}: q_proj and k_proj give {query_heads} and {key_heads} heads, and the layer "
                f"knows of {wanted[0]} and {wanted[1]} here; in a tp_plan of your own either let 'layers.*' be "
                f"{HEADS_STYLE!r} and q_proj, k_proj and v_proj 'colwise', or take BMojoForCausalLM.whole_heads_plan("
                "config), or leave the plan out."
            )

    def _signals(self, fading: torch.Tensor | None, predictions: list[Prediction] | None, rows: Rows) -> list:
        """Return what the innovation test judges by, for each group of mixer rows; None where that is the keys, or
        nothing."""
        signal = self.memory.signal
        if signal == "output" and fading is not None:
            return to_rows(rows.layout, fading)
        if signal == "prediction" and fading is not None:
            if predictions is None:
                raise ValueError(
                    f"innovation={self.memory.innovation.name!r}: judges by what the SSM says of its inputs, and "
                    f"ssm_type={self.config.ssm_type!r} says nothing; take another test, or let its forward return it."
                )
            return predictions
        return [None] * len(rows.lengths)

    def _mix(self, query, keys, values, signal, fading, own, lengths, rotary, cache, columns, needs_grad, turns):
        """Attention of one group of mixer rows, which the cache takes in.

        Args:
            query `[R, T', H, D]`, keys, values `[R, T', G, D]`: without positions. signal: what `_signals` gives.
            fading: what `_fading_rows` gives, or None. own: what asks fading tokens, if not `query`.
            lengths: `[R]` real tokens, or None: all T'.

        Returns:
            `[R, T', H, D]`, and weights `[R, H, T', columns]` or None.
        """
        tokens = query.shape[1]
        steps = cache is not None and cache.started and tokens == 1 and not needs_grad
        innovation = None
        # Without a cache nobody asks while no token is beyond the window.
        if self.memory.innovation is not None and (cache is not None or tokens > self.spec.window):
            innovation = self._innovation(keys, signal, lengths, cache, steps)
        sketches, asked = (None, None) if self.sketch is None else self._sketches(query, keys, turns)
        far = self._far(query, turns)
        query, keys = rotate(query, rotary), rotate(keys, rotary)
        own = None if own is None else rotate(own, rotary)
        counted = steps and cache.counts(lengths)
        fading_tokens = self._fading_tokens(fading, rotary, cache, steps, counted)
        front, block = self.memory.front(tokens, cache), self.block if self.spec.window else tokens
        how = (front, block, steps, counted, needs_grad, self.memory.takes_left)
        how = (*how, self.scaling, sketches, asked, far, own is not None)
        new = Tokens(query, keys, values, innovation, lengths, fading_tokens, *how)
        offers = self.memory.observe(new, cache, self.kernels)
        out, weights = self._attend(query, keys, values, offers, front, columns, own)
        if self.training and fading is not None:
            ends = (*fading, *(fading_tokens or ()), *(() if own is None else (own,)))
            out = out + _zero_anchor(ends).to(out.dtype)
        return out, weights

    def _innovation(self, keys, signal, lengths, cache, steps: bool) -> torch.Tensor:
        """Return the test's score `[R, T']`, with a gradient if one is wanted and the configuration has one."""
        test, judged = self.memory.innovation, keys if signal is None else signal
        of = judged if isinstance(judged, tuple) else (judged,)
        learns = not steps and self.config.innovation_gradient > 0 and any(each.requires_grad for each in of)
        learns = learns and torch.is_grad_enabled()
        with torch.set_grad_enabled(learns):
            innovation = test.score(judged, lengths, cache, self.kernels)
        if innovation.shape != keys.shape[:2]:
            raise ValueError(
                f"innovation={test.name!r}: scored {list(innovation.shape)} for tokens {list(keys.shape[:2])}; return "
                "one number per row and token."
            )
        if learns and not innovation.requires_grad:
            raise ValueError(
                f"innovation_gradient={self.config.innovation_gradient}: innovation={test.name!r} gives its scores no "
                "gradient; compute them with one where torch.is_grad_enabled(), or set innovation_gradient=0."
            )
        if learns and cache is not None:
            for name in test.states(self.config):
                if getattr(cache, name).requires_grad:
                    raise ValueError(
                        f"innovation={test.name!r}: its state {name!r} was moved on with a gradient, which would "
                        "never be freed; move states on under torch.no_grad()."
                    )
        # Every device has the gradient of its own heads' values; the score is one for all.
        return innovation if test.share is None else test.share.spread(innovation)

    def _sketches(self, query, keys, turns: Turns | None) -> tuple[torch.Tensor, Callable[[], torch.Tensor]]:
        """Return sketches of keys without positions, and what makes those of such queries (`KeySketch`): while all that
        is stored is fetched, nobody asks."""

        def asked() -> torch.Tensor:
            with torch.no_grad():
                return self.sketch.queries(rotate(query, None if turns is None else turns.at_window), self.scaling)

        return self.sketch.keys(keys), asked

    def _far(self, query, turns: Turns | None) -> Far | None:
        """Return what pairs beyond `max_rope_distance` need, of queries without positions."""
        if turns is None or turns.at_limit is None or self.spec.kind != "bmojo":
            return None
        config = self.config
        bounds = config.max_rope_distance, config.max_rope_distance_start
        return Far(*bounds, rotate(query, turns.at_limit), turns.turn, self.scaling)

    def _attend(self, query, keys, values, offers, front: int, columns: int | None, own=None):
        """One softmax per query over the offers; the first `front` queries see the tokens before them.

        Args:
            own: queries `[R, T', H, D]` of what is `Apart`, or None.
        """
        if front == 0:
            return self._attend_offers(query, offers, columns, own)
        out, weights = self._attend_offers(query[:, :front], [Whole(keys[:, :front], values[:, :front])], columns)
        if front == query.shape[1]:
            return out, weights
        own = None if own is None else own[:, front:]
        rest, rest_weights = self._attend_offers(query[:, front:], offers, columns, own)
        if columns is not None:
            weights = torch.cat([nn.functional.pad(weights, (0, columns - front)), rest_weights], dim=2)
        return torch.cat([out, rest], dim=1), weights

    def _attend_offers(self, query, offers, columns: int | None, own=None) -> tuple[torch.Tensor, torch.Tensor | None]:
        options = self._softmax_options(columns)
        if own is not None:
            return self._attend_apart(query, own, offers, columns, options)
        if len(offers) == 1 and isinstance(offers[0], Whole):
            keys, values, visible, position = offers[0]
            out, weights = causal_attention(
                query, cast(keys, query.dtype), cast(values, query.dtype), visible, **options
            )
            if columns is not None and position is not None:
                weights = weights_by_position(weights, position, columns)
            return out, weights
        if all(isinstance(each, Seen) for each in offers) and not options["dropout"]:
            return step_attention(query, offers, self.scaling, columns)
        block = min(self.block if self.spec.window else query.shape[1], query.shape[1])
        return self.kernels.run("memory_attention", query, offers, block, **options, columns=columns)

    def _attend_apart(self, query, own, offers, columns: int | None, options: dict):
        """Do the same with what is `Apart` asked by the queries `own`."""
        bare = [each.offer if isinstance(each, Apart) else each for each in offers]
        if all(isinstance(each, Seen) for each in bare) and not options["dropout"]:
            pairs = zip(bare, offers)
            asked = [seen._replace(query=own) if isinstance(each, Apart) else seen for seen, each in pairs]
            return step_attention(query, asked, self.scaling, columns)
        query, offers = joined(query, own, offers)
        block = min(self.block, query.shape[1])
        out, weights = self.kernels.run("memory_attention", query, offers, block, **options, columns=columns)
        return out[..., : self.head_dim], weights

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _normed_heads(self, x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        return self._heads(norm(x)) if self.norm_joins_heads else norm(self._heads(x))

    def _keys_values(
        self, x: torch.Tensor, k_proj: nn.Module, v_proj: nn.Module, k_norm: nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys, without positions, and values of x `[B, T, E]`: `[B, T, G, D]` each."""
        return self._normed_heads(project(k_proj, x), k_norm), self._heads(project(v_proj, x))

    def _fading_queries(self, x: torch.Tensor) -> torch.Tensor:
        """Return what asks fading tokens, without positions, of x `[B, T, E]`: `[B, T, H, D]`."""
        return self._normed_heads(project(self.fading_q_proj, x), self.fading_q_norm)

    def _fading_projections(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Return what makes keys and values of fading tokens, and the norm of the keys."""
        norm = self.fading_k_norm if self.asks_apart else self.k_norm
        return (self.k_proj, self.v_proj, norm) if self.tied else (self.fading_k_proj, self.fading_v_proj, norm)

    def check_hooks(self, rows: Rows, columns: int) -> None:
        """Refuse hooks on tied projections that would look at other columns than the `columns` of the input.

        Raises:
            ValueError: if there are some.
        """
        if not (self.tied and self._moves_columns(rows, columns)):
            return
        heard = self._listeners(rows, *self._fading_projections()[:2])
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
        """Return hooks on these modules that may look at columns."""
        packed = rows.layout is not None and rows.layout.packed
        return [hook for module in modules for hook in listeners(module, packed)]

    def _fading_rows(self, fading: torch.Tensor, rows: Rows) -> list[tuple[torch.Tensor, ...]]:
        """Return what fading tokens are made of, by group of mixer rows: SSM outputs `[R, T', E]`, of which
        `_fading_tokens` projects those that become one.

        Where somebody listens to the projections it is their keys and values `[R, T', G, D]` instead: a stride, or
        the mixer rows, would show the listener other columns than the input's.
        """
        if not self._moves_columns(rows, fading.shape[1]):
            return [(part,) for part in to_rows(rows.layout, fading)]
        projections, made_of = self._fading_projections(), (fading,)
        if self._listeners(rows, *projections):
            made_of = self._keys_values(fading, *projections)
        return list(zip(*(to_rows(rows.layout, value) for value in made_of)))

    def _fading_tokens(self, fading, rotary, cache: BMojoCacheLayer | None, steps: bool, counted: bool):
        """Return keys and values `[R, n, G, D]` of the fading tokens, which are made of what `_fading_rows` gives, or
        None.

        They stand at positions s - 1, 2 s - 1, ... of each row; behind a row's last one may stand others, which
        pads alone see. A single step makes one of its only output, and the part knows whether to take it.
        """
        if fading is None or (steps and not self._fading_part.makes_one(counted, cache)):
            return None
        made_of, stride, tokens = fading, self.spec.stride, fading[0].shape[1]
        if stride > 1 and not steps:
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


def _zero_anchor(ends: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Zero, but connected to the fading memory's `ends`: where no query sees it yet, its parameters get a gradient of
    zero.

    Data-parallel training waits for a gradient of every parameter and would otherwise stop at the first short batch.
    """
    return 0.0 * sum(end[:, :1].float().sum() for end in ends)
