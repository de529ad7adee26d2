"""Folders in the format of hybrid-model-factory, tiny, with random values. Tensors and keys as its code names them."""

import copy
import json

import torch
from safetensors.torch import save_file


VOCAB, HIDDEN, WIDE, HEADS, GROUPS, DIM, WINDOW, TAPS = 31, 12, 20, 4, 2, 6, 4, 4
INNER, SHARED = HEADS * DIM, GROUPS * DIM
OF_ATTENTION = {"hidden_size": HIDDEN, "head_dim": DIM, "num_q_heads": HEADS, "num_k_heads": GROUPS}
OF_ATTENTION |= {"num_v_heads": GROUPS}
GATED = {"use_gate": True, "conv_size": TAPS, "kv_proj_rank": None, "kv_learnable_residual": False}
SECTIONS = {
    "swa_config": {"window_size": WINDOW},
    "bmojo_config": {
        "hidden_size": HIDDEN,
        "num_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": DIM,
        "rms_norm_eps": 1e-6,
        "window_size": WINDOW,
        "tie_attn_weights": True,
        "ssm_mixer": "mamba2",
    },
    "mamba2_config": {
        "d_model": HIDDEN,
        "d_inner": INNER,
        "d_xb": SHARED,
        "intermediate_size": WIDE,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "n_layer": 2,
        "ssm_cfg": {"expand": 1, "ngroups": HEADS, "d_state": DIM},
        "use_qk_norm": True,
        "use_pos_emb": False,
    },
    "gdn_config": OF_ATTENTION
    | GATED
    | {"use_short_conv": True, "allow_neg_eigval": False, "conv_bias": False, "norm_eps": 1e-5},
    "gka_config": OF_ATTENTION
    | GATED
    | {
        "use_alpha_connection": True,
        "use_v_conv": True,
        "use_forgetting_gate": True,
        "gla_rescale": True,
        "solver_type": "chebyshev",
        "bp_lambda": True,
        "num_iter": 30,
        "ridge_strength": 0.02,
        "norm_eps": 1e-6,
        "use_forgetting_gate_kk": True,
        "use_beta_gate": True,
        "chunk_size": 64,
    },
}
PLACES = {"M2": "mamba", "GDN": "gdn", "GKA": "gka", "mamba2": "mamba", "gdn": "gdn", "gka": "gka"}
SECTION_OF = {"mamba": "mamba2_config", "gdn": "gdn_config", "gka": "gka_config"}


def make_config(pattern, **changes):
    """config.json of a pattern; a dict among `changes` changes keys of a section, None leaves the key out."""
    tokens = pattern.split("-")
    config = {
        "architectures": ["HybridQwen3ForCausalLM"],
        "model_type": "hybrid_qwen3",
        "hybrid_override_pattern": pattern,
        "layer_types": tokens,
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": len(tokens),
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 2,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "dtype": "bfloat16",
        "transformers_version": "5.3.0",
    }
    places = {PLACES[token] for token in tokens if token in PLACES}
    if "SWA" in tokens:
        config["swa_config"] = dict(SECTIONS["swa_config"])
    if "BMF" in tokens:
        config["bmojo_config"] = dict(SECTIONS["bmojo_config"], **changes.pop("bmojo_config", {}))
        places.add(PLACES[config["bmojo_config"]["ssm_mixer"]])
    for place in places:
        config[SECTION_OF[place]] = dict(SECTIONS[SECTION_OF[place]])
    if "mamba2_config" in config:
        config["mamba2_config"]["n_layer"] = len(tokens)
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(config.get(name), dict) else value
        if value is None:
            del config[name]
    return copy.deepcopy(config)


