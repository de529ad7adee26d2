"""GatedDeltaFadingMemory: the selective SSM of a layer as a gated delta network (arXiv 2412.06464, section 3).

    z | xBC | dt | b = in_proj(u);  x | B | C = act(conv(xBC));  B, C to length 1;  beta = sigmoid(b)
    y = delta(x, exp(-exp(A_log) softplus(dt + dt_bias)), beta, B, C / sqrt(N))
    y = out_proj(norm(y) * silu(z))

Beside `SSDFadingMemory` (Mamba-2): a token first takes away what the state holds under its key B, so that a key said
again has its last value and not the sum of all; nothing is skipped past the state (no D), and the norm is taken head by
head, with one weight for all heads, before the gate.

With `ssm_expand_rank` the heads of a group have x and B of their own (`expand`), made behind the convolution.

What treats each token by itself runs on the input's columns, convolution and scan on mixer rows (layout_bmojo.py).

Shapes: B rows, T tokens (R', T' in mixer rows), E hidden size, H heads, P channels per head, N state channels, G groups
of heads that share keys and queries, K conv taps.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .delta_ops import predict_delta_input
from .dispatch_bmojo import Kernels
from .fading_bmojo import (
    WHOLE,
    CausalConv,
    GroupedFadingMemory,
    HeadRMSNorm,
    Prediction,
    SSMScalars,
    expand,
    for_heads,
)
from .fields_bmojo import reject
from .layout_bmojo import to_columns, to_rows
from .linear_bmojo import project
from .states_bmojo import shift


LENGTH_EPS = 1e-6  # of keys and queries, as in transformers and flash-linear-attention


class GatedDeltaFadingMemory(GroupedFadingMemory):
    """The SSM of one layer, which replaces what it holds under a key."""

    name = "gated_delta"
    operations = ("conv", "conv_step", "delta_scan", "delta_step")
    maps = ("in_proj", "out_proj", "keys_down", "keys_up", "values_down", "values_up")
    modules = ("conv", "scalars")
    expands = True
    about = "gated delta rule: one decay and one share per head; a token replaces what stood under its key"
    gates = 2  # numbers per head and token that in_proj makes beside z, x, B and C

    @classmethod
    def check(cls, config):
        super().check(config)
        if not config.ssm_projected:
            rule = f"must be True with ssm_type={cls.name!r}, whose values are made from the projected x"
            reject("ssm_projected", config.ssm_projected, rule, "leave it out")

    @classmethod
    def projections(cls, config):
        return cls.maps if config.ssm_expand_rank is not None else cls.maps[:2]

    @classmethod
    def example(cls, operation, config):
        if operation in ("delta_scan", "delta_step"):
            heads, groups = config.ssm_num_heads, config.ssm_num_groups
            keys = torch.empty(1, 1, groups, config.ssm_state_size)
            x, steps = torch.empty(1, 1, heads, config.ssm_head_dim), torch.empty(1, 1, heads)
            return x, steps, steps, keys, keys
        return super().example(operation, config)

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.heads, self.head_dim, self.state = config.ssm_num_heads, config.ssm_head_dim, config.ssm_state_size
        self.sizes = self.widths(config)
        self.inner = self.heads * self.head_dim
        self.gated = config.ssm_gated
        self.chunk_size = config.ssm_chunk_size
        self.time_step_limit = tuple(config.ssm_time_step_limit)
        self.kernels = Kernels(config)

        # Rows of in_proj: z, then x, B and C, then dt and b.
        self.rows = [self.inner if self.gated else 0, self.channels(config), self.gates * self.heads]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.rows), bias=config.ssm_proj_bias)
        self.conv = CausalConv(self.channels(config), config.ssm_conv_kernel, config.ssm_conv_bias, self.kernels)
        self.act = ACT2FN[config.ssm_conv_act]
        self.scalars = SSMScalars((self.heads,), self.heads, skips=False)
        self.norm = HeadRMSNorm(self.head_dim, self.norm_eps(config)) if config.ssm_norm else None
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=config.ssm_proj_bias)
        self.rank, groups = config.ssm_expand_rank, config.ssm_num_groups
        for name, size in (("values", self.head_dim), ("keys", self.state)) if self.rank is not None else ():
            up = nn.Linear(self.rank, self.heads * size, bias=False)
            up.initial_bound = 0.0
            self.add_module(f"{name}_down", nn.Linear(groups * size, self.rank, bias=False))
            self.add_module(f"{name}_up", up)
            self.register_parameter(f"{name}_repeat", nn.Parameter(torch.empty(self.heads, groups)))

    def initialise(self, config):
        """Fill the maps from groups to heads: each head has its group's, and nothing of its own yet."""
        if self.rank is not None:
            heads, groups = self.keys_repeat.shape
            for repeat in (self.values_repeat, self.keys_repeat):
                init.copy_(repeat, torch.eye(groups).repeat_interleave(heads // groups, dim=0))

    def accept_share(self, config, share):
        if self.rank is not None:
            rule = "must be None where devices share out the heads, because its maps read all groups"
            remedy = "load with tp_plan=BMojoForCausalLM.whole_heads_plan(config)"
            reject("ssm_expand_rank", self.rank, rule, remedy)
        self._cut_grouped(config, share)
        if self.norm is not None:
            self.norm.accept_share(share)

    def forward(self, hidden_states, rows=None, layer=None, predicts=False):
        rows = WHOLE if rows is None else rows
        gate, mixed, steps = self.in_cut(project(self.in_proj, hidden_states)).split(self.rows, dim=-1)
        convolved = [
            self._convolve(part, lengths, layer) for part, lengths in zip(to_rows(rows.layout, mixed), rows.lengths)
        ]
        if self.rank is not None:
            convolved = to_rows(rows.layout, self._expanded(to_columns(rows.layout, convolved)))
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            groups = zip(convolved, to_rows(rows.layout, steps), rows.lengths)
            scanned = [self._scan(*group, layer, predicts) for group in groups]
            y = to_columns(rows.layout, [out for out, _ in scanned]).unflatten(-1, (self.heads, self.head_dim))
            if self.norm is not None:
                y = self.norm(y)
            y = y.flatten(-2)
            if self.gated:
                y = y * F.silu(gate.to(y.dtype))
        y = project(self.out_proj, y.to(mixed.dtype))
        return y, [prediction for _, prediction in scanned] if predicts else None

    def _convolve(self, mixed: torch.Tensor, lengths: torch.Tensor | None, layer: Any) -> torch.Tensor:
        """act(conv(x|B|C)) of mixer rows `[R', T', C]`; `lengths` `[R']` tokens are real and come first, None: all."""
        out = self.act(self.conv(mixed, None if layer is None else layer.conv))
        if layer is not None:
            shift(layer.conv, mixed, lengths)
        return out

    def _expanded(self, mixed: torch.Tensor) -> torch.Tensor:
        """x|B|C `[B, T, C]` with x and B of every head."""
        x, B, C = mixed.split(self.sizes, dim=-1)
        x, B = x.unflatten(-1, (-1, self.head_dim)), B.unflatten(-1, (-1, self.state))
        x = expand(x, self.values_repeat, self.values_down, self.values_up)
        B = expand(B, self.keys_repeat, self.keys_down, self.keys_up)
        return torch.cat([x.flatten(-2), B.flatten(-2), C], dim=-1)

    def _of_heads(self, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return x `[R', T', H, P]`, B and C `[R', T', G, N]` of x|B|C; of every head, where heads share x and B."""
        sizes = self.sizes if self.rank is None else (self.inner, self.sizes[2], self.sizes[2])
        x, B, C = mixed.split(sizes, dim=-1)
        B, C = (each.unflatten(-1, (-1, self.state)) for each in (B, C))
        B = B if B.shape[2] == C.shape[2] else for_heads(B, self.heads)
        return for_heads(x.unflatten(-1, (-1, self.head_dim)), self.heads), B, C

    def _scan(
        self, mixed: torch.Tensor, steps: torch.Tensor, lengths: torch.Tensor | None, layer: Any, predicts: bool
    ) -> tuple[torch.Tensor, Prediction | None]:
        """Return the recurrence of mixer rows in fp32 at least: of x|B|C `[R', T', ...]` and dt|b `[R', T', 2 H]`.

        Returns y `[R', T', H P]` and the prediction, or None.
        """
        wide, tokens = torch.promote_types(mixed.dtype, torch.float32), mixed.shape[1]
        op = "delta_step" if tokens == 1 and layer is not None else "delta_scan"
        x, *keys = self._of_heads(mixed.to(wide))
        B, C = (each * torch.rsqrt(each.square().sum(-1, keepdim=True) + LENGTH_EPS) for each in keys)
        log_decay, beta = self._shares(steps.to(wide), lengths)
        # A copy where a backward pass may still need what the state was; else a step writes into it.
        state = None if layer is None else layer.ssm.to(wide, copy=torch.is_grad_enabled())
        prediction = None
        if predicts:
            with torch.no_grad():
                said = predict_delta_input(x, log_decay, beta, B, state, self.chunk_size)
                prediction = x.flatten(2).detach(), said.flatten(2)
        y, after = self.kernels.run(op, x, log_decay, beta, B, C * self.state**-0.5, state, self.chunk_size)
        if layer is not None and after is not layer.ssm:
            layer.ssm.copy_(after.detach())
        return y.flatten(2), prediction

    def _time_step(self, dt: torch.Tensor) -> torch.Tensor:
        """softplus, clamped."""
        dt = F.softplus(dt)
        return dt if self.time_step_limit == (0.0, math.inf) else dt.clamp(*self.time_step_limit)

    def _shares(self, steps: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log decays and beta `[R', T', H]`, zeros for pads."""
        dt, beta = steps.chunk(2, dim=-1)
        A, dt_bias, _ = self.scalars(steps.dtype)
        log_decay, beta = self._time_step(dt + dt_bias) * A, torch.sigmoid(beta)
        if lengths is not None:
            real = (torch.arange(steps.shape[1], device=steps.device) < lengths[:, None])[..., None]
            log_decay, beta = log_decay * real, beta * real
        return log_decay, beta


__all__ = ["GatedDeltaFadingMemory"]
