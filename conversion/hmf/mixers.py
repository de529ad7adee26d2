"""The sequence mixers of hybrid-model-factory as data: one entry each, nothing else lists them.

An entry says what the mixer is called in a pattern and in `bmojo_config`, where its tensors are, what its section of
config.json may hold and what becomes of it, and which of their tensors, one after the other by rows, are which of ours.

    GDN    gated delta rule (arXiv 2412.06464)         q, k, v, gate, write share and decay projected apart
    M2     Mamba-2 (arXiv 2405.21060), with RMSNorm of the heads of B and C before the convolution
    GKA    Gated KalmaNet: ridge regression over what was read

All share x and B (values and keys) in the groups of grouped-query attention, and have a C (query) per head.

Shapes: E hidden size, H heads, G key/value heads, P = N = D head dim, r rank of the expansion, K taps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


Section = Mapping[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows of one of our tensors: those of the source's tensor `name`, `rows` of them.

    rows: a key of `sizes`; None: all that ours has. made: instead of a tensor, what makes them from the sizes.
    """

    name: str
    rows: str | None = None
    made: Callable[[Mapping[str, int]], torch.Tensor] | None = None


@dataclass(frozen=True)
class Setting:
    """A key of a mixer's section: its value where it is left out, the field of `BMojoConfig` that it becomes (None: no
    result depends on it, or `tensors` does), and, where only some values can be read, which, and what stands against
    the others."""

    default: Any
    becomes: str | None = None
    only: tuple | None = None
    why: str = ""


@dataclass(frozen=True)
class Mixer:
    """One mixer.

    token: in the pattern. names: in `bmojo_config.ssm_mixer`. section: of config.json. place: its module's name.
    fields: of `BMojoConfig`, always these. settings: keys of its section. derived: keys that repeat what the config
    says elsewhere, with where. tensors: from the section to our tensors below `fading.`.
    """

    token: str
    names: tuple[str, ...]
    section: str
    place: str
    fields: Mapping[str, Any]
    settings: Mapping[str, Setting]
    derived: Mapping[str, Any]
    tensors: Callable[[Section], dict[str, tuple[Rows, ...]]] = field(repr=False)


def sizes_of(config: Mapping[str, Any]) -> dict[str, int]:
    """Return rows of tensors by what they hold, from the source's config."""
    heads, groups, dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    return {
        "heads": heads,
        "groups": groups,
        "queries": heads * dim,
        "keys": groups * dim,
        "hidden": config["hidden_size"],
    }


