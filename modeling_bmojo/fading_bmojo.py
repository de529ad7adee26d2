"""FadingMemory: the selective SSM of a layer as a module, Mamba-2 in form (arXiv 2405.21060, figure 6).

    z | xBC | dt = in_proj(u);  x | B | C = act(conv(xBC));  y = ssd(x, softplus(dt + dt_bias), A, B, C) + D x
    y = out_proj(norm(y * silu(z)))

With `ssm_projected=False` x is u itself and y goes out as it is: in_proj has no x rows, and there is no out_proj.
The module also measures the innovation of every token on its output or its input (B'MOJO, Algorithm 1, lines 2, 3),
unless the attention does it on its keys (`innovation="key"`).

What treats each token by itself (in_proj, gate, norm, out_proj) runs on the input's columns, convolution and scan on
mixer rows (layout_bmojo.py).

Shapes: B rows, T tokens, R rows and T' tokens of a group of mixer rows, E hidden size, H heads, P channels per head,
N state channels, G groups, K conv taps.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from .cache_layer_bmojo import BMojoCacheLayer
from .configuration_bmojo import BMojoConfig
from .dispatch_bmojo import Kernels
from .inputs_bmojo import Rows
from .layout_bmojo import to_columns, to_rows
from .linear_bmojo import project
from .memory_ops import prediction_error
from .register_bmojo import NoDecay
from .ssm_ops import predict_input


WHOLE = Rows(None, [None], [None], None)  # rows as they stand, all real, without positions


class CausalConv(nn.Module):
    """Depthwise causal convolution. A module of its own, so that adapters can train it in full."""

    def __init__(self, channels: int, kernel: int, bias: bool, kernels: Kernels | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.kernels = Kernels() if kernels is None else kernels

    def forward(self, x: torch.Tensor, history: torch.Tensor | None = None, first: int = 0) -> torch.Tensor:
        """x `[B, T, C']`: all channels, or those from `first` on; history `[B, K - 1, C]`: of all channels."""
        weight, bias = self.weight, self.bias
        if x.shape[-1] < weight.shape[0]:
            part = slice(first, first + x.shape[-1])
            weight, bias = weight[part], None if bias is None else bias[part]
            history = None if history is None else history[..., part]
        if history is not None and torch.is_grad_enabled():
            # A copy: the cache moves it on in place before a backward pass needs it.
            history = history.clone()
        op = "conv_step" if x.shape[1] == 1 and history is not None else "conv"
        # k-bit preparation casts 1-D weights to fp32: cast at the call.
        return self.kernels.run(op, x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), history)


class SSMScalars(NoDecay):
    """Per-head decay, time-step bias and skip. A module of its own, so that adapters can train and save it."""

    def __init__(self, heads: int):
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))

    def forward(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A (negative rates), dt_bias and D, `[H]` each, in `dtype`.

        Copies: FSDP2 frees a module's parameters when its forward is over, and what is an alias of one with them.
        """
        return -torch.exp(self.A_log.to(dtype)), self.dt_bias.to(dtype, copy=True), self.D.to(dtype, copy=True)


class GroupedRMSNorm(nn.Module):
    """RMSNorm over equal groups of channels, as Mamba-2 normalises its gated output."""

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.groups = groups
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (self.groups, -1))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.flatten(-2).to(x.dtype)


def surprise_of_output(
    kernels: Kernels, y: torch.Tensor, taps: int, rows: Rows, cache: BMojoCacheLayer | None
) -> torch.Tensor:
    """Innovation `[B, T]` of SSM outputs `[B, T, E]` against the `taps` before them, which the cache keeps."""
    surprises = []
    for part, lengths in zip(to_rows(rows.layout, y), rows.lengths):
        history = part.new_zeros(part.shape[0], taps, part.shape[2]) if cache is None else cache.outputs
        surprises.append(kernels.run("innovation", part, history))
        if cache is not None:
            cache.shift("outputs", part, lengths)
    return to_columns(rows.layout, surprises)