def attention_shapes(bias, marks=("",)):
    shapes = {"o_proj.weight": (HIDDEN, INNER)} | ({"o_proj.bias": (HIDDEN,)} if bias else {})
    for mark in marks:
        for name, rows in (("q", INNER), ("k", SHARED), ("v", SHARED)):
            shapes[f"{name}_proj{mark}.weight"] = (rows, HIDDEN)
            if bias:
                shapes[f"{name}_proj{mark}.bias"] = (rows,)
        shapes |= {f"{name}_norm{mark}.weight": (DIM,) for name in "qk"}
    return shapes


def mixer_shapes(place, config):
    section = config[SECTION_OF[place]]
    if place == "mamba":
        conv = INNER + 2 * SHARED
        shapes = {"in_proj.weight": (INNER + conv + HEADS, HIDDEN), "conv1d.weight": (conv, 1, TAPS)}
        shapes |= {"conv1d.bias": (conv,), "norm.weight": (INNER,), "out_proj.weight": (HIDDEN, INNER)}
        shapes |= dict.fromkeys(("A_log", "dt_bias", "D"), (HEADS,))
        return shapes | ({f"{name}_norm.weight": (DIM,) for name in "BC"} if section["use_qk_norm"] else {})
    shapes = {"A_log": (HEADS,), "dt_bias": (HEADS,), "o_norm.weight": (DIM,), "o_proj.weight": (HIDDEN, INNER)}
    for name, rows in (("q", INNER), ("k", SHARED), ("v", SHARED)):
        shapes |= {f"{name}_proj.weight": (rows, HIDDEN), f"{name}_conv1d.weight": (rows, 1, section["conv_size"])}
        if section.get("conv_bias"):
            shapes[f"{name}_conv1d.bias"] = (rows,)
    if section["use_gate"]:
        shapes["g_proj.weight"] = (INNER, HIDDEN)
    steps = ("gk", "b") if place == "gdn" else ("a", "b", "alpha")
    shapes |= {f"{name}_proj.weight": (HEADS, HIDDEN) for name in steps}
    if place == "gka":
        shapes |= {"b_proj.bias": (HEADS,), "alpha_proj.bias": (HEADS,)}
    rank = section["kv_proj_rank"]
    if rank is not None:
        for name in "kv":
            shapes |= {f"proj_{name}.linearA.weight": (rank, SHARED), f"proj_{name}.linearB.weight": (INNER, rank)}
            if section["kv_learnable_residual"]:
                shapes[f"{name}_rep"] = (HEADS, GROUPS)
    return shapes


def source_shapes(config):
    """Names and shapes of all tensors."""
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    bias = config["attention_bias"]
    for index, token in enumerate(config["hybrid_override_pattern"].split("-")):
        layer = {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}
        layer |= {f"mlp.{name}_proj.weight": (WIDE, HIDDEN) for name in ("gate", "up")}
        layer["mlp.down_proj.weight"] = (HIDDEN, WIDE)
        parts = {}
        if token in ("*", "SWA"):
            parts["self_attn" if token == "*" else "swa"] = attention_shapes(bias)
        elif token == "BMF":
            section = config["bmojo_config"]
            place = PLACES[section["ssm_mixer"]]
            parts["bmojo_f.bmojo_attn"] = attention_shapes(bias, ("",) if section["tie_attn_weights"] else ("", "_"))
            parts[f"bmojo_f.{place}"] = mixer_shapes(place, config)
        else:
            parts[PLACES[token]] = mixer_shapes(PLACES[token], config)
        for part, found in parts.items():
            layer |= {f"{part}.{name}": shape for name, shape in found.items()}
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def make_tensors(config, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in source_shapes(config).items():
        value = torch.randn(shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.3 * value
        elif len(shape) == 2:
            value = value * (1.5 if name.endswith(("_proj.weight", "_proj_.weight")) else 1.0) * shape[1] ** -0.5
        elif name.endswith(("A_log", "dt_bias")):
            value = 0.5 * value - 1.0
        found[name] = value.to(dtype)
    return found


def write_source(folder, config, tensors=None, shards=1):
    """Write the folder; returns its tensors."""
    tensors = make_tensors(config) if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return tensors
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number::shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return tensors
