"""S6FadingMemory: the selective SSM of a layer in Mamba's form (arXiv 2312.00752, figure 3), the one of B'MOJO's paper.

    x | z = in_proj(u);  x = act(conv(x));  r | B | C = x_proj(x);  dt = softplus(dt_proj(r) + dt_bias)
    y = out_proj((s6(x, dt, A, B, C) + D x) * silu(z))

Beside `SSDFadingMemory` (Mamba-2): every channel has N decays and a time step of its own, B and C are shared by all
channels and read from the convolved x, the convolution covers x alone, and nothing is normalised.

All four projections run on the input's columns, convolution and scan on mixer rows (layout_bmojo.py).

Shapes: B rows, T tokens (R', T' in mixer rows), E hidden size, I inner width (heads times channels per head), N state
channels, R rank of the time step, K conv taps.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from .dispatch_bmojo import Kernels
from .fading_bmojo import WHOLE, CausalConv, FadingMemory, Prediction, SSMScalars
from .fields_bmojo import reject, require_int
from .layout_bmojo import to_columns, to_rows
from .linear_bmojo import project
from .s6_ops import predict_s6_input
from .share_bmojo import Cut
from .states_bmojo import shift


class S6FadingMemory(FadingMemory):
    """The SSM of one layer, N decays and a time step per channel.

    `scalars.dt_bias` is Mamba's `dt_proj.bias`: there, because it decides the time step and is too fine for bf16.
    """

    name = "mamba"
    operations = ("conv", "conv_step", "s6_scan", "s6_step")
    maps = ("in_proj", "x_proj", "dt_proj", "out_proj")
    modules = ("conv", "scalars")
    about = "Mamba (S6): N decays and a time step per channel; B and C shared by all channels (the paper's)"

    @classmethod
    def fill(cls, config):
        if config.ssm_num_groups is None:
            config.ssm_num_groups = 1
        if config.ssm_norm is None:
            config.ssm_norm = False
        if config.ssm_time_step_rank is None:
            config.ssm_time_step_rank = math.ceil(config.hidden_size / 16)

    @classmethod
    def check(cls, config):
        require_int(config, "ssm_time_step_rank", 1, "give a positive size, or None for hidden_size / 16")
        if config.ssm_num_groups != 1:
            rule = "must be 1 with ssm_type='mamba', whose B and C are shared by all channels"
            reject("ssm_num_groups", config.ssm_num_groups, rule, "leave it out")
        if not config.ssm_projected:
            rule = "must be True with ssm_type='mamba', whose time steps, B and C are made from the projected x"
            reject("ssm_projected", config.ssm_projected, rule, "leave it out")
        if config.ssm_norm:
            rule = "must be False with ssm_type='mamba', which has no norm after the gate"
            reject("ssm_norm", config.ssm_norm, rule, "leave it out")

    @classmethod
    def example(cls, operation, config):
        if operation in ("s6_scan", "s6_step"):
            inner, state = cls.channels(config), config.ssm_state_size
            x, keys = torch.empty(1, 1, inner), torch.empty(1, 1, state)
            return x, x, torch.empty(inner, state), keys, keys
        return super().example(operation, config)

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.inner, self.state = self.channels(config), config.ssm_state_size
        self.rank = config.ssm_time_step_rank
        self.gated = config.ssm_gated
        self.chunk_size = config.ssm_chunk_size
        self.time_step_limit = tuple(config.ssm_time_step_limit)
        self.kernels = Kernels(config)

        self.in_proj = nn.Linear(config.hidden_size, self.inner * (2 if self.gated else 1), bias=config.ssm_proj_bias)
        self.conv = CausalConv(self.inner, config.ssm_conv_kernel, config.ssm_conv_bias, self.kernels)
        self.act = ACT2FN[config.ssm_conv_act]
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * self.state, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.inner, bias=False)
        self.dt_proj.initial_bound = self.rank**-0.5  # Mamba's own way for what makes the time steps
        self.scalars = SSMScalars((self.inner, self.state), self.inner)
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=config.ssm_proj_bias)

    def accept_share(self, config, share):
        part = share.part(self.inner)
        gates = [slice(self.inner + part.start, self.inner + part.stop)] if self.gated else []
        self.share, self.in_cut = share, Cut(share, [part, *gates])
        self.conv.cut = self.scalars.cut = Cut(share, [part])
        self.inner //= share.size

    def forward(self, hidden_states, rows=None, layer=None, predicts=False):
        rows = WHOLE if rows is None else rows
        layout = rows.layout
        gate_rows = self.inner if self.gated else 0
        mixed, gate = self.in_cut(project(self.in_proj, hidden_states)).split([self.inner, gate_rows], dim=-1)
        x = [self._convolve(part, lengths, layer) for part, lengths in zip(to_rows(layout, mixed), rows.lengths)]
        low_rank, keys = project(self.x_proj, to_columns(layout, x)).split([self.rank, 2 * self.state], dim=-1)
        dt = self.dt_proj(low_rank)
        if self.share is not None:
            keys = self.share.spread(keys)
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            groups = zip(x, to_rows(layout, dt), to_rows(layout, keys), rows.lengths)
            scanned = [self._scan(*group, layer, predicts) for group in groups]
            y = to_columns(layout, [out for out, _ in scanned])
            if self.gated:
                y = y * F.silu(gate.to(y.dtype))
        y = project(self.out_proj, y.to(mixed.dtype))
        return y, [prediction for _, prediction in scanned] if predicts else None

    def _convolve(self, mixed: torch.Tensor, lengths: torch.Tensor | None, layer: Any) -> torch.Tensor:
        """act(conv(x)) of mixer rows `[R', T', I]`."""
        x = self.act(self.conv(mixed, None if layer is None else layer.conv))
        if layer is not None:
            shift(layer.conv, mixed, lengths)
        return x

    def _scan(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        keys: torch.Tensor,
        lengths: torch.Tensor | None,
        layer: Any,
        predicts: bool,
    ) -> tuple[torch.Tensor, Prediction | None]:
        """Return the recurrence of mixer rows in fp32 at least, of x, dt `[R', T', I]` and keys = B|C `[R', T', 2 N]`.

        Returns y `[R', T', I]` and the prediction, or None.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        op = "s6_step" if x.shape[1] == 1 and layer is not None else "s6_scan"
        taken = self.kernels.input_dtype(op, x, wide)
        x = x.to(taken)
        B, C = keys.to(taken).chunk(2, dim=-1)
        A, dt_bias, D = self.scalars(wide)
        dt = F.softplus(dt.to(wide) + dt_bias).clamp(*self.time_step_limit)
        if lengths is not None:
            dt = dt * (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
        # A copy: the state is overwritten below, and a backward pass may still need what it was. The cache holds the
        # channels as [heads, channels per head]. A fresh cache's zeros are not handed over: mamba-ssm takes no state.
        state = None
        if layer is not None and layer.started:
            state = layer.ssm.to(wide, copy=torch.is_grad_enabled()).flatten(1, 2)
        prediction = None
        if predicts:
            with torch.no_grad():
                said = predict_s6_input(x.to(wide), dt, A, B.to(wide), state, self.chunk_size)
                prediction = x.detach(), said
        y, after = self.kernels.run(op, x, dt, A, B, C, D, state, self.chunk_size)
        if layer is not None:
            layer.ssm.copy_(after.detach().reshape(layer.ssm.shape))
        return y, prediction


__all__ = ["S6FadingMemory"]