class FadingMemory(nn.Module):
    """The SSM of one layer.

    Args:
        config: the model's configuration. layer_idx: which layer.
    """

    def __init__(self, config: BMojoConfig, layer_idx: int):
        super().__init__()
        spec = config.layer_spec(layer_idx)
        self.heads, self.head_dim, self.state = spec.ssm_heads, spec.ssm_head_dim, spec.ssm_state
        self.groups = config.ssm_num_groups
        self.inner = self.heads * self.head_dim
        self.gated = config.ssm_gated
        self.projected = config.ssm_projected
        self.chunk_size = config.ssm_chunk_size
        self.time_step_limit = tuple(config.ssm_time_step_limit)
        self.kernels = Kernels(config)
        # What the eidetic memory asks for: nothing, the error on the output, or on the input.
        self.innovation = config.innovation if spec.slots else None
        self.taps = config.innovation_taps

        # Rows of in_proj: z, then x (if projected), B and C, then dt.
        mixed = (self.inner if self.projected else 0) + 2 * self.groups * self.state
        self.rows = [self.inner if self.gated else 0, mixed, self.heads]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.rows), bias=config.ssm_proj_bias)
        self.conv = CausalConv(spec.conv_channels, spec.conv_kernel, config.ssm_conv_bias, self.kernels)
        self.act = ACT2FN[config.ssm_conv_act]
        self.scalars = SSMScalars(self.heads)
        self.norm = GroupedRMSNorm(self.inner, self.groups, config.rms_norm_eps) if config.ssm_norm else None
        self.out_proj = None
        if self.projected:
            self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=config.ssm_proj_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        rows: Rows | None = None,
        cache: BMojoCacheLayer | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs the SSM over the real tokens of every sequence.

        Args:
            hidden_states: `[B, T, E]`. rows: how they are cut into mixer rows; None: as they stand, all are real.
            cache: the layer's states, read and moved on; None starts from zeros and keeps nothing.

        Returns:
            y `[B, T, E]`, and the innovation `[B, T]` or None if the layer keeps no tokens or judges by keys.
        """
        rows = WHOLE if rows is None else rows
        gate, mixed, dt = project(self.in_proj, hidden_states).split(self.rows, dim=-1)
        # Autocast narrows conv1d but not a single step, so x goes in as narrow as a projected one would.
        parts = [mixed] if self.projected else [hidden_states.to(mixed.dtype), mixed]
        groups = zip(zip(*(to_rows(rows.layout, part) for part in parts)), rows.lengths)
        convolved = [self._convolve(parts, lengths, cache) for parts, lengths in groups]
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            groups = zip(convolved, to_rows(rows.layout, dt), rows.lengths)
            scanned = [self._scan(*inputs, step, real, step.shape[1], cache) for inputs, step, real in groups]
            y = to_columns(rows.layout, [out for out, _ in scanned])
            if self.gated:
                y = y * F.silu(gate.to(y.dtype))
            if self.norm is not None:
                y = self.norm(y)
        y = y.to(mixed.dtype)
        if self.out_proj is not None:
            y = project(self.out_proj, y)
        surprise = None
        if self.innovation == "state":
            surprise = to_columns(rows.layout, [found for _, found in scanned])
        elif self.innovation == "output":
            surprise = surprise_of_output(self.kernels, y, self.taps, rows, cache)
        return y, surprise

    def _convolve(
        self, parts: tuple[torch.Tensor, ...], lengths: torch.Tensor | None, cache: BMojoCacheLayer | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """act(conv(x|B|C)) of mixer rows `[R, T', C']`, given whole or x apart, which are not joined: no copy of u is
        made. Returns x and B|C; `lengths` `[R]` tokens are real and come first, None: all."""
        if len(parts) > 1 and parts[0].shape[1] == 1:
            parts = [torch.cat(parts, dim=-1)]  # one token is copied sooner than it is convolved in two parts
        convolved, first = [], 0
        for part in parts:
            convolved.append(self.act(self.conv(part, None if cache is None else cache.conv, first)))
            if cache is not None:
                cache.shift("conv", part, lengths, first)
            first += part.shape[-1]
        return convolved if len(convolved) > 1 else convolved[0].split([self.inner, 2 * self.groups * self.state], -1)

    def _scan(
        self,
        x: torch.Tensor,
        keys: torch.Tensor,
        dt: torch.Tensor,
        lengths: torch.Tensor | None,
        tokens: int,
        cache: BMojoCacheLayer | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The recurrence of mixer rows in fp32 at least: of x `[R, T', H P]`, keys = B|C `[R, T', 2 G N]` and dt
        `[R, T', H]`.

        Returns y `[R, T', H P]` and the innovation `[R, T']` of the "state" form, or None.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        op = "scan_step" if tokens == 1 and cache is not None else "chunk_scan"
        taken = self.kernels.input_dtype(op, x, wide)
        x = x.to(taken).unflatten(-1, (self.heads, self.head_dim))
        B, C = keys.to(taken).unflatten(-1, (2, self.groups, self.state)).unbind(-3)
        A, dt_bias, D = self.scalars(wide)
        dt = F.softplus(dt.to(wide) + dt_bias)
        if self.time_step_limit != (0.0, math.inf):
            dt = dt.clamp(*self.time_step_limit)
        if lengths is not None:
            dt = dt * (torch.arange(tokens, device=dt.device) < lengths[:, None])[..., None]
        # A copy where a backward pass may still need what the state was; else a step writes into it.
        state = None if cache is None else cache.ssm.to(wide, copy=torch.is_grad_enabled())
        surprise = None
        if self.innovation == "state":
            with torch.no_grad():
                expected = predict_input(x.to(wide), dt, A, B.to(wide), state, self.chunk_size)
                surprise = prediction_error(x.flatten(2), expected.flatten(2))
        y, after = self.kernels.run(op, x, dt, A, B, C, D, state, self.chunk_size)
        if cache is not None and after is not cache.ssm:
            cache.ssm.copy_(after.detach())
        return y.flatten(2), surprise
