"""FadingMemory: what every selective SSM of a layer must say and do, and the modules that they share.

One class per form: `fading_ssd_bmojo` (Mamba-2), `fading_s6_bmojo` (Mamba), `fading_delta_bmojo` (gated delta rule),
`fading_kalma_bmojo` (Gated KalmaNet). A form owns its facts: its rules between configuration fields, the defaults that
None stands for, its projections, states, operations and initial values. It is entered in
`configuration_bmojo.FADING_MEMORIES`, and configuration, cache, adapters and kernels ask the class.

Shapes: B rows, T tokens (R, T' in mixer rows), E hidden size, I inner width, C channels of the convolution, K its taps.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .dispatch_bmojo import Kernels
from .fields_bmojo import reject
from .layout_bmojo import Rows
from .memory_ops import at_least_fp32, cast
from .register_bmojo import NoDecay
from .share_bmojo import UNCUT, Cut, Share
from .states_bmojo import State


# How heads are grouped (arXiv 2405.21060, section 7.2): those of a group share B and C, or share x and B.
HEAD_PATTERNS = ("multi_value", "multi_query")
KEY_NORM_EPS = 1e-6  # of B and C, under `ssm_qk_norm`

# Rows as they stand, all real, without positions.
WHOLE = Rows(None, [None], [None], None)
Prediction = tuple[torch.Tensor, torch.Tensor]


class FadingMemory(nn.Module):
    """The selective SSM of one layer; subclasses give it a form.

    name: its value of `config.ssm_type`. operations: those of `dispatch_bmojo` that it runs. maps: names of its linear
    maps, of which a configuration may leave out some. modules: of its "conv" and "scalars" those that it has, which
    adapters may train in full. about: its row in the documentation.

    Args:
        config: the model's configuration. layer_idx: which layer.
    """

    name: str
    operations: tuple[str, ...]
    maps: tuple[str, ...]
    modules: tuple[str, ...] = ()
    about: str
    expands: bool = False  # whether `ssm_expand_rank` is a field of it
    share: Share | None = None
    in_cut: Cut = UNCUT

    # Facts -----------------------------------------------------------------------------------------------------------
    @classmethod
    def fill(cls, config: PreTrainedConfig) -> None:
        """Put values where the configuration has None for this form's own choice."""

    @classmethod
    def check(cls, config: PreTrainedConfig) -> None:
        """Raise ValueError (field, value, rule, remedy) where the fields do not fit this form."""

    @classmethod
    def channels(cls, config: PreTrainedConfig) -> int:
        """C, channels that its convolution runs over."""
        return config.ssm_num_heads * config.ssm_head_dim

    @classmethod
    def projections(cls, config: PreTrainedConfig) -> tuple[str, ...]:
        """Return names of the linear maps that it has: what adapters adapt."""
        return cls.maps

    @classmethod
    def states(cls, config: PreTrainedConfig) -> dict[str, State]:
        """Return what it remembers: the convolution's last inputs, and the state of the recurrence."""
        return {
            "conv": State((config.ssm_conv_kernel - 1, cls.channels(config))),
            "ssm": State((config.ssm_num_heads, config.ssm_head_dim, config.ssm_state_size), "wide"),
        }

    @classmethod
    def example(cls, operation: str, config: PreTrainedConfig) -> tuple:
        """Return arguments of one of its operations as far as implementations look at them before they run, without
        data."""
        channels, taps = cls.channels(config), config.ssm_conv_kernel
        return torch.empty(1, 1, channels), torch.empty(channels, taps), None

    @classmethod
    def channel_slices(cls, config: PreTrainedConfig, share: Share) -> list[slice]:
        """Return which channels of the convolution belong to a share of the heads."""
        return [share.part(cls.channels(config))]

    # Work ------------------------------------------------------------------------------------------------------------
    def forward(
        self,
        hidden_states: torch.Tensor,
        rows: Rows | None = None,
        layer: Any = None,
        predicts: bool = False,
    ) -> tuple[torch.Tensor, list[Prediction] | None]:
        """Run the SSM over the real tokens of every sequence.

        Args:
            hidden_states: `[B, T, E]`. rows: how they are cut into mixer rows; None: as they stand, all are real.
            layer: the layer's states, read and moved on; None starts from zeros and keeps nothing.
            predicts: whether an innovation test asks what the state says of every input before it is written.

        Returns:
            y `[B, T, E]`, and by group of mixer rows the inputs and what the state said of them, `[R, T', I]` each,
            without gradient; None unless asked for.
        """
        raise NotImplementedError

    def accept_share(self, config: PreTrainedConfig, share: Share) -> None:
        """Compute this share of the heads from now on. What gives y over all heads is the same on every device.

        Raises:
            ValueError: if this form cannot.
        """
        raise ValueError(
            f"ssm_type={self.name!r}: its heads cannot be shared out to devices yet; load with "
            "tp_plan=BMojoForCausalLM.whole_heads_plan(config), which lets every device have all of them."
        )

    def initialise(self, config: PreTrainedConfig) -> None:
        """Fill parameters of its own. Those of its parts are theirs to fill: a part with an `initialise` does it so, an
        `nn.Linear` with an `initial_bound` uniformly within it, any other as transformers does."""


