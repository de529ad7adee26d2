r"""Initial values of a grafted Gated KalmaNet: a smoother, as `ssm_init` makes one of Mamba-2.

The SSM's output y_t is a running average of the layer's input u_t, so that with tied projections a fading token is an
averaged key and value. All tokens have one key, and the regression on one key is the mean of its values. Head h of Hs:

    g_h   = exp(-1 / tau_h)        constant; tau_h log-spaced over the heads from tau_low to tau_high, in tokens
    s_h   = sqrt(1 - g_h)          constant share, so that H = s^2 sum_j g^j e_1 e_1^T grows to e_1 e_1^T
    B = C = e_1                    constant, up to small random rows of B
    a     = 1/2                    constant: half of the query is replaced by the solution, which is kappa e_1 / |H|
    y_t   = sum_{j>=0} w_tj u_{t-j},  w_tj = c s^2 g^j (1/2 + 1/2 kappa / (1 - g^(t+1)))

The half that is read by the query fades in from nothing, as Mamba-2's smoother does; the other half is a mean from the
first token on. kappa, about 1 / (1 + ridge), is what the solver's steps make of 1; c = 2 / (1 + kappa) lets the weights
of a long text sum to one.

Tensors (K the last, current tap of the convolution):

    in_proj   x rows = P;  B rows: the first of each group zero, the others small and random;  C, a, b, m rows = 0
    conv      x: sqrt(N) c at tap K, bias 0;  B and C: 1 at tap K, bias e_1
    scalars   A_log = 0,  dt_bias = softplus^-1(1 / tau_h),  share_bias = logit(s_h),  mix_bias = 0
    out_proj  = P^T

Without the random rows C would have no gradient: RANDOM is their length. Each head has values of its own
(`ssm_num_groups` is the number of heads): a group's alone are too few for the layer's input. P as in `ssm_init`.

Shapes: u, y [B, T, hidden]; P [inner, hidden]; N state channels, Hs heads of P_ssm channels.
"""

from collections.abc import Mapping
from typing import Any

import torch

from modeling_bmojo import BMojoConfig
from modeling_bmojo.fading_kalma_bmojo import LEAST_SHARE
from modeling_bmojo.kalma_ops import step_kalma

from .ssm_init_delta import DELTA_DEFAULTS
from .ssm_projection import inner_projection
from .ssm_scalars import check_start, smoother_time_constants


KALMANET_FIELDS = {
    "ssm_type": "kalmanet",
    "ssm_conv_act": "linear",
    "ssm_gated": False,
    "ssm_norm": False,
    "ssm_projected": True,
    "ssm_proj_bias": False,
    "ssm_conv_bias": True,
    "ssm_expand_rank": None,
}
# Length of the random part of B beside e_1, for an input of RMS 1. The regression answers by it, too: what that changes
# of the average grows with its square over the ridge.
RANDOM = 0.03


def kalmanet_memory(backbone: Mapping[str, Any], memory: Mapping[str, Any]) -> dict[str, Any]:
    """`memory` completed by this start's number of state channels, groups and test, as far as it leaves them open."""
    heads = memory.get("ssm_num_heads") or backbone["num_attention_heads"]
    defaults = {**DELTA_DEFAULTS, "ssm_num_groups": heads}
    return {**memory, **{name: value for name, value in defaults.items() if memory.get(name) is None}}


def check_kalmanet(config: BMojoConfig, tau: tuple[float, float]) -> None:
    """Refuse a config or time constants that this start cannot honour (ValueError)."""
    check_start("kalmanet", KALMANET_FIELDS | {"ssm_num_groups": config.ssm_num_heads}, config, tau)


def solution_of_one(config: BMojoConfig) -> float:
    """kappa: what the solver's steps answer where H is 1 and the query is 1."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    gates = one[..., 0]
    rule = config.ssm_chunk_size, config.ssm_solver_steps, config.ssm_ridge
    return step_kalma(one, 0 * gates, gates, one, one, None, *rule)[0].item()


def kalmanet(
    config: BMojoConfig, layer: Mapping[str, torch.Tensor], tau: tuple[float, float] = (2.0, 16.0), seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return tensors of one layer's FadingMemory, by their names below `fading.`; fp32, the same for the same seed.

    Args:
        layer: the source layer's `k_proj.weight` and `v_proj.weight`, read only where inner < hidden.
        tau: shortest and longest time constant in tokens. seed: of the random rows of B.

    Raises:
        ValueError: the config contradicts this start, or clamps its time steps away.
    """
    check_kalmanet(config, tau)
    heads, states, hidden = config.ssm_num_heads, config.ssm_state_size, config.hidden_size
    inner, keys = heads * config.ssm_head_dim, heads * states
    step = 1 / smoother_time_constants(heads, *tau)
    share = (-torch.expm1(-step)).sqrt()

    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(heads, states, hidden, generator=generator, dtype=torch.float64)
    random *= RANDOM * (hidden * max(states - 1, 1)) ** -0.5
    random[:, 0] = 0.0
    first_state = torch.zeros(heads, states, dtype=torch.float64)
    first_state[:, 0] = 1.0

    conv = torch.zeros(inner + 2 * keys, config.ssm_conv_kernel, dtype=torch.float64)
    conv[:, -1] = 1.0
    conv[:inner, -1] = 2 * states**0.5 / (1 + solution_of_one(config))
    projection = inner_projection(inner, hidden, layer)
    no_rows = torch.zeros(keys + 3 * heads, hidden, dtype=torch.float64)  # C, a, b and m
    tensors = {
        "in_proj.weight": torch.cat([projection, random.flatten(0, 1), no_rows]),
        "conv.weight": conv,
        "conv.bias": torch.cat([torch.zeros(inner, dtype=torch.float64), first_state.flatten(), first_state.flatten()]),
        "scalars.A_log": torch.zeros_like(step),
        "scalars.dt_bias": torch.log(torch.expm1(step)),
        "scalars.share_bias": torch.logit(share - LEAST_SHARE),
        "scalars.mix_bias": torch.zeros_like(step),
        "out_proj.weight": projection.T.contiguous(),
    }
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
