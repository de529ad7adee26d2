r"""Initial values of a grafted fading memory: the smoother, and the table of all initialisations (design.md section 6).

The smoother makes the SSM's output a running average of the layer's input, so that with tied projections a fading token
is an averaged key and value. With u_t the layer input, y_t the SSM's output and head h of Hs:

    dt_h    = 1 / tau_h            constant; tau_h log-spaced over the heads from tau_low to tau_high, in tokens
    A_h     = -1                   so each step keeps a_h = exp(-dt_h) of the past
    B = C   = e_1                  constant: only the first of the N state channels carries the average
    S_t     = a_h S_{t-1} + dt_h x_t e_1^T
    y_t     = S_t e_1  =  sum_{j>=0} (1 - a_h) a_h^j u_{t-j}

The discretisation (exp for the decay, Euler for the input) leaves weights that sum to dt / (1 - exp(-dt)), about
1 + dt/2; the convolution's tap for x carries the inverse, so the weights sum to exactly one.

Tensors (K the last, current tap of the convolution):

    in_proj   B rows: the first of each group zero, the others small and random;  C rows = 0;  dt rows = 0
    conv      x: (1 - exp(-dt_h)) / dt_h at tap K, bias 0;  B and C: 1 at tap K, bias e_1
    scalars   A_log = 0,  dt_bias = softplus^-1(1 / tau_h),  D = 0

C never reads the random B rows, so they leave y_t alone, and give the rows of C a gradient. They are for training
alone, and each costs P_ssm Hs numbers of cache per layer, in fp32: hence N = 16, as in Mamba, where the settings leave
it open.

That is all where inner = Hs * P_ssm equals hidden: x is u itself (`ssm_projected=False`), because identity matrices are
not stored, let alone multiplied by. `lean_memory` therefore gives the SSM as many heads as make it so wide, whatever
the attention has. Set `ssm_projected: true` for a learned map (the Mamba-2 form), on the attention's heads:

    in_proj   x rows = P, on top of the others
    out_proj  = P^T,  y_t = P^T S_t e_1

P is the identity where inner equals hidden. A wider inner repeats the channels (P^T P = I, each channel averaged over
several tau). A narrower one keeps the subspace that k_proj and v_proj read: P = the first right singular vectors of
[k_proj; v_proj], lossless while inner >= 2 G D.

For training without projections: `tie_fading_projections: false` gives the fading tokens learned maps of y_t, their own
k_proj and v_proj, at the cost per token of the shared ones.

Shapes: u, y [B, T, hidden]; P [inner, hidden]; G groups, N state channels, Hs heads of P_ssm channels.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from modeling_bmojo import BMojoConfig

from .ssm_init_attention import ATTENTION_FIELDS, attention, attention_memory, check_attention
from .ssm_init_delta import DELTA_FIELDS, check_delta, delta, delta_memory
from .ssm_init_kalmanet import KALMANET_FIELDS, check_kalmanet, kalmanet, kalmanet_memory
from .ssm_init_mamba import MAMBA_FIELDS, check_mamba, mamba, mamba_memory
from .ssm_projection import inner_projection
from .ssm_scalars import check_time_constants, constant_scalars, smoother_time_constants


SMOOTHER_FIELDS = {
    "ssm_type": "mamba2",
    "ssm_conv_act": "linear",
    "ssm_gated": False,
    "ssm_norm": False,
    "ssm_proj_bias": False,
    "ssm_conv_bias": True,
}
# What the settings may leave open. N state channels, of which a fresh smoother reads one; the innovation test that
# keeps the most useful tokens of a fresh graft (docs/log.md).
SMOOTHER_DEFAULTS = {"ssm_state_size": 16, "innovation": "key"}
SSM_SIZES = ("ssm_num_heads", "ssm_head_dim", "ssm_num_groups")


@dataclass(frozen=True)
class SSMInit:
    """An initialisation.

    fields: the config fields it stands on. complete: `(backbone fields, memory fields) -> memory fields`, with what it
    chooses where the user left it open. check: `(config, time constants)`, refuses what it cannot express.
    build: `(config, layer tensors, time constants, seed) -> tensors`.
    """

    fields: Mapping[str, Any]
    complete: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]
    check: Callable[[BMojoConfig, tuple[float, float]], None]
    build: Callable[..., dict[str, torch.Tensor]]
    describe: str


def lean_memory(backbone: Mapping[str, Any], memory: Mapping[str, Any]) -> dict[str, Any]:
    """`memory` completed so that the SSM is small and needs no projections, as far as settings and sizes leave it open.

    Args:
        backbone: fields of `BMojoConfig` that the source implies. memory: fields that are set. Sizes of the SSM that
            are None are left open, as in `BMojoConfig`; with `ssm_projected=True` they follow the attention.
    """
    memory = {**memory, **{name: value for name, value in SMOOTHER_DEFAULTS.items() if memory.get(name) is None}}
    if memory.get("ssm_projected") is True:
        return memory
    hidden, attention_heads = backbone["hidden_size"], backbone["num_attention_heads"]
    head_dim = backbone.get("head_dim") or hidden // attention_heads
    given = {name: memory[name] for name in SSM_SIZES if memory.get(name) is not None}
    if "ssm_num_heads" not in given and "ssm_head_dim" not in given and hidden % head_dim == 0:
        heads = hidden // head_dim
        groups = math.gcd(heads, backbone["num_key_value_heads"] or attention_heads)
        given = {"ssm_num_heads": heads, "ssm_num_groups": groups, **given}
    sizes = given.get("ssm_num_heads", attention_heads), given.get("ssm_head_dim", head_dim)
    fits = all(type(size) is int for size in sizes) and math.prod(sizes) == hidden
    return {"ssm_projected": not fits, **memory, **given}


def smoother(
    config: BMojoConfig, layer: Mapping[str, torch.Tensor], tau: tuple[float, float] = (2.0, 16.0), seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return tensors of one layer's FadingMemory, by their names below `fading.`; fp32, the same for the same seed.

    Args:
        layer: the source layer's `k_proj.weight` and `v_proj.weight`, read only for projections where inner < hidden.
        tau: shortest and longest time constant in tokens.
        seed: of the random rows of B.

    Raises:
        ValueError: the config contradicts the smoother, or clamps its time steps away.
    """
    check_smoother(config, tau)
    heads, groups, states = config.ssm_num_heads, config.ssm_num_groups, config.ssm_state_size
    inner, hidden, kernel = heads * config.ssm_head_dim, config.hidden_size, config.ssm_conv_kernel
    dt = 1.0 / smoother_time_constants(heads, *tau)

    generator = torch.Generator().manual_seed(seed)
    write_rows = torch.randn(groups, states, hidden, generator=generator, dtype=torch.float64)
    write_rows *= config.initializer_range
    write_rows[:, 0] = 0.0
    first_state = torch.zeros(groups, states, dtype=torch.float64)
    first_state[:, 0] = 1.0

    conv = torch.zeros(inner + 2 * groups * states, kernel, dtype=torch.float64)
    conv[:, -1] = 1.0
    conv[:inner, -1] = (-torch.expm1(-dt) / dt).repeat_interleave(config.ssm_head_dim)
    no_rows = torch.zeros(groups * states + heads, hidden, dtype=torch.float64)  # C and dt
    tensors = {
        "in_proj.weight": torch.cat([write_rows.flatten(0, 1), no_rows]),
        "conv.weight": conv,
        "conv.bias": torch.cat([torch.zeros(inner, dtype=torch.float64), first_state.flatten(), first_state.flatten()]),
        **constant_scalars(dt),
    }
    if config.ssm_projected:
        projection = inner_projection(inner, hidden, layer)
        tensors["in_proj.weight"] = torch.cat([projection, tensors["in_proj.weight"]])
        tensors["out_proj.weight"] = projection.T.contiguous()
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}