class GroupedFadingMemory(FadingMemory):
    """Heads in groups, x, B and C convolved together; a time step per head, projected from the input.

    With `ssm_head_pattern="multi_value"` each head has its x, and those of a group share B and C (Mamba-2). With
    `"multi_query"` those of a group share x and B, and each head has its C: the groups of grouped-query attention,
    where x are its values, B its keys and C its queries.
    """

    @classmethod
    def fill(cls, config):
        if config.ssm_num_groups is None:
            config.ssm_num_groups = config.num_key_value_heads
        if config.ssm_norm is None:
            config.ssm_norm = True

    @classmethod
    def check(cls, config):
        if config.ssm_time_step_rank is not None:
            rule = f"must be None with ssm_type={cls.name!r}, whose time steps are projected directly"
            reject("ssm_time_step_rank", config.ssm_time_step_rank, rule, "leave it out")
        if config.ssm_head_pattern == "multi_query" and not config.ssm_projected:
            rule = "must be 'multi_value' with ssm_projected=False, where every channel of the layer is one of x"
            reject("ssm_head_pattern", config.ssm_head_pattern, rule, "change one of the two")

    @classmethod
    def shares_values(cls, config: PreTrainedConfig) -> bool:
        """Whether heads of a group share x and B, and not B and C."""
        return config.ssm_head_pattern == "multi_query"

    @classmethod
    def widths(cls, config: PreTrainedConfig) -> tuple[int, int, int]:
        """Return how many channels x, B and C have before the heads of a group share them."""
        heads, groups = config.ssm_num_heads, config.ssm_num_groups
        inputs, queries = (groups, heads) if cls.shares_values(config) else (heads, groups)
        return inputs * config.ssm_head_dim, groups * config.ssm_state_size, queries * config.ssm_state_size

    @classmethod
    def channels(cls, config):
        if cls.shares_values(config):
            shared = config.ssm_head_dim + config.ssm_state_size
            return config.ssm_num_groups * shared + config.ssm_num_heads * config.ssm_state_size
        return config.ssm_num_heads * config.ssm_head_dim + 2 * config.ssm_num_groups * config.ssm_state_size

    @classmethod
    def norm_eps(cls, config: PreTrainedConfig) -> float:
        """Return what the norm of the output adds to a mean of squares."""
        return config.rms_norm_eps if config.ssm_norm_eps is None else config.ssm_norm_eps

    @classmethod
    def channel_slices(cls, config, share):
        found, first, here = [], 0, share.groups(config.ssm_num_groups)
        by_head = (False, False, True) if cls.shares_values(config) else (True, False, False)
        for width, own in zip(cls.widths(config), by_head):
            size = width // config.ssm_num_groups
            part = share.part(width) if own else slice(here.start * size, here.stop * size)
            found.append(slice(first + part.start, first + part.stop))
            first += width
        return found

    def _cut_grouped(self, config: PreTrainedConfig, share: Share) -> None:
        """Cut what forms of this kind have in common: rows z | x | B | C | one or more for each head of in_proj (no x
        where it is not projected), and the parameters of convolution and scalars."""
        gates, mixed, steps = self.rows
        channels = self.channel_slices(config, share)
        if mixed < self.channels(config):
            channels = [slice(each.start - self.sizes[0], each.stop - self.sizes[0]) for each in channels[1:]]
        part = share.part(self.heads)
        heads = [slice(first + part.start, first + part.stop) for first in range(0, steps, self.heads)]
        kinds = (0, [share.part(gates)] if gates else []), (gates, channels), (gates + mixed, heads)
        slices = [slice(first + each.start, first + each.stop) for first, kind in kinds for each in kind]
        self.share, self.in_cut = share, Cut(share, slices)
        self.conv.cut = Cut(share, self.channel_slices(config, share))
        self.scalars.cut = Cut(share, [part])
        self.rows = [sum(each.stop - each.start for each in kind) for _, kind in kinds]
        self.heads, self.inner = self.heads // share.size, self.inner // share.size
        self.sizes = self.widths(share.config(config))


