r"""Initial values of a grafted fading memory: the layer's own attention without its softmax (design.md section 6).

The SSM starts from the weights that it sits beside, C <- Q, B <- K, x <- V, out <- O, as in MambaInLlama (arXiv
2408.15237) and hybrid-model-factory. Head h of H reads key/value head g(h) = h // (H / G), u_t is the layer's input:

    x_h = V_g(h) u,  B_h = K_g(h) u,  C_h = c Q_h u              one SSM head and one group of B, C per query head
    S_h,t = exp(-1 / tau_h) S_h,t-1 + (1 / tau_h) x_h B_h^T      constant time steps, as in ssm_scalars.py
    y_t   = O [S_h,t C_h]_h = O [ sum_s exp(-(t - s) / tau_h) / tau_h  (q_h,t . k_h,s) c  v_h,s ]_h

c is the scale of the attention's scores, D^-1/2 unless `attention_multiplier` says otherwise.

So y is what linear attention over the last tau_h tokens would add to the residual stream. It leaves out what an SSM
cannot hold: the softmax, and RoPE (queries and keys are taken before it). Key and value rows are repeated for the query
heads that share them, because a group of the SSM shares C as well as B, and the queries of a group differ.

Tensors (K the last, current tap of the convolution):

    in_proj   z rows 0.5 (O^T + V) where `ssm_gated`;  x, B, C rows as above;  dt rows = 0;  biases likewise
    conv      1 at tap K, bias 0 (identity, `ssm_conv_act: linear`)
    scalars   A_log = 0,  dt_bias = softplus^-1(1 / tau_h),  D = 0
    norm      1 where `ssm_norm`;   out_proj = O and its bias

Refused because it has no place here: q/k-norm, other sizes than the attention's, `ssm_projected: false`, ssm_type
"mamba". Shapes: u, y [B, T, hidden]; Q, O^T [H D, hidden]; K, V [G D, hidden]; state [B, H, D, D].
"""

from collections.abc import Mapping
from typing import Any

import torch

from modeling_bmojo import BMojoConfig

from .ssm_scalars import check_time_constants, constant_scalars, smoother_time_constants


ATTENTION_FIELDS = {"ssm_type": "mamba2", "ssm_conv_act": "linear", "ssm_projected": True}


def attention_memory(backbone: Mapping[str, Any], memory: Mapping[str, Any]) -> dict[str, Any]:
    """`memory` completed by the sizes of the attention, as far as it leaves them open. No gate, no norm by default.

    Args:
        backbone: fields of `BMojoConfig` that the source implies. memory: fields that are set; None is left open.
    """
    heads = backbone["num_attention_heads"]
    head_dim = backbone.get("head_dim") or backbone["hidden_size"] // heads
    biases = bool(backbone.get("attention_bias") or backbone.get("attention_output_bias"))
    implied = {
        "ssm_num_heads": heads,
        "ssm_head_dim": head_dim,
        "ssm_num_groups": heads,
        "ssm_state_size": head_dim,
        "ssm_proj_bias": biases,
        "ssm_gated": False,
        "ssm_norm": False,
    }
    return {**implied, **{name: value for name, value in memory.items() if value is not None or name not in implied}}


def check_attention(config: BMojoConfig, tau: tuple[float, float]) -> None:
    """Refuse a config or time constants that this initialisation cannot express (ValueError)."""
    if config.qk_norm is not None:
        raise ValueError(
            f"ssm_init='attention': the source normalises its queries and keys (qk_norm={config.qk_norm!r}), which B "
            "and C of an SSM cannot do; choose ssm_init='smoother'."
        )
    heads, head_dim = config.num_attention_heads, config.head_dim
    sizes = {
        "ssm_num_heads": heads,
        "ssm_head_dim": head_dim,
        "ssm_num_groups": heads,
        "ssm_state_size": head_dim,
    }
    for name, value in sizes.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"{name}={getattr(config, name)}: ssm_init='attention' copies the attention, so it must be {value}; "
                "leave it out."
            )
    if (config.attention_bias or config.attention_output_bias) and not config.ssm_proj_bias:
        raise ValueError(
            "ssm_proj_bias=False: the source's attention has biases, which ssm_init='attention' copies; leave it out."
        )
    check_time_constants(config, tau)


def attention(
    config: BMojoConfig, layer: Mapping[str, torch.Tensor], tau: tuple[float, float] = (2.0, 16.0), seed: int = 0
) -> dict[str, torch.Tensor]:
    """Return tensors of one layer's FadingMemory, by their names below `fading.`; fp32. Nothing in it is random.

    Args:
        layer: the source layer's `{q,k,v,o}_proj.weight`, and `.bias` where it has them.
        tau: shortest and longest time constant in tokens. seed: not used.

    Raises:
        ValueError: the config asks for what cannot be copied.
    """
    check_attention(config, tau)
    heads, head_dim = config.num_attention_heads, config.head_dim
    inner, kernel = heads * head_dim, config.ssm_conv_kernel
    dt = 1.0 / smoother_time_constants(heads, *tau)
    tensors = {
        "in_proj.weight": _in_proj(config, layer, "weight"),
        "conv.weight": torch.zeros(3 * inner, kernel, dtype=torch.float64),
        "out_proj.weight": layer["o_proj.weight"].double(),
        **constant_scalars(dt),
    }
    tensors["conv.weight"][:, -1] = 1.0
    if config.ssm_conv_bias:
        tensors["conv.bias"] = torch.zeros(3 * inner, dtype=torch.float64)
    if config.ssm_proj_bias:
        tensors["in_proj.bias"] = _in_proj(config, layer, "bias")
        no_bias = torch.zeros(config.hidden_size, dtype=torch.float64)
        tensors["out_proj.bias"] = layer.get("o_proj.bias", no_bias).double()
    if config.ssm_norm:
        tensors["norm.weight"] = torch.ones(inner, dtype=torch.float64)
    return {name: tensor.to(torch.float32).contiguous() for name, tensor in tensors.items()}


def _in_proj(config: BMojoConfig, layer: Mapping[str, torch.Tensor], part: str) -> torch.Tensor:
    """Return rows z, x, B, C, dt of in_proj: of its weight `[rows, hidden]` or bias `[rows]`; zero where a map has
    none."""
    heads, head_dim, hidden = config.num_attention_heads, config.head_dim, config.hidden_size
    shape = (hidden,) if part == "weight" else ()

    def of(name: str, count: int) -> torch.Tensor:
        return layer.get(f"{name}.{part}", torch.zeros(count * head_dim, *shape)).double()

    def repeated(name: str) -> torch.Tensor:
        groups = of(name, config.num_key_value_heads).unflatten(0, (config.num_key_value_heads, head_dim))
        return groups.repeat_interleave(heads // config.num_key_value_heads, dim=0).flatten(0, 1)

    values, keys = repeated("v_proj"), repeated("k_proj")
    scale = head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier
    rows = [values, keys, of("q_proj", heads) * scale, torch.zeros(heads, *shape, dtype=torch.float64)]
    if config.ssm_gated:
        back = layer["o_proj.weight"].double().T if part == "weight" else torch.zeros_like(values)
        rows.insert(0, 0.5 * (back + values))
    return torch.cat(rows)
