r"""Initial values of a grafted Mamba memory (S6): a smoother, as `ssm_init` makes one of Mamba-2.

Mamba reads B, C and the time steps from the convolved x, without biases, so a constant B and C need a channel of x that
is constant: the last of the inner channels, 1 by the bias of its convolution, which no projection writes to or reads.
With c a channel, dt_c = 1 / tau_c the same for the channels of a head, tau_h log-spaced from tau_low to tau_high:

    B = C    = e_1 + small random rows for B's other states
    S_t[c,1] = exp(-dt_c) S_{t-1}[c,1] + dt_c x_t[c]
    y_t      = P^T S_t[., 1]  =  sum_{j>=0} (1 - a_c) a_c^j u_{t-j},      a_c = exp(-1 / tau_c)

The convolution's tap for x carries (1 - a_c) / dt_c, as the smoother's does, so that the weights sum to one.

Tensors (K the last, current tap of the convolution; R the rank of the time step):

    in_proj   P, and a row of zeros for the constant channel
    conv      (1 - exp(-dt_c)) / dt_c at tap K, bias 0;  the constant channel: no tap, bias 1
    x_proj    R rows small and random;  B rows: e_1 of the constant channel, the others small and random;  C rows: e_1
    dt_proj   0, so that time steps are constant; the random rows of x_proj give it a gradient
    scalars   A_log = log 1 ... N, Mamba's own, of which state 1 fades at 1 / tau;  dt_bias = softplus^-1(dt);  D = 0
    out_proj  P^T, and a column of zeros for the constant channel

Where the settings leave the inner width open it is one head more than the layer's channels need, so that P is the
identity on them; the channels left over carry some of them a second time.

Shapes: u, y [B, T, hidden]; inner = heads times channels per head; P [inner - 1, hidden]; N state channels.
"""

from collections.abc import Mapping
from typing import Any

import torch

from modeling_bmojo import BMojoConfig

from .ssm_init_delta import DELTA_DEFAULTS
from .ssm_projection import inner_projection
from .ssm_scalars import check_start, constant_scalars, smoother_time_constants


MAMBA_FIELDS = {
    "ssm_type": "mamba",
    "ssm_conv_act": "linear",
    "ssm_gated": False,
    "ssm_norm": False,
    "ssm_projected": True,
    "ssm_proj_bias": False,
    "ssm_conv_bias": True,
}


def mamba_memory(backbone: Mapping[str, Any], memory: Mapping[str, Any]) -> dict[str, Any]:
    """`memory` completed by this start's inner width, state channels and test, as far as it leaves them open."""
    hidden, heads = backbone["hidden_size"], memory.get("ssm_num_heads")
    head_dim = memory.get("ssm_head_dim") or backbone.get("head_dim") or hidden // backbone["num_attention_heads"]
    if heads is None and type(head_dim) is int and head_dim > 0:
        heads = hidden // head_dim + 1  # one channel at least beyond the layer's
    defaults = {**DELTA_DEFAULTS, "ssm_num_heads": heads, "ssm_head_dim": head_dim}
    return {**memory, **{name: value for name, value in defaults.items() if memory.get(name) is None}}


def check_mamba(config: BMojoConfig, tau: tuple[float, float]) -> None:
    """Refuse a config or time constants that this start cannot honour (ValueError)."""
    check_start("mamba", MAMBA_FIELDS, config, tau)
    if config.ssm_num_heads * config.ssm_head_dim < 2:
        raise ValueError("ssm_num_heads=1, ssm_head_dim=1: ssm_init='mamba' needs 2 channels; leave one of them out.")


def mamba(
    config: BMojoConfig, layer: Mapping[str, torch.Tensor], tau: tuple[float, float] = (2.0, 16.0), seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return tensors of one layer's FadingMemory, by their names below `fading.`; fp32, the same for the same seed.

    Args:
        layer: the source layer's `k_proj.weight` and `v_proj.weight`, read only where the SSM is narrower.
        tau: shortest and longest time constant in tokens. seed: of the random rows.

    Raises:
        ValueError: the config contradicts this start, or clamps its time steps away.
    """
    check_mamba(config, tau)
    heads, states, rank = config.ssm_num_heads, config.ssm_state_size, config.ssm_time_step_rank
    hidden, inner = config.hidden_size, heads * config.ssm_head_dim
    dt = (1 / smoother_time_constants(heads, *tau)).repeat_interleave(config.ssm_head_dim)

    conv = torch.zeros(inner, config.ssm_conv_kernel, dtype=torch.float64)
    conv[:, -1] = -torch.expm1(-dt) / dt
    constant = torch.zeros(inner, dtype=torch.float64)
    constant[-1] = 1.0
    conv[-1] = 0.0

    generator = torch.Generator().manual_seed(seed)
    reads = torch.randn(rank + 2 * states, inner, generator=generator, dtype=torch.float64) * config.initializer_range
    reads[:, -1] = 0.0
    reads[[rank, rank + states]] = constant  # the first state of B, and of C
    reads[rank + states + 1 :] = 0.0

    projection = inner_projection(inner - 1, hidden, layer)
    projection = torch.cat([projection, projection.new_zeros(1, hidden)])
    tensors = {
        **constant_scalars(dt),
        "in_proj.weight": projection,
        "conv.weight": conv,
        "conv.bias": constant,
        "x_proj.weight": reads,
        "dt_proj.weight": torch.zeros(inner, rank, dtype=torch.float64),
        "scalars.A_log": torch.arange(1, states + 1, dtype=torch.float64).log().expand(inner, states),
        "out_proj.weight": projection.T,
    }
    return {name: tensor.to(torch.float32).contiguous() for name, tensor in tensors.items()}