def for_heads(value: torch.Tensor, heads: int) -> torch.Tensor:
    """Return what the heads of a group share, `[B, T, G, ...]`, once for each of the H heads `[B, T, H, ...]`."""
    shared = heads // value.shape[2]
    return value if shared == 1 else value.repeat_interleave(shared, dim=2)


def expand(shared: torch.Tensor, repeat: torch.Tensor, down: nn.Linear, up: nn.Linear) -> torch.Tensor:
    """Return what every head has of what groups share, `[..., G, D]` to `[..., H, D]`.

        out_h = sum_g repeat_hg in_g + (up(silu(down(in))))_h

    Args:
        repeat: `[H, G]`. down: G D to r channels. up: r to H D.
    """
    own = up(F.silu(down(shared.flatten(-2))))
    return own.unflatten(-1, (len(repeat), -1)) + repeat.to(shared.dtype) @ shared


class HeadRMSNorm(nn.Module):
    """RMSNorm over the channels of each head `[..., H, P]`, one weight for all heads; computed in fp32 at least."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.eps = eps
        self.cut = UNCUT

    def accept_share(self, share: Share) -> None:
        """Norm heads of this share from now on: one weight for the heads of all devices."""
        self.cut = Cut(share, [slice(0, len(self.weight))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = at_least_fp32(x)
        return self.cut(self.weight) * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class CausalConv(nn.Module):
    """Depthwise causal convolution. A module of its own, so that adapters can train it in full."""

    def __init__(self, channels: int, kernel: int, bias: bool, kernels: Kernels | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.kernels = Kernels() if kernels is None else kernels
        self.cut = UNCUT

    def initialise(self, config: PreTrainedConfig) -> None:
        """Fill the parameters as torch fills a convolution's."""
        init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: torch.Tensor, history: torch.Tensor | None = None, first: int = 0) -> torch.Tensor:
        """x `[B, T, C']`: all channels, or those from `first` on; history `[B, K - 1, C]`: of all channels. Where a
        device has some heads, all are theirs."""
        weight, bias = self.cut(self.weight, 0), None if self.bias is None else self.cut(self.bias, 0)
        if x.shape[-1] < weight.shape[0]:
            part = slice(first, first + x.shape[-1])
            weight, bias = weight[part], None if bias is None else bias[part]
            history = None if history is None else history[..., part]
        if history is not None and torch.is_grad_enabled():
            # A copy: the cache moves it on in place before a backward pass needs it.
            history = history.clone()
        op = "conv_step" if x.shape[1] == 1 and history is not None else "conv"
        # k-bit preparation casts 1-D weights to fp32: cast at the call.
        return self.kernels.run(op, x, cast(weight, x.dtype), None if bias is None else cast(bias, x.dtype), history)


class SSMScalars(NoDecay):
    """Decay rates, time-step biases and skips. A module of its own, so that adapters can train and save it.

    Args:
        rates: shape of A_log. channels: how many time steps and skips there are. skips: whether there is a D.
    """

    def __init__(self, rates: tuple[int, ...], channels: int, skips: bool = True):
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(rates))
        self.dt_bias = nn.Parameter(torch.empty(channels))
        self.D = nn.Parameter(torch.empty(channels)) if skips else None
        self.cut = UNCUT

    def initialise(self, config: PreTrainedConfig) -> None:
        """Fill them as published: A = -1 ... -H over the heads (Mamba-2) or -1 ... -N in every channel (Mamba), time
        steps log-uniform in their range, D = 1."""
        rates = self.A_log.shape[-1]
        init.copy_(self.A_log, torch.arange(1, rates + 1, dtype=torch.float32).log().expand_as(self.A_log))
        if self.D is not None:
            init.ones_(self.D)
        low, high = math.log(config.ssm_time_step_min), math.log(config.ssm_time_step_max)
        step = torch.exp(torch.rand(self.dt_bias.shape) * (high - low) + low).clamp(min=config.ssm_time_step_floor)
        init.copy_(self.dt_bias, step + torch.log(-torch.expm1(-step)))  # inverse of softplus

    def forward(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return a (negative rates), dt_bias and D (None without skips) in `dtype`.

        Copies: FSDP2 frees a module's parameters when its forward is over, and what is an alias of one with them.
        """
        values = [None if value is None else self.cut(value, 0) for value in (self.A_log, self.dt_bias, self.D)]
        skips = None if values[2] is None else values[2].to(dtype, copy=True)
        return -torch.exp(cast(values[0], dtype)), values[1].to(dtype, copy=True), skips
