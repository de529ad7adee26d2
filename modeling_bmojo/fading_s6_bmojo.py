"""S6FadingMemory: the selective SSM of a layer in Mamba's form (arXiv 2312.00752, figure 3), the one of B'MOJO's paper.

    x | z = in_proj(u);  x = act(conv(x));  r | B | C = x_proj(x);  dt = softplus(dt_proj(r) + dt_bias)
    y = out_proj((s6(x, dt, A, B, C) + D x) * silu(z))

Beside `FadingMemory` (Mamba-2): every channel has N decays and a time step of its own, B and C are shared by all
channels and read from the convolved x, the convolution covers x alone, and nothing is normalised.

All four projections run on the input's columns, convolution and scan on mixer rows (layout_bmojo.py).

Shapes: B rows, T tokens (R', T' in mixer rows), E hidden size, I inner width (heads times channels per head), N state
channels, R rank of the time step, K conv taps.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from .cache_layer_bmojo import BMojoCacheLayer
from .configuration_bmojo import BMojoConfig
from .dispatch_bmojo import Kernels
from .fading_bmojo import WHOLE, CausalConv, surprise_of_output
from .inputs_bmojo import Rows
from .layout_bmojo import to_columns, to_rows
from .linear_bmojo import project
from .memory_ops import prediction_error
from .register_bmojo import NoDecay
from .s6_ops import predict_s6_input


class S6Scalars(NoDecay):
    """Decay rates, time-step biases and skips of all channels, apart so that adapters can train and save them.

    `dt_bias` is Mamba's `dt_proj.bias`: here, because it decides the time step and is too fine for bf16.
    """

    def __init__(self, inner: int, state: int):
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(inner, state))
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.D = nn.Parameter(torch.empty(inner))

    def forward(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A `[I, N]` (negative rates), dt_bias and D `[I]`, in `dtype`; copies, see `SSMScalars`."""
        return -torch.exp(self.A_log.to(dtype)), self.dt_bias.to(dtype, copy=True), self.D.to(dtype, copy=True)


class S6FadingMemory(nn.Module):
    """The S6 of one layer, with the interface of `FadingMemory`.

    Args:
        config: the model's configuration. layer_idx: which layer.
    """

    def __init__(self, config: BMojoConfig, layer_idx: int):
        super().__init__()
        spec = config.layer_spec(layer_idx)
        self.inner, self.state, self.rank = spec.conv_channels, spec.ssm_state, config.ssm_time_step_rank
        self.gated = config.ssm_gated
        self.chunk_size = config.ssm_chunk_size
        self.time_step_limit = tuple(config.ssm_time_step_limit)
        self.kernels = Kernels(config)
        # What the eidetic memory asks for: nothing, the error on the output, or on the input.
        self.innovation = config.innovation if spec.slots else None
        self.taps = config.innovation_taps

        self.in_proj = nn.Linear(config.hidden_size, self.inner * (2 if self.gated else 1), bias=config.ssm_proj_bias)
        self.conv = CausalConv(spec.conv_channels, spec.conv_kernel, config.ssm_conv_bias, self.kernels)
        self.act = ACT2FN[config.ssm_conv_act]
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * self.state, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.inner, bias=False)
        self.dt_proj.makes_time_steps = True  # Mamba initialises it its own way; a class of its own hides it from tools
        self.scalars = S6Scalars(self.inner, self.state)
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
        layout = rows.layout
        gate_rows = self.inner if self.gated else 0
        mixed, gate = project(self.in_proj, hidden_states).split([self.inner, gate_rows], dim=-1)
        x = [self._convolve(part, lengths, cache) for part, lengths in zip(to_rows(layout, mixed), rows.lengths)]
        low_rank, keys = project(self.x_proj, to_columns(layout, x)).split([self.rank, 2 * self.state], dim=-1)
        dt = self.dt_proj(low_rank)
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            groups = zip(x, to_rows(layout, dt), to_rows(layout, keys), rows.lengths)
            scanned = [self._scan(*group, cache) for group in groups]
            y = to_columns(layout, [out for out, _ in scanned])
            if self.gated:
                y = y * F.silu(gate.to(y.dtype))
        y = project(self.out_proj, y.to(mixed.dtype))
        surprise = None
        if self.innovation == "state":
            surprise = to_columns(layout, [found for _, found in scanned])
        elif self.innovation == "output":
            surprise = surprise_of_output(self.kernels, y, self.taps, rows, cache)
        return y, surprise

    def _convolve(
        self, mixed: torch.Tensor, lengths: torch.Tensor | None, cache: BMojoCacheLayer | None
    ) -> torch.Tensor:
        """act(conv(x)) of mixer rows `[R', T', I]`."""
        x = self.act(self.conv(mixed, None if cache is None else cache.conv))
        if cache is not None:
            cache.shift("conv", mixed, lengths)
        return x

    def _scan(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        keys: torch.Tensor,
        lengths: torch.Tensor | None,
        cache: BMojoCacheLayer | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The recurrence of mixer rows in fp32 at least, of x, dt `[R', T', I]` and keys = B|C `[R', T', 2 N]`.

        Returns y `[R', T', I]` and the innovation of the "state" form, or None.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        op = "s6_step" if x.shape[1] == 1 and cache is not None else "s6_scan"
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
        if cache is not None and cache.started:
            state = cache.ssm.to(wide, copy=torch.is_grad_enabled()).flatten(1, 2)
        surprise = None
        if self.innovation == "state":
            with torch.no_grad():
                expected = predict_s6_input(x.to(wide), dt, A, B.to(wide), state, self.chunk_size)
                surprise = prediction_error(x, expected)
        y, after = self.kernels.run(op, x, dt, A, B, C, D, state, self.chunk_size)
        if cache is not None:
            cache.ssm.copy_(after.detach().reshape(cache.ssm.shape))
        return y, surprise
