r"""Initial values of a grafted gated delta memory: a smoother, as `ssm_init` makes one of Mamba-2.

The SSM's output y_t is a running average of the layer's input u_t, so that with tied projections a fading token is an
averaged key and value. All tokens have one key, so that what is replaced is a share of the average. Head h of Hs:

    g_h    = exp(-1 / (2 tau_h))      constant; tau_h log-spaced over the heads from tau_low to tau_high, in tokens
    beta_h = 1 - exp(-1 / (2 tau_h))  half of the forgetting by decay, half by replacing: a gradient reaches both
    B = C  = e_1                      constant, up to small random rows of B
    S_t    = g_h (1 - beta_h) S_{t-1} + beta_h c_h x_t e_1^T
    y_t    = S_t e_1 / sqrt(N)  =  sum_{j>=0} (1 - a_h) a_h^j u_{t-j},      a_h = exp(-1 / tau_h)

c_h = sqrt(N) (1 - a_h) / beta_h = sqrt(N) (1 + exp(-1 / (2 tau_h))), the convolution's tap for x, makes the weights sum
to one.

Tensors (K the last, current tap of the convolution):

    in_proj   x rows = P;  B rows: the first of each group zero, the others small and random;  C, dt, b rows = 0
              bias: 0, but logit(beta_h) for b
    conv      x: c_h at tap K, bias 0;  B and C: 1 at tap K, bias e_1
    scalars   A_log = 0,  dt_bias = softplus^-1(1 / (2 tau_h))
    out_proj  = P^T, bias 0

Without the random rows nothing would ever be written under another key than e_1, and C would have no gradient; keys are
normalised, so they take some of the average with them: RANDOM says how much. P as in `ssm_init`.

Shapes: u, y [B, T, hidden]; P [inner, hidden]; G groups, N state channels, Hs heads of P_ssm channels.
"""

from collections.abc import Mapping
from typing import Any

import torch

from modeling_bmojo import BMojoConfig

from .ssm_projection import inner_projection
from .ssm_scalars import check_start, smoother_time_constants


DELTA_FIELDS = {
    "ssm_type": "gated_delta",
    "ssm_conv_act": "linear",
    "ssm_gated": False,
    "ssm_norm": False,
    "ssm_projected": True,
    "ssm_proj_bias": True,
    "ssm_conv_bias": True,
}
DELTA_DEFAULTS = {"ssm_state_size": 16, "innovation": "key"}
RANDOM = 0.1  # length of the random part of B beside e_1, for an input of RMS 1: costs 0.5% of the average


def delta_memory(backbone: Mapping[str, Any], memory: Mapping[str, Any]) -> dict[str, Any]:
    """`memory` completed by this start's number of state channels and test, as far as it leaves them open."""
    return {**memory, **{name: value for name, value in DELTA_DEFAULTS.items() if memory.get(name) is None}}


def check_delta(config: BMojoConfig, tau: tuple[float, float]) -> None:
    """Refuse a config or time constants that this start cannot honour (ValueError)."""
    check_start("delta", DELTA_FIELDS, config, tau)


def delta(
    config: BMojoConfig, layer: Mapping[str, torch.Tensor], tau: tuple[float, float] = (2.0, 16.0), seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return tensors of one layer's FadingMemory, by their names below `fading.`; fp32, the same for the same seed.

    Args:
        layer: the source layer's `k_proj.weight` and `v_proj.weight`, read only where inner < hidden.
        tau: shortest and longest time constant in tokens. seed: of the random rows of B.

    Raises:
        ValueError: the config contradicts this start, or clamps its time steps away.
    """
    check_delta(config, tau)
    heads, groups, states = config.ssm_num_heads, config.ssm_num_groups, config.ssm_state_size
    hidden, inner = config.hidden_size, heads * config.ssm_head_dim
    half = 0.5 / smoother_time_constants(heads, *tau)  # 1 / (2 tau)

    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(groups, states, hidden, generator=generator, dtype=torch.float64)
    keys *= RANDOM * (hidden * max(states - 1, 1)) ** -0.5
    keys[:, 0] = 0.0
    first_state = torch.zeros(groups, states, dtype=torch.float64)
    first_state[:, 0] = 1.0

    conv = torch.zeros(inner + 2 * groups * states, config.ssm_conv_kernel, dtype=torch.float64)
    conv[:, -1] = 1.0
    conv[:inner, -1] = (states**0.5 * (1 + torch.exp(-half))).repeat_interleave(config.ssm_head_dim)
    projection = inner_projection(inner, hidden, layer)
    no_rows = torch.zeros(groups * states + 2 * heads, hidden, dtype=torch.float64)  # C, dt and b
    inverse_softplus = torch.log(torch.expm1(half))  # of half; and the logit of 1 - exp(-half) is the same number
    tensors = {
        "in_proj.weight": torch.cat([projection, keys.flatten(0, 1), no_rows]),
        "in_proj.bias": torch.cat([torch.zeros(inner + 2 * groups * states + heads), inverse_softplus]),
        "conv.weight": conv,
        "conv.bias": torch.cat([torch.zeros(inner, dtype=torch.float64), first_state.flatten(), first_state.flatten()]),
        "scalars.A_log": torch.zeros_like(half),
        "scalars.dt_bias": inverse_softplus,
        "out_proj.weight": projection.T.contiguous(),
        "out_proj.bias": torch.zeros(hidden, dtype=torch.float64),
    }
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
