"""GatedDeltaFadingMemory: the selective SSM of a layer as a gated delta network (arXiv 2412.06464, section 3).

    z | xBC | dt | b = in_proj(u);  x | B | C = act(conv(xBC));  B, C to length 1;  beta = sigmoid(b)
    y = delta(x, exp(-exp(A_log) softplus(dt + dt_bias)), beta, B, C / sqrt(N))
    y = out_proj(norm(y) * silu(z))

Beside `SSDFadingMemory` (Mamba-2): a token first takes away what the state holds under its key B, so that a key said
again has its last value and not the sum of all; nothing is skipped past the state (no D), and the norm is taken head by
head, with one weight for all heads, before the gate.

What treats each token by itself runs on the input's columns, convolution and scan on mixer rows (layout_bmojo.py).

Shapes: B rows, T tokens (R', T' in mixer rows), E hidden size, H heads, P channels per head, N state channels, G groups
of heads that share keys and queries, K conv taps.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from .delta_ops import predict_delta_input
from .dispatch_bmojo import Kernels
from .fading_bmojo import WHOLE, CausalConv, GroupedFadingMemory, Prediction, SSMScalars
from .fields_bmojo import reject
from .layout_bmojo import to_columns, to_rows
from .linear_bmojo import project
from .share_bmojo import UNCUT, Cut
from .states_bmojo import shift


LENGTH_EPS = 1e-6  # of keys and queries, as in transformers and flash-linear-attention


class HeadRMSNorm(nn.Module):
    """RMSNorm over the channels of each head `[..., H, P]`, one weight for all heads."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps
        self.cut = UNCUT

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cut(self.weight) * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


class GatedDeltaFadingMemory(GroupedFadingMemory):
    """The SSM of one layer, which replaces what it holds under a key."""

    name = "gated_delta"
    operations = ("conv", "conv_step", "delta_scan", "delta_step")
    maps = ("in_proj", "out_proj")
    modules = ("conv", "scalars")
    about = "gated delta rule: one decay and one share per head; a token replaces what stood under its key"

    @classmethod
    def check(cls, config):
        super().check(config)
        if not config.ssm_projected:
            rule = "must be True with ssm_type='gated_delta', whose values are made from the projected x"
            reject("ssm_projected", config.ssm_projected, rule, "leave it out")

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
        self.groups = config.ssm_num_groups
        self.inner = self.heads * self.head_dim
        self.gated = config.ssm_gated
        self.chunk_size = config.ssm_chunk_size
        self.time_step_limit = tuple(config.ssm_time_step_limit)
        self.kernels = Kernels(config)

        # Rows of in_proj: z, then x, B and C, then dt and b.
        self.rows = [self.inner if self.gated else 0, self.channels(config), 2 * self.heads]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.rows), bias=config.ssm_proj_bias)
        self.conv = CausalConv(self.channels(config), config.ssm_conv_kernel, config.ssm_conv_bias, self.kernels)
        self.act = ACT2FN[config.ssm_conv_act]
        self.scalars = SSMScalars((self.heads,), self.heads, skips=False)
        self.norm = HeadRMSNorm(self.head_dim, config.rms_norm_eps) if config.ssm_norm else None
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=config.ssm_proj_bias)

    def accept_share(self, config, share):
        self._cut_grouped(config, share)
        if self.norm is not None:
            self.norm.cut = Cut(share, [slice(0, self.head_dim)])  # one weight for the heads of all devices

    def forward(self, hidden_states, rows=None, layer=None, predicts=False):
        rows = WHOLE if rows is None else rows
        gate, mixed, steps = self.in_cut(project(self.in_proj, hidden_states)).split(self.rows, dim=-1)
        convolved = [
            self._convolve(part, lengths, layer) for part, lengths in zip(to_rows(rows.layout, mixed), rows.lengths)
        ]
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

    def _scan(
        self, mixed: torch.Tensor, steps: torch.Tensor, lengths: torch.Tensor | None, layer: Any, predicts: bool
    ) -> tuple[torch.Tensor, Prediction | None]:
        """Return the recurrence of mixer rows in fp32 at least: of x|B|C `[R', T', C]` and dt|b `[R', T', 2 H]`.

        Returns y `[R', T', H P]` and the prediction, or None.
        """
        wide, tokens = torch.promote_types(mixed.dtype, torch.float32), mixed.shape[1]
        op = "delta_step" if tokens == 1 and layer is not None else "delta_scan"
        x, keys = mixed.to(wide).split([self.inner, 2 * self.groups * self.state], dim=-1)
        x = x.unflatten(-1, (self.heads, self.head_dim))
        keys = keys.unflatten(-1, (2, self.groups, self.state))
        B, C = (keys * torch.rsqrt(keys.square().sum(-1, keepdim=True) + LENGTH_EPS)).unbind(-3)
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

    def _shares(self, steps: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log decays and beta `[R', T', H]`, zeros for pads."""
        dt, beta = steps.chunk(2, dim=-1)
        A, dt_bias, _ = self.scalars(steps.dtype)
        dt = F.softplus(dt + dt_bias)
        if self.time_step_limit != (0.0, math.inf):
            dt = dt.clamp(*self.time_step_limit)
        log_decay, beta = dt * A, torch.sigmoid(beta)
        if lengths is not None:
            real = (torch.arange(steps.shape[1], device=steps.device) < lengths[:, None])[..., None]
            log_decay, beta = log_decay * real, beta * real
        return log_decay, beta


__all__ = ["GatedDeltaFadingMemory"]