def check_smoother(config: BMojoConfig, tau: tuple[float, float]) -> None:
    """Refuse a config or time constants that the smoother cannot honour (ValueError)."""
    check_fields("smoother", SMOOTHER_FIELDS, {name: getattr(config, name) for name in SMOOTHER_FIELDS})
    check_time_constants(config, tau)


def check_fields(init: str, required: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse settings that contradict what an initialisation stands on (ValueError)."""
    for name, value in required.items():
        if name in given and given[name] != value:
            raise ValueError(
                f"{name}={given[name]!r}: ssm_init={init!r} needs {name}={value!r}; remove the setting or choose "
                f"another initialisation of {', '.join(sorted(SSM_INITS))}."
            )


# No start is made for heads that share their values, for normed keys, or for keys of each head.
EVERY_INIT = {"ssm_head_pattern": "multi_value", "ssm_qk_norm": False, "ssm_expand_rank": None}
SSM_INITS = {
    "smoother": SSMInit(
        fields=SMOOTHER_FIELDS,
        complete=lean_memory,
        check=check_smoother,
        build=smoother,
        describe="running average of the layer input (conversion/grafting/ssm_init.py)",
    ),
    "attention": SSMInit(
        fields=ATTENTION_FIELDS,
        complete=attention_memory,
        check=check_attention,
        build=attention,
        describe="the layer's attention without its softmax (conversion/grafting/ssm_init_attention.py)",
    ),
    "delta": SSMInit(
        fields=DELTA_FIELDS,
        complete=delta_memory,
        check=check_delta,
        build=delta,
        describe="running average of the layer input by the gated delta rule (conversion/grafting/ssm_init_delta.py)",
    ),
    "kalmanet": SSMInit(
        fields=KALMANET_FIELDS,
        complete=kalmanet_memory,
        check=check_kalmanet,
        build=kalmanet,
        describe="running average of the layer input by Gated KalmaNet (conversion/grafting/ssm_init_kalmanet.py)",
    ),
    "mamba": SSMInit(
        fields=MAMBA_FIELDS,
        complete=mamba_memory,
        check=check_mamba,
        build=mamba,
        describe="running average of the layer input by Mamba (conversion/grafting/ssm_init_mamba.py)",
    ),
}