def shared_heads(sizes: Mapping[str, int]) -> torch.Tensor:
    """Return the mixture by which every head has what its group has, `[H, G]`."""
    return torch.eye(sizes["groups"]).repeat_interleave(sizes["heads"] // sizes["groups"], dim=0)


def _only(value: Any, why: str) -> Setting:
    return Setting(value, only=(value,), why=why)


# The parts that GDN and GKA have in common ---------------------------------------------------------------------------
_OF_ATTENTION = {
    "hidden_size": "hidden_size",
    "head_dim": "head_dim",
    "num_q_heads": "num_attention_heads",
    "num_k_heads": "num_key_value_heads",
    "num_v_heads": "num_key_value_heads",
}
_GATED = {
    "use_gate": Setting(True, "ssm_gated"),
    "conv_size": Setting(4, "ssm_conv_kernel"),
    "kv_proj_rank": Setting(None, "ssm_expand_rank"),
    "kv_learnable_residual": Setting(False),
}
_CONVOLVED = (("v", "keys"), ("k", "keys"), ("q", "queries"))


def _gated_tensors(section: Section, steps: tuple[str, ...]) -> dict[str, tuple[Rows, ...]]:
    """Return what a mixer with q, k, v, gate and `steps`, a number per head each, is made of."""
    gate = (Rows("g_proj.weight", "queries"),) * bool(section["use_gate"])
    mixed = tuple(Rows(f"{name}_proj.weight", rows) for name, rows in _CONVOLVED)
    found = {
        "in_proj.weight": (*gate, *mixed, *(Rows(f"{name}_proj.weight", "heads") for name in steps)),
        "conv.weight": tuple(Rows(f"{name}_conv1d.weight", rows) for name, rows in _CONVOLVED),
        "scalars.A_log": (Rows("A_log"),),
        "scalars.dt_bias": (Rows("dt_bias"),),
        "norm.weight": (Rows("o_norm.weight"),),
        "out_proj.weight": (Rows("o_proj.weight"),),
    }
    if section.get("conv_bias"):
        found["conv.bias"] = tuple(Rows(f"{name}_conv1d.bias", rows) for name, rows in _CONVOLVED)
    if section["kv_proj_rank"] is not None:
        for ours, theirs in (("keys", "k"), ("values", "v")):
            found[f"{ours}_down.weight"] = (Rows(f"proj_{theirs}.linearA.weight"),)
            found[f"{ours}_up.weight"] = (Rows(f"proj_{theirs}.linearB.weight"),)
            made = None if section["kv_learnable_residual"] else shared_heads
            found[f"{ours}_repeat"] = (Rows(f"{theirs}_rep", made=made),)
    return found


def _mamba_tensors(section: Section) -> dict[str, tuple[Rows, ...]]:
    found = {
        "in_proj.weight": (Rows("in_proj.weight"),),
        "conv.weight": (Rows("conv1d.weight"),),
        "conv.bias": (Rows("conv1d.bias"),),
        **{f"scalars.{name}": (Rows(name),) for name in ("A_log", "dt_bias", "D")},
        "norm.weight": (Rows("norm.weight"),),
        "out_proj.weight": (Rows("out_proj.weight"),),
    }
    norms = ("B_norm.weight", "C_norm.weight") if section["use_qk_norm"] else ()
    return found | {name: (Rows(name),) for name in norms}


def _kalma_tensors(section: Section) -> dict[str, tuple[Rows, ...]]:
    found = _gated_tensors(section, ("a", "b", "alpha"))
    return found | {"scalars.share_bias": (Rows("b_proj.bias"),), "scalars.mix_bias": (Rows("alpha_proj.bias"),)}


MIXERS = (
    Mixer(
        token="M2",
        names=("mamba2",),
        section="mamba2_config",
        place="mamba",
        fields={"ssm_type": "mamba2", "ssm_head_pattern": "multi_query", "ssm_norm_eps": 1e-5},
        settings={
            "use_qk_norm": Setting(True, "ssm_qk_norm"),
            "use_pos_emb": _only(False, "RoPE on B and C of an SSM"),
        },
        derived={
            "d_model": "hidden_size",
            "d_inner": "queries",
            "d_xb": "keys",
            "intermediate_size": "intermediate_size",
            "hidden_act": "hidden_act",
            "rms_norm_eps": "rms_norm_eps",
            "n_layer": "num_hidden_layers",
            "ssm_cfg": {"expand": 1, "ngroups": "num_attention_heads", "d_state": "head_dim"},
        },
        tensors=_mamba_tensors,
    ),
    Mixer(
        token="GDN",
        names=("gdn", "gated_deltanet"),
        section="gdn_config",
        place="gdn",
        fields={"ssm_type": "gated_delta", "ssm_head_pattern": "multi_query"},
        settings={
            **_GATED,
            "norm_eps": Setting(1e-5, "ssm_norm_eps"),
            "conv_bias": Setting(False, "ssm_conv_bias"),
            "use_short_conv": _only(True, "projections without a convolution"),
            "allow_neg_eigval": _only(False, "write shares above 1"),
        },
        derived=_OF_ATTENTION,
        tensors=lambda section: _gated_tensors(section, ("gk", "b")),
    ),
    Mixer(
        token="GKA",
        names=("gka", "gated_kalmanet"),
        section="gka_config",
        place="gka",
        fields={"ssm_type": "kalmanet", "ssm_conv_bias": False},
        settings={
            **_GATED,
            "norm_eps": Setting(1e-6, "ssm_norm_eps"),
            "num_iter": Setting(30, "ssm_solver_steps"),
            "ridge_strength": Setting(0.02, "ssm_ridge"),
            "chunk_size": Setting(64),
            "bp_lambda": Setting(True),  # which gradients there are
            "solver_type": _only("chebyshev", "another solver"),
            "use_alpha_connection": _only(True, "a solution without the query's own share"),
            "use_v_conv": _only(True, "values without a convolution"),
            "use_forgetting_gate": _only(True, "a memory that forgets nothing"),
            "use_forgetting_gate_kk": _only(True, "a covariance that forgets nothing"),
            "gla_rescale": _only(True, "outputs that are not rescaled"),
            "use_beta_gate": _only(True, "keys without write shares"),
        },
        derived=_OF_ATTENTION,
        tensors=_kalma_tensors,
    ),
)


__all__ = ["MIXERS", "Mixer", "Rows", "Setting", "shared_heads", "sizes_of"]
