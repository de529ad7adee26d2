"""S6FadingMemory: the selective SSM of a layer in Mamba's form (arXiv 2312.00752, figure 3), the one of B'MOJO's paper.

    x | z = in_proj(u);  x = act(conv(x));  r | B | C = x_proj(x);  dt = softplus(dt_proj(r) + dt_bias)
    y = out_proj((s6(x, dt, A, B, C) + D x) * silu(z))

Beside `FadingMemory` (Mamba-2): every channel has N decays and a time step of its own, B and C are shared by all
channels and read from the convolved x, the convolution covers x alone, and nothing is normalised.

Shapes: B rows, T tokens, E hidden size, I inner width (heads times channels per head), N state channels, R rank of the
time step, K conv taps.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from .cache_layer_bmojo import BMojoCacheLayer
from .configuration_bmojo import BMojoConfig
from .dispatch_bmojo import Kernels
from .fading_bmojo import CausalConv, surprise_of_output
from .linear_bmojo import BMojoLinear
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
        """A `[I, N]` (negative rates), dt_bias and D `[I]`, in `dtype`."""
        return -torch.exp(self.A_log.to(dtype)), self.dt_bias.to(dtype), self.D.to(dtype)


class TimeStepProjection(nn.Linear):
    """R numbers per token to a time step per channel. A class of its own, because Mamba initialises it its own way."""


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

        self.in_proj = BMojoLinear(config.hidden_size, self.inner * (2 if self.gated else 1), bias=config.ssm_proj_bias)
        self.conv = CausalConv(spec.conv_channels, spec.conv_kernel, config.ssm_conv_bias, self.kernels)
        self.act = ACT2FN[config.ssm_conv_act]
        self.x_proj = BMojoLinear(self.inner, self.rank + 2 * self.state, bias=False)
        self.dt_proj = TimeStepProjection(self.rank, self.inner, bias=False)
        self.scalars = S6Scalars(self.inner, self.state)
        self.out_proj = BMojoLinear(self.inner, config.hidden_size, bias=config.ssm_proj_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        lengths: torch.Tensor | None,
        cache: BMojoCacheLayer | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Runs the SSM over rows of real tokens.

        Args:
            hidden_states: `[B, T, E]`. lengths: `[B]` real tokens per row, which come first; the rest is passed over.
                None: all T.
            cache: the layer's states, read and moved on; None starts from zeros and keeps nothing.

        Returns:
            y `[B, T, E]`, and the innovation `[B, T]` or None if the layer keeps no tokens or judges by keys.
        """
        gate_rows = self.inner if self.gated else 0
        mixed, gate = self.in_proj(hidden_states).split([self.inner, gate_rows], dim=-1)
        x = self.act(self.conv(mixed, None if cache is None else cache.conv))
        if cache is not None:
            cache.shift("conv", mixed, lengths)
        low_rank, B, C = self.x_proj(x).split([self.rank, self.state, self.state], dim=-1)
        dt = self.dt_proj(low_rank)
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            y, surprise = self._scan(x, dt, B, C, lengths, cache)
            if self.gated:
                y = y * F.silu(gate.to(y.dtype))
        y = self.out_proj(y.to(x.dtype))
        if self.innovation == "output":
            surprise = surprise_of_output(self.kernels, y, self.taps, lengths, cache)
        return y, surprise

    def _scan(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        lengths: torch.Tensor | None,
        cache: BMojoCacheLayer | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The recurrence in fp32 at least; returns y `[B, T, I]` and the innovation of the "state" form, or None."""
        wide = torch.promote_types(x.dtype, torch.float32)
        op = "s6_step" if x.shape[1] == 1 and cache is not None else "s6_scan"
        taken = self.kernels.input_dtype(op, x, wide)
        x, B, C = (value.to(taken) for value in (x, B, C))
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
