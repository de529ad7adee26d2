"""SSDFadingMemory: the selective SSM of a layer in Mamba-2's form (arXiv 2405.21060, figure 6).

    z | xBC | dt = in_proj(u);  x | B | C = act(conv(xBC));  y = ssd(x, softplus(dt + dt_bias), A, B, C) + D x
    y = out_proj(norm(y * silu(z)))

With `ssm_qk_norm` every head of B and C is normalised before the convolution. With `ssm_projected=False` x is u itself
and y goes out as it is: in_proj has no x rows, and there is no out_proj.

What treats each token by itself (in_proj, gate, norm, out_proj) runs on the input's columns, convolution and scan on
mixer rows (layout_bmojo.py).

Shapes: B rows, T tokens, R rows and T' tokens of a group of mixer rows, E hidden size, H heads, P channels per head,
N state channels, G groups, K conv taps.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from .dispatch_bmojo import Kernels
from .fading_bmojo import (
    KEY_NORM_EPS,
    WHOLE,
    CausalConv,
    GroupedFadingMemory,
    HeadRMSNorm,
    Prediction,
    SSMScalars,
    for_heads,
)
from .layout_bmojo import to_columns, to_rows
from .linear_bmojo import project
from .memory_ops import at_least_fp32, cast, wide_dtype
from .share_bmojo import UNCUT, Cut, Share
from .ssm_ops import predict_input
from .states_bmojo import shift


class GroupedRMSNorm(nn.Module):
    """RMSNorm over equal groups of channels, as Mamba-2 normalises its gated output."""

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.groups = groups
        self.eps = eps
        self.cut, self.share = UNCUT, None

    def accept_share(self, share: Share) -> None:
        """Norm the channels of this share of the heads from now on."""
        self.cut, self.share = Cut(share, [share.part(len(self.weight))]), share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = self.groups if self.share is None else max(self.groups // self.share.size, 1)
        wide = at_least_fp32(x).unflatten(-1, (groups, -1))
        squares = wide.square().mean(-1, keepdim=True)
        if self.share is not None and self.groups < self.share.size:
            squares = self._over_devices(squares)
        normed = wide * torch.rsqrt(squares + self.eps)
        return self.cut(self.weight) * cast(normed.flatten(-2), x.dtype)

    def _over_devices(self, mean: torch.Tensor) -> torch.Tensor:
        """Return the mean `[..., 1, 1]` over all channels of the group of which several devices have some each."""
        group = self.share.groups(self.groups).start
        placed = F.pad(mean, (0, 0, group, self.groups - 1 - group))
        return self.share.total(placed).narrow(-2, group, 1) * (self.groups / self.share.size)


class SSDFadingMemory(GroupedFadingMemory):
    """The SSM of one layer, a decay per head."""

    name = "mamba2"
    operations = ("conv", "conv_step", "chunk_scan", "scan_step")
    maps = ("in_proj", "out_proj")
    modules = ("conv", "scalars")
    about = "Mamba-2: one decay and one time step per head; heads share B and C in groups"

    @classmethod
    def projections(cls, config):
        return cls.maps if config.ssm_projected else ("in_proj",)

    @classmethod
    def example(cls, operation, config):
        if operation in ("chunk_scan", "scan_step"):
            heads, groups = config.ssm_num_heads, config.ssm_num_groups
            keys = torch.empty(1, 1, groups, config.ssm_state_size)
            x, dt = torch.empty(1, 1, heads, config.ssm_head_dim), torch.empty(1, 1, heads)
            return x, dt, torch.empty(heads), keys, keys
        return super().example(operation, config)

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.heads, self.head_dim, self.state = config.ssm_num_heads, config.ssm_head_dim, config.ssm_state_size
        self.sizes = self.widths(config)
        self.inner = self.heads * self.head_dim
        self.gated = config.ssm_gated
        self.projected = config.ssm_projected
        self.chunk_size = config.ssm_chunk_size
        self.time_step_limit = tuple(config.ssm_time_step_limit)
        self.kernels = Kernels(config)

        # Rows of in_proj: z, then x (if projected), B and C, then dt.
        mixed = (self.sizes[0] if self.projected else 0) + sum(self.sizes[1:])
        self.rows = [self.inner if self.gated else 0, mixed, self.heads]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.rows), bias=config.ssm_proj_bias)
        self.conv = CausalConv(self.channels(config), config.ssm_conv_kernel, config.ssm_conv_bias, self.kernels)
        self.act = ACT2FN[config.ssm_conv_act]
        self.scalars = SSMScalars((self.heads,), self.heads)
        normed = self.sizes[2] // self.state  # groups, as many as there are C
        self.norm = GroupedRMSNorm(self.inner, normed, self.norm_eps(config)) if config.ssm_norm else None
        if config.ssm_qk_norm:
            self.B_norm, self.C_norm = (HeadRMSNorm(self.state, KEY_NORM_EPS) for _ in "BC")
        self.normed = config.ssm_qk_norm
        self.out_proj = None
        if self.projected:
            self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=config.ssm_proj_bias)
        self.x_cut = UNCUT

    def accept_share(self, config, share):
        self.x_cut = Cut(share, [share.part(self.inner)])
        self._cut_grouped(config, share)
        norms = (self.norm, self.B_norm, self.C_norm) if self.normed else (self.norm,)
        for norm in norms:
            if norm is not None:
                norm.accept_share(share)

    def forward(self, hidden_states, rows=None, layer=None, predicts=False):
        rows = WHOLE if rows is None else rows
        gate, mixed, dt = self.in_cut(project(self.in_proj, hidden_states)).split(self.rows, dim=-1)
        if self.normed:
            mixed = self._normed(mixed)
        # Autocast narrows conv1d but not a single step, so x goes in as narrow as a projected one would.
        parts = [mixed] if self.projected else [cast(self.x_cut(hidden_states), mixed.dtype), mixed]
        groups = zip(zip(*(to_rows(rows.layout, part) for part in parts)), rows.lengths)
        convolved = [self._convolve(parts, lengths, layer) for parts, lengths in groups]
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            groups = zip(convolved, to_rows(rows.layout, dt), rows.lengths)
            scanned = [self._scan(*inputs, step, real, layer, predicts) for inputs, step, real in groups]
            y = to_columns(rows.layout, [out for out, _ in scanned])
            if self.gated:
                y = y * F.silu(cast(gate, y.dtype))
            if self.norm is not None:
                y = self.norm(y)
        y = cast(y, mixed.dtype)
        if self.out_proj is not None:
            y = project(self.out_proj, y)
        elif self.share is not None:
            y = self.share.gather(y)
        return y, [prediction for _, prediction in scanned] if predicts else None

    def _normed(self, mixed: torch.Tensor) -> torch.Tensor:
        """x|B|C or B|C `[B, T, C']` with every head of B and C normalised."""
        x, *keys = mixed.split([mixed.shape[-1] - sum(self.sizes[1:]), *self.sizes[1:]], dim=-1)
        pairs = zip(keys, (self.B_norm, self.C_norm))
        return torch.cat([x, *(norm(each.unflatten(-1, (-1, self.state))).flatten(-2) for each, norm in pairs)], -1)

    def _convolve(
        self, parts: tuple[torch.Tensor, ...], lengths: torch.Tensor | None, layer: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """act(conv(x|B|C)) of mixer rows `[R, T', C']`, given whole or x apart, which are not joined: no copy of u is
        made. Returns x and B|C; `lengths` `[R]` tokens are real and come first, None: all."""
        if len(parts) > 1 and parts[0].shape[1] == 1:
            parts = [torch.cat(parts, dim=-1)]  # one token is copied sooner than it is convolved in two parts
        convolved, first = [], 0
        for part in parts:
            convolved.append(self.act(self.conv(part, None if layer is None else layer.conv, first)))
            if layer is not None:
                shift(layer.conv, part, lengths, first)
            first += part.shape[-1]
        return convolved if len(convolved) > 1 else convolved[0].split([self.sizes[0], sum(self.sizes[1:])], -1)

    def _scan(
        self,
        x: torch.Tensor,
        keys: torch.Tensor,
        dt: torch.Tensor,
        lengths: torch.Tensor | None,
        layer: Any,
        predicts: bool,
    ) -> tuple[torch.Tensor, Prediction | None]:
        """Return the recurrence of mixer rows in fp32 at least: of x, keys = B|C (`widths`) and dt `[R, T', H]`.
        Returns y `[R, T', H P]` and the prediction, or None."""
        wide, tokens = wide_dtype(x.dtype), dt.shape[1]
        op = "scan_step" if tokens == 1 and layer is not None else "chunk_scan"
        taken = self.kernels.input_dtype(op, x, wide)
        x = for_heads(cast(x, taken).unflatten(-1, (-1, self.head_dim)), self.heads)
        B, C = (each.unflatten(-1, (-1, self.state)) for each in cast(keys, taken).split(self.sizes[1:], dim=-1))
        B = B if B.shape[2] == C.shape[2] else for_heads(B, self.heads)
        A, dt_bias, D = self.scalars(wide)
        dt = F.softplus(cast(dt, wide) + dt_bias)
        if self.time_step_limit != (0.0, math.inf):
            dt = dt.clamp(*self.time_step_limit)
        if lengths is not None:
            dt = dt * (torch.arange(tokens, device=dt.device) < lengths[:, None])[..., None]
        # A copy where a backward pass may still need what the state was; else a step writes into it.
        state = None if layer is None else cast(layer.ssm, wide)
        if state is not None and state is layer.ssm and torch.is_grad_enabled():
            state = state.clone()
        prediction = None
        if predicts:
            with torch.no_grad():
                said = predict_input(x.to(wide), dt, A, B.to(wide), state, self.chunk_size)
                prediction = x.flatten(2).detach(), said.flatten(2)
        y, after = self.kernels.run(op, x, dt, A, B, C, D, state, self.chunk_size)
        if layer is not None and after is not layer.ssm:
            layer.ssm.copy_(after.detach())
        return y.flatten(2), prediction


__all__ = ["SSDFadingMemory"]
