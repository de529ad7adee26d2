"""The Gated KalmaNet row of the family table: a layer with the published tensors.

The published code needs Triton and flash-linear-attention; the layer is written out here from its description, with its
names of tensors (hybrid-model-factory, arXiv 2511.21016).
"""

import pytest
import torch
from torch.nn import functional

from modeling_bmojo import BMojoCache, BMojoConfig
from modeling_bmojo.fading_kalma_bmojo import GatedKalmaFadingMemory
from tests.modeling.test_family import assert_near
from tests.oracles import oracle_kalma, rms_norm


HEADS, GROUPS, SIZE, HIDDEN, RANK, TAPS = 4, 2, 6, 16, 3, 4


def published(expanded):
    """Random tensors by the names that stand below `gka.` in a published checkpoint."""
    generator = torch.Generator().manual_seed(int(expanded))
    inner, shared = HEADS * SIZE, GROUPS * SIZE
    shapes = {f"{name}_proj.weight": (inner, HIDDEN) for name in "qg"} | {"o_proj.weight": (HIDDEN, inner)}
    shapes |= {f"{name}_proj.weight": (shared, HIDDEN) for name in "kv"}
    shapes |= {f"{name}_proj.weight": (HEADS, HIDDEN) for name in ("a", "b", "alpha")}
    shapes |= {f"{name}_proj.bias": (HEADS,) for name in ("b", "alpha")} | {"A_log": (HEADS,), "dt_bias": (HEADS,)}
    shapes |= {f"{name}_conv1d.weight": (size, 1, TAPS) for name, size in zip("qkv", (inner, shared, shared))}
    shapes |= {"o_norm.weight": (SIZE,)}
    for name in "kv" if expanded else "":
        shapes |= {f"proj_{name}.linearA.weight": (RANK, shared), f"proj_{name}.linearB.weight": (inner, RANK)}
        shapes |= {f"{name}_rep": (HEADS, GROUPS)}
    normal = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: value * value.shape[-1] ** -0.5 if value.dim() > 1 else value / 2 for name, value in normal.items()}


def ours_of(gka):
    """The same tensors by our names, as the docstring of `GatedKalmaFadingMemory` says."""
    ours = {
        "in_proj.weight": torch.cat([gka[f"{name}_proj.weight"] for name in ("g", "v", "k", "q", "a", "b", "alpha")]),
        "conv.weight": torch.cat([gka[f"{name}_conv1d.weight"].squeeze(1) for name in "vkq"]),
        "scalars.A_log": gka["A_log"],
        "scalars.dt_bias": gka["dt_bias"],
        "scalars.share_bias": gka["b_proj.bias"],
        "scalars.mix_bias": gka["alpha_proj.bias"],
        "norm.weight": gka["o_norm.weight"],
        "out_proj.weight": gka["o_proj.weight"],
    }
    for name, short in (("keys", "k"), ("values", "v")) if "k_rep" in gka else ():
        ours[f"{name}_down.weight"] = gka[f"proj_{short}.linearA.weight"]
        ours[f"{name}_up.weight"] = gka[f"proj_{short}.linearB.weight"]
        ours[f"{name}_repeat"] = gka[f"{short}_rep"]
    return ours


def published_layer(gka, u, eps):
    """The layer of u `[B, T, E]`, without a cache."""
    q, k, v = (convolved(functional.linear(u, gka[f"{n}_proj.weight"]), gka[f"{n}_conv1d.weight"]) for n in "qkv")
    k, v = for_heads(gka, "k", k), for_heads(gka, "v", v)
    q, k = (x / (x.norm(dim=-1, keepdim=True) + 1e-6) for x in (q.unflatten(-1, (HEADS, SIZE)), k))
    beta, alpha = (
        functional.linear(u, gka[f"{n}_proj.weight"], gka[f"{n}_proj.bias"]).sigmoid() for n in ("b", "alpha")
    )
    k, v = (x * (beta + 1e-6)[..., None] for x in (k, v))
    decay = -gka["A_log"].exp() * functional.softplus(functional.linear(u, gka["a_proj.weight"]) + gka["dt_bias"])
    y, _ = oracle_kalma(v, decay, alpha, k, q)
    gate = functional.linear(u, gka["g_proj.weight"]).unflatten(-1, (HEADS, SIZE))
    y = rms_norm(y * SIZE**-0.5, gka["o_norm.weight"], eps) * functional.silu(gate)
    return functional.linear(y.flatten(-2), gka["o_proj.weight"])


def convolved(x, weight):
    padded = functional.pad(x.mT, (TAPS - 1, 0))
    return functional.silu(functional.conv1d(padded, weight, groups=len(weight))).mT


def for_heads(gka, name, x):
    """Heads have their group's, or a mixture of the groups' and a low-rank map of them all."""
    grouped = x.unflatten(-1, (GROUPS, SIZE))
    if f"{name}_rep" not in gka:
        return grouped.repeat_interleave(HEADS // GROUPS, dim=-2)
    low = functional.silu(functional.linear(x, gka[f"proj_{name}.linearA.weight"]))
    own = functional.linear(low, gka[f"proj_{name}.linearB.weight"]).unflatten(-1, (HEADS, SIZE))
    return own + torch.einsum("eh,bthd->bted", gka[f"{name}_rep"], grouped)


def layer_of(gka):
    config = BMojoConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=SIZE,
        layer_types=["linear_attention"],
        ssm_type="kalmanet",
        ssm_state_size=SIZE,
        ssm_conv_kernel=TAPS,
        ssm_conv_bias=False,
        ssm_expand_rank=RANK if "k_rep" in gka else None,
        ssm_chunk_size=5,
    )
    layer = GatedKalmaFadingMemory(config, 0).double().eval()
    layer.load_state_dict(ours_of(gka), strict=True)
    return layer, config


@pytest.mark.parametrize("expanded", [False, True])
def test_equals_the_published_layer(expanded):
    """Outputs in prefill and in decoding on a cache, and the gradient of every published tensor."""
    gka = published(expanded)
    layer, config = layer_of(gka)
    u = torch.randn(2, 12, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = {name: value.clone().requires_grad_() for name, value in gka.items()}
    expected = published_layer(leaves, u, config.rms_norm_eps)
    found = layer(u)[0]
    assert expected.std() > 0.05
    assert_near(found, expected, 1e-10)
    weights = torch.randn_like(expected)
    grads = torch.autograd.grad((expected * weights).sum(), list(leaves.values()))
    (found * weights).sum().backward()
    wanted = ours_of(dict(zip(leaves, grads)))
    for name, parameter in layer.named_parameters():
        assert wanted[name].abs().max() > 0
        assert_near(parameter.grad, wanted[name], 1e-9)
    states = BMojoCache(config).layers[0]
    states.prepare(u)
    with torch.no_grad():
        for cut in (slice(0, 7), slice(7, 9), *(slice(t, t + 1) for t in range(9, 12))):
            assert_near(layer(u[:, cut], layer=states)[0], expected[:, cut], 1e-6)  # its state is fp32
