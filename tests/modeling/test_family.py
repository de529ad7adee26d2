"""The family table: B'MOJO with some memories switched off equals implementations that we did not write.

Random tiny transformers models are copied tensor by tensor (strict loading), then logits are compared in prefill and in
cached decoding. What has no counterpart upstream (fading and eidetic memory) is compared with the loops of `oracles`.
"""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, MambaRMSNormGated

from modeling_bmojo import BMojoConfig, BMojoForCausalLM
from tests.oracles import algorithm1_forward, bmojo_f_dense, randomize_


VOCAB = 61
BASE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
    tie_word_embeddings=False,
)
ROPE = {"rope_type": "default", "rope_theta": 500.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
HALF = {**ROPE, "partial_rotary_factor": 0.5}
MULTIPLIERS = dict(embedding_multiplier=3.0, attention_multiplier=0.4, residual_multiplier=0.3, logits_scaling=5.0)
QWEN = dict(attention_bias=True, attention_output_bias=False)

# name: (upstream model, upstream config, fields of both configs, fields of the upstream's only, fields of ours only).
TRANSFORMERS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}, {}, {}),
    "llama-tied-mha": (LlamaForCausalLM, LlamaConfig, dict(tie_word_embeddings=True, num_key_value_heads=4), {}, {}),
    "llama-biases": (LlamaForCausalLM, LlamaConfig, dict(attention_bias=True, mlp_bias=True, head_dim=12), {}, {}),
    "llama-gelu-mqa": (LlamaForCausalLM, LlamaConfig, dict(hidden_act="gelu", num_key_value_heads=1), {}, {}),
    "llama-llama3-rope": (LlamaForCausalLM, LlamaConfig, dict(rope_parameters=LLAMA3), {}, {}),
    "llama-yarn-rope": (LlamaForCausalLM, LlamaConfig, dict(rope_parameters=YARN), {}, {}),
    "llama-linear-rope": (LlamaForCausalLM, LlamaConfig, dict(rope_parameters=LINEAR), {}, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}, {}, QWEN),
    "qwen2-mixed": (
        Qwen2ForCausalLM,
        Qwen2Config,
        dict(layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
        dict(use_sliding_window=True, sliding_window=5),
        dict(window_size=5, **QWEN),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, dict(head_dim=16), {}, dict(qk_norm="head")),
    "mistral-full": (MistralForCausalLM, MistralConfig, {}, dict(sliding_window=None), {}),
    "mistral-sliding": (
        MistralForCausalLM,
        MistralConfig,
        {},
        dict(sliding_window=7),
        dict(layer_types=["sliding_attention"] * 3, window_size=7),
    ),
    "mistral-narrow": (
        MistralForCausalLM,
        MistralConfig,
        {},
        dict(sliding_window=2),
        dict(layer_types=["sliding_attention"] * 3, window_size=2),
    ),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config, dict(no_rope_layers=[1, 0, 1]), {}, {}),
    "granite": (GraniteForCausalLM, GraniteConfig, MULTIPLIERS, {}, {}),
    "granite-tied": (
        GraniteForCausalLM,
        GraniteConfig,
        dict(MULTIPLIERS, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        {},
        {},
    ),
    "olmo2": (Olmo2ForCausalLM, Olmo2Config, {}, {}, dict(qk_norm="full", norm_position="post")),
    "olmo2-biases-mha": (
        Olmo2ForCausalLM,
        Olmo2Config,
        dict(attention_bias=True, num_key_value_heads=4),
        {},
        dict(qk_norm="full", norm_position="post"),
    ),
    "phi3": (Phi3ForCausalLM, Phi3Config, dict(rope_parameters=HALF), {}, {}),
    "phi3-sliding": (
        Phi3ForCausalLM,
        Phi3Config,
        {},
        dict(sliding_window=7),
        dict(layer_types=["sliding_attention"] * 3, window_size=7),
    ),
    "smollm3-sliding": (
        SmolLM3ForCausalLM,
        SmolLM3Config,
        dict(no_rope_layers=[1, 0, 0], layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
        dict(use_sliding_window=True, sliding_window=6),
        dict(window_size=6),
    ),
}


def fp64_norms_(model):
    """Lets upstream's RMSNorm compute in the input's dtype: by itself it casts to float32 and caps float64 at 1e-7."""

    def forward(module, x):
        return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = forward.__get__(module)
    return model


def unfused(tensors, config):
    """Phi-3's qkv_proj and gate_up_proj cut into our names."""
    width = config.hidden_size // config.num_attention_heads
    heads = [config.num_attention_heads * width, *2 * [config.num_key_value_heads * width]]
    cuts = {"qkv_proj": (("q_proj", "k_proj", "v_proj"), heads)}
    cuts["gate_up_proj"] = (("gate_proj", "up_proj"), 2 * [config.intermediate_size])
    found = {}
    for name, tensor in tensors.items():
        fused = next((part for part in cuts if part in name), None)
        names, rows = cuts.get(fused, ((fused,), [len(tensor)]))
        found |= {name.replace(fused or "", goal or ""): rows for goal, rows in zip(names, tensor.split(rows))}
    return found


def transformer_pair(name, dtype):
    """(upstream model, our model) with the same random weights."""
    model_class, config_class, shared, theirs, ours = TRANSFORMERS[name]
    shared = {**BASE, "rope_parameters": ROPE, **shared}
    upstream = randomize_(model_class(config_class(**shared, **theirs))).to(dtype).eval()
    fields = {"layer_types": ["full_attention"] * 3, **shared, **ours}
    model = BMojoForCausalLM(BMojoConfig(**fields)).to(dtype).eval()
    model.load_state_dict(unfused(upstream.state_dict(), upstream.config), strict=True)
    return upstream, model


def tokens(length, batch=2, seed=0):
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def decode(model, ids, prefill, cache_name="past_key_values"):
    """Logits [B, T, V] of a prefill of `prefill` tokens followed by single tokens on the returned cache."""
    out = model(input_ids=ids[:, :prefill], use_cache=True)
    logits = [out.logits]
    for t in range(prefill, ids.shape[1]):
        out = model(input_ids=ids[:, t : t + 1], use_cache=True, **{cache_name: out[cache_name]})
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def assert_near(actual, expected, tolerance):
    """Difference below `tolerance` times the largest expected value (at least 1)."""
    scale = max(1.0, expected.abs().max().item())
    difference = (actual.double() - expected.double()).abs().max().item()
    assert difference <= tolerance * scale, f"differs by {difference:.3e} at scale {scale:.3g}, allowed {tolerance:g}"


# Attention only ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_equals_transformer_in_prefill_and_decode(name):
    upstream, model = transformer_pair(name, torch.float32)
    ids = tokens(34)
    with torch.no_grad():
        expected = upstream(ids).logits
        assert expected.std() > 0.1
        assert_near(model(ids).logits, expected, 1e-5)
    assert_near(decode(upstream, ids, 20), expected, 1e-5)
    assert_near(decode(model, ids, 20), expected, 1e-5)
    assert_near(decode(model, ids, 1), expected, 1e-5)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_equals_transformer_in_float64(name):
    """Upstream's norms are lifted to float64; its rotary angles stay float32, hence not 1e-12."""
    upstream, model = transformer_pair(name, torch.float64)
    ids = tokens(34)
    with torch.no_grad():
        expected = fp64_norms_(upstream)(ids).logits
        assert_near(model(ids).logits, expected, 2e-6)


@pytest.mark.parametrize("window", [1, 7])
@torch.no_grad()
def test_bmojo_layers_without_memories_are_a_sliding_window(window):
    """`"bmojo"` with M = 0 and F = 0, whatever its SSM holds. Upstream's cached decoding is wrong for a window of 1."""
    shared = {**BASE, "rope_parameters": ROPE}
    upstream = randomize_(MistralForCausalLM(MistralConfig(**shared, sliding_window=window))).eval()
    config = BMojoConfig(**shared, window_size=window, eidetic_size=0, fading_size=0)
    model = randomize_(BMojoForCausalLM(config), seed=1).eval()
    loaded = model.load_state_dict(upstream.state_dict(), strict=False)
    assert not loaded.unexpected_keys and all(".fading." in key for key in loaded.missing_keys)
    ids = tokens(34)
    expected = upstream(ids).logits
    assert_near(model(ids).logits, expected, 1e-5)
    assert_near(decode(model, ids, 20), expected, 1e-5)
    assert_near(decode(model, ids, 1), expected, 1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-sliding"])
def test_gradients_equal_those_of_the_transformer(name):
    upstream, model = transformer_pair(name, torch.float32)
    ids = tokens(24)
    upstream(ids, labels=ids).loss.backward()
    model(ids, labels=ids).loss.backward()
    ours = dict(model.named_parameters())
    for key, parameter in upstream.named_parameters():
        assert_near(ours[key].grad, parameter.grad, 1e-5)


# Mamba-2 only --------------------------------------------------------------------------------------------------------
# Some transformers versions (5.20 is the last for Python 3.10) normalise all groups of Mamba-2 as one: there, one group
# is what both can express.
UPSTREAM_NORM_HAS_GROUPS = "group_size" in inspect.signature(MambaRMSNormGated.__init__).parameters


def groups(count: int) -> int:
    return count if UPSTREAM_NORM_HAS_GROUPS else 1


MAMBA2 = {
    "default": {},
    "one-group": dict(n_groups=1),
    "group-per-head": dict(n_groups=groups(4), head_dim=16),
    "biases": dict(use_bias=True),
    "no-conv-bias": dict(use_conv_bias=False, conv_kernel=2),
    "time-step-limit": dict(time_step_limit=(0.3, 0.9)),
}


def mamba2_names(state, prefix="mixer"):
    """Upstream's Mamba-2 state dict under our names; the convolution loses its dimension of size 1."""
    renamed = {}
    for key, tensor in state.items():
        new = key.replace("backbone.embeddings", "model.embed_tokens").replace("backbone.norm_f", "model.norm")
        new = new.replace("backbone.layers", "model.layers").replace(".mamba.", f".{prefix}.")
        for scalar in ("A_log", "dt_bias", "D"):
            if new.endswith(f"{prefix}.{scalar}"):
                new = new.replace(f"{prefix}.{scalar}", f"fading.scalars.{scalar}")
        if prefix + ".norm" not in new:
            new = new.replace(".norm.weight", ".input_layernorm.weight") if ".layers." in new else new
        new = new.replace(f"{prefix}.conv1d", "fading.conv").replace(f"{prefix}.", "fading.")
        renamed[new] = tensor.squeeze(1) if new.endswith("conv.weight") else tensor
    return renamed


def mamba2_pair(dtype=torch.float32, **fields):
    upstream_fields = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        num_heads=4,
        head_dim=16,
        state_size=8,
        n_groups=groups(2),
        chunk_size=8,
        layer_norm_epsilon=1e-5,
    )
    upstream_config = Mamba2Config(**{**upstream_fields, **fields})
    upstream = randomize_(Mamba2ForCausalLM(upstream_config)).to(dtype).eval()
    config = BMojoConfig(
        **{**BASE, "intermediate_size": 0},
        layer_types=["linear_attention"] * 3,
        ssm_num_heads=upstream_config.num_heads,
        ssm_head_dim=upstream_config.head_dim,
        ssm_state_size=upstream_config.state_size,
        ssm_num_groups=upstream_config.n_groups,
        ssm_conv_kernel=upstream_config.conv_kernel,
        ssm_conv_bias=upstream_config.use_conv_bias,
        ssm_proj_bias=upstream_config.use_bias,
        ssm_time_step_limit=upstream_config.time_step_limit,
    )
    model = BMojoForCausalLM(config).to(dtype).eval()
    model.load_state_dict(mamba2_names(upstream.state_dict()), strict=True)
    return upstream, model


@pytest.mark.parametrize("name", MAMBA2)
def test_equals_mamba2(name):
    upstream, model = mamba2_pair(**MAMBA2[name])
    wide, _ = mamba2_pair(torch.float64, **MAMBA2[name])
    ids = tokens(34)
    with torch.no_grad():
        expected = upstream(ids).logits
        assert expected.std() > 0.1
        # A group that is nearly zero is blown up by its norm: upstream's own rounding is the floor.
        noise = (wide(ids).logits - expected).abs().max().item() / max(1.0, expected.abs().max().item())
        tolerance = max(1e-5, 5 * noise)
        assert tolerance < 1e-4
        assert_near(model(ids).logits, expected, tolerance)
    if name != "time-step-limit":  # upstream clamps dt in prefill only
        assert_near(decode(upstream, ids, 20, "cache_params"), expected, tolerance)
    assert_near(decode(model, ids, 20), expected, tolerance)
    assert_near(decode(model, ids, 1), expected, tolerance)


def test_time_step_limit_changes_the_model():
    """The limits of the table are narrow enough to bind, so equality there says that the clamp is in place."""
    limited, _ = mamba2_pair(**MAMBA2["time-step-limit"])
    free, _ = mamba2_pair()
    with torch.no_grad():
        assert (limited(tokens(34)).logits - free(tokens(34)).logits).abs().max() > 1e-2


# Interleaved ---------------------------------------------------------------------------------------------------------
def test_equals_bamba():
    """A published hybrid: Mamba-2 and attention layers, an MLP in each; its rotary embedding set to cover the head."""
    config = BambaConfig(
        **{**BASE, "num_hidden_layers": 4},
        attn_layer_indices=[1, 3],
        mamba_n_heads=4,
        mamba_n_groups=groups(2),
        mamba_d_state=8,
        rope_parameters=dict(ROPE),
    )
    config.rope_parameters["partial_rotary_factor"] = 1.0
    upstream = randomize_(BambaForCausalLM(config)).eval()
    ours = BMojoConfig(
        **{**BASE, "num_hidden_layers": 4},
        rope_parameters=ROPE,
        layer_types=["linear_attention", "full_attention"] * 2,
        ssm_num_heads=4,
        ssm_head_dim=16,
        ssm_num_groups=groups(2),
        ssm_state_size=8,
    )
    state = {}
    for key, tensor in mamba2_names(upstream.state_dict(), "mamba").items():
        key = key.replace("feed_forward", "mlp").replace("pre_ff_layernorm", "post_attention_layernorm")
        state[key.replace("final_layernorm", "norm")] = tensor
    model = BMojoForCausalLM(ours).eval()
    model.load_state_dict(state, strict=True)
    ids = tokens(34)
    with torch.no_grad():
        expected = upstream(ids).logits
        assert_near(model(ids).logits, expected, 1e-5)
    # Upstream's decoding counts positions from 0 again unless it is told otherwise, so its prefill is the reference.
    assert_near(decode(model, ids, 20), expected, 1e-5)


def upstream_modules(config, model, index):
    """Layer `index` of ours as modules of transformers with the same weights: (norms, mixers, MLP, rotary)."""
    llama = LlamaConfig(**BASE, rope_parameters=ROPE, attn_implementation="eager")
    mamba2 = Mamba2Config(
        hidden_size=32,
        num_hidden_layers=config.num_hidden_layers,
        num_heads=config.ssm_num_heads,
        head_dim=config.ssm_head_dim,
        state_size=config.ssm_state_size,
        n_groups=config.ssm_num_groups,
        expand=config.ssm_num_heads * config.ssm_head_dim // 32,
        layer_norm_epsilon=1e-5,
        chunk_size=8,
    )
    prefix = f"model.layers.{index}."
    state = {key[len(prefix) :]: value for key, value in model.state_dict().items() if key.startswith(prefix)}

    def load(module, part):
        own = {key[len(part) + 1 :]: value for key, value in state.items() if key.startswith(f"{part}.")}
        own = {key.replace("scalars.", "").replace("conv.", "conv1d."): value for key, value in own.items()}
        if "conv1d.weight" in own:
            own["conv1d.weight"] = own["conv1d.weight"].unsqueeze(1)
        module.load_state_dict(own, strict=True)
        return module.to(next(iter(own.values())).dtype).eval()

    mixers = {}
    if config.layer_types[index] in ("linear_attention", "bmojo"):
        mixers["ssm"] = load(Mamba2Mixer(mamba2, index), "fading")
    if config.layer_types[index] != "linear_attention":
        mixers["attention"] = load(LlamaAttention(llama, index), "self_attn")
    norms = [load(LlamaRMSNorm(32, 1e-5), part) for part in ("input_layernorm", "post_attention_layernorm")]
    return norms, mixers, load(LlamaMLP(llama), "mlp"), LlamaRotaryEmbedding(llama)


def band_mask(length, window):
    """Additive [1, 1, T, T] mask of a causal window that counts the query itself."""
    mask = torch.full((length, length), -torch.inf)
    for i in range(length):
        mask[i, max(0, i - window + 1) : i + 1] = 0
    return mask[None, None]


def record_layers(model, run):
    """The outputs of every decoder layer over the calls made by `run`, joined along the tokens."""
    kept = [[] for _ in model.model.layers]
    hooks = [
        layer.register_forward_hook(lambda _, __, out, i=i: kept[i].append(out[0] if isinstance(out, tuple) else out))
        for i, layer in enumerate(model.model.layers)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts, dim=1) for parts in kept]


STACK = ["linear_attention", "full_attention", "sliding_attention", "linear_attention"]


def stack_model(layer_types, **fields):
    config = BMojoConfig(
        **{**BASE, "num_hidden_layers": len(layer_types)},
        rope_parameters=ROPE,
        layer_types=layer_types,
        ssm_num_heads=4,
        ssm_head_dim=8,
        ssm_state_size=8,
        ssm_num_groups=groups(2),
        **fields,
    )
    return randomize_(BMojoForCausalLM(config)).eval()


@torch.no_grad()
def test_interleaved_layers_equal_hand_stacked_modules():
    model, ids = stack_model(STACK, window_size=5), tokens(30)
    prefill = record_layers(model, lambda: model(ids))
    decoded = record_layers(model, lambda: decode(model, ids, 11))
    hidden = model.model.embed_tokens(ids)
    for index, kind in enumerate(STACK):
        norms, mixers, mlp, rope = upstream_modules(model.config, model, index)
        u = norms[0](hidden)
        if kind == "linear_attention":
            hidden = hidden + mixers["ssm"](u)
        else:
            angles = rope(u, torch.arange(30)[None])
            mask = band_mask(30, 5 if kind == "sliding_attention" else 30)
            hidden = hidden + mixers["attention"](u, position_embeddings=angles, attention_mask=mask)[0]
        hidden = hidden + mlp(norms[1](hidden))
        assert_near(prefill[index], hidden, 1e-5)
        assert_near(decoded[index], hidden, 1e-5)


# B'MOJO-F ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("window", [1, 3, 8])
@torch.no_grad()
def test_no_eidetic_memory_and_a_window_of_fading_tokens_is_bmojo_f(window):
    """SSM outputs from transformers' Mamba-2 mixer, projections from its Llama attention, one dense [T, 2T] mask."""
    layer_types = ["bmojo", "bmojo"]
    model = stack_model(layer_types, window_size=window, fading_size=window, eidetic_size=0)
    ids = tokens(4 * window + 5, batch=1)
    length = ids.shape[1]
    prefill = record_layers(model, lambda: model(ids))
    decoded = record_layers(model, lambda: decode(model, ids, 1))
    hidden = model.model.embed_tokens(ids)
    for index in range(len(layer_types)):
        norms, mixers, mlp, rope = upstream_modules(model.config, model, index)
        attention, u = mixers["attention"], norms[0](hidden)
        cos, sin = rope(u, torch.arange(length)[None])

        def project(linear, x, rotary, cos=cos, sin=sin):
            heads = linear(x).view(1, length, -1, 8).transpose(1, 2)
            return (apply_rotary_pos_emb(heads, heads, cos, sin)[0] if rotary else heads)[0].transpose(0, 1)

        y = mixers["ssm"](u)
        sets = [project(attention.q_proj, u, True)]
        for source in (u, y):
            sets += [project(attention.k_proj, source, True), project(attention.v_proj, source, False)]
        out = bmojo_f_dense(*sets, window)
        hidden = hidden + attention.o_proj(out.reshape(1, length, -1))
        hidden = hidden + mlp(norms[1](hidden))
        assert_near(prefill[index], hidden, 1e-5)
        assert_near(decoded[index], hidden, 1e-5)


# Everything on -------------------------------------------------------------------------------------------------------
SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_parameters=ROPE,
    ssm_state_size=5,
    ssm_chunk_size=8,
    memory_block_size=8,
)
EVERYTHING = {
    "plain": dict(window_size=5, eidetic_size=3, fading_size=1),
    "decay": dict(window_size=5, eidetic_size=3, fading_size=1, eidetic_decay=0.05),
    "state": dict(window_size=5, eidetic_size=3, fading_size=1, innovation="state"),
    "key": dict(window_size=5, eidetic_size=3, fading_size=1, innovation="key"),
    "state-decay": dict(window_size=2, eidetic_size=8, fading_size=3, innovation="state", eidetic_decay=0.05),
    "untied": dict(window_size=5, eidetic_size=8, fading_size=3, tie_fading_projections=False, attention_bias=True),
    "window-1": dict(window_size=1, eidetic_size=1, fading_size=1, eidetic_decay=0.05),
    "one-slot": dict(window_size=8, eidetic_size=1, fading_size=0),
    "wide-fading": dict(window_size=5, eidetic_size=3, fading_size=5, innovation_taps=1),
    "more-fading-than-window": dict(window_size=2, eidetic_size=3, fading_size=9, innovation_taps=7),
    "stride": dict(window_size=6, eidetic_size=3, fading_size=2, fading_stride=3),
    "stride-state": dict(window_size=4, eidetic_size=3, fading_size=3, fading_stride=2, innovation="state"),
    "stride-window": dict(window_size=5, eidetic_size=2, fading_size=1, fading_stride=5, tie_fading_projections=False),
    "answers": dict(window_size=5, eidetic_size=3, fading_size=1, fading_delay=0, innovation="key"),
    "answers-alone": dict(window_size=1, eidetic_size=0, fading_size=2, fading_delay=0),
    "answers-stride": dict(window_size=4, eidetic_size=3, fading_size=2, fading_stride=3, fading_delay=0)
    | dict(tie_fading_projections=False, tie_fading_queries=False, innovation="state"),
    "answers-late": dict(window_size=6, eidetic_size=2, fading_size=3, fading_stride=2, fading_delay=4),
    "more-slots-than-tokens": dict(window_size=3, eidetic_size=64, fading_size=2),
    "nothing-but-window-and-fading": dict(window_size=4, eidetic_size=0, fading_size=2),
    "everything-off": dict(window_size=4, eidetic_size=0, fading_size=0),
    "no-positions": dict(window_size=4, eidetic_size=3, fading_size=2, rope_parameters=None),
    "nope-layer": dict(window_size=4, eidetic_size=3, fading_size=2, no_rope_layers=[0, 1]),
    "qk-norm": dict(window_size=4, eidetic_size=3, fading_size=2, qk_norm="head", head_dim=6),
    "full-qk-norm": dict(window_size=4, eidetic_size=3, fading_size=2, qk_norm="full", head_dim=6),
    "post-norm": dict(window_size=4, eidetic_size=3, fading_size=2, qk_norm="full", norm_position="post"),
    "post-norm-no-mlp": dict(window_size=4, eidetic_size=3, norm_position="post", intermediate_size=0),
    "multipliers": dict(window_size=4, eidetic_size=3, fading_size=2, **MULTIPLIERS),
    "multi-query": dict(window_size=4, eidetic_size=3, fading_size=2, num_key_value_heads=1),
    "multi-head": dict(window_size=4, eidetic_size=3, fading_size=2, num_key_value_heads=4, tie_word_embeddings=True),
    "biases": dict(
        window_size=4,
        eidetic_size=3,
        fading_size=2,
        attention_bias=True,
        attention_output_bias=False,
        mlp_bias=True,
        ssm_proj_bias=True,
        tie_fading_projections=False,
    ),
    "bare-ssm": dict(
        window_size=4,
        eidetic_size=3,
        fading_size=2,
        ssm_gated=False,
        ssm_norm=False,
        ssm_conv_bias=False,
        ssm_conv_act="linear",
        ssm_conv_kernel=1,
        innovation="state",
    ),
    "wide-ssm": dict(
        window_size=4,
        eidetic_size=3,
        fading_size=2,
        ssm_num_heads=6,
        ssm_head_dim=4,
        ssm_num_groups=3,
        ssm_time_step_limit=[0.2, 0.8],
        ssm_chunk_size=4,
        ssm_gated=False,
        ssm_conv_kernel=3,
    ),
    "mixed": dict(
        window_size=4,
        eidetic_size=3,
        fading_size=2,
        num_hidden_layers=4,
        layer_types=["bmojo", "linear_attention", "sliding_attention", "full_attention"],
    ),
    "no-mlp": dict(window_size=4, eidetic_size=3, fading_size=2, intermediate_size=0),
}


def small_model(dtype=torch.float64, seed=0, **fields):
    return randomize_(BMojoForCausalLM(BMojoConfig(**{**SMALL, **fields})), seed).to(dtype).eval()


def remembered(cache, layer, row=0):
    return frozenset(token.position for token in cache.remembered(layer, row))


def assert_equals_algorithm1(model, ids, tolerance=1e-9):
    """Prefill against the loop: logits, and in every B'MOJO layer the remembered positions."""
    expected, sets = algorithm1_forward(model, ids[0], rope_dtype=torch.float32)
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
    for layer, kind in enumerate(model.config.layer_types):
        if kind == "bmojo" and model.config.eidetic_size:
            assert remembered(out.past_key_values, layer) == sets[layer][-1]
    assert_near(out.logits[0], expected, tolerance)
    return expected, sets


@pytest.mark.parametrize("name", EVERYTHING)
def test_equals_algorithm1(name):
    model, ids = small_model(**EVERYTHING[name]), tokens(36, batch=1)
    assert_equals_algorithm1(model, ids)


@pytest.mark.parametrize(
    "name", ["plain", "state-decay", "window-1", "stride", "stride-state", "stride-window", "mixed"]
)
@torch.no_grad()
def test_decoding_equals_algorithm1_token_by_token(name):
    """After every single token: its logits, and the set of positions that each layer remembers."""
    model, ids = small_model(**EVERYTHING[name]), tokens(30, batch=1, seed=1)
    expected, sets = algorithm1_forward(model, ids[0], rope_dtype=torch.float32)
    cache = None
    for t in range(30):
        out = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        assert_near(out.logits[0, 0], expected[t], 1e-9)
        for layer, kind in enumerate(model.config.layer_types):
            if kind == "bmojo":
                assert remembered(cache, layer) == sets[layer][t]


@pytest.mark.parametrize("name", ["plain", "decay"])
@torch.no_grad()
def test_ties_keep_the_older_token(name):
    """SSM outputs of zero make every innovation zero: the first M tokens to leave the window stay for good."""
    model, ids = small_model(**EVERYTHING[name]), tokens(30, batch=1)
    for layer in model.model.layers:
        layer.fading.out_proj.weight.zero_()
    expected, sets = assert_equals_algorithm1(model, ids)
    assert sets[0][-1] == {0, 1, 2}
    assert_near(decode(model, ids, 1)[0], expected, 1e-9)


ATTENDING = ["plain", "state-decay", "more-fading-than-window", "stride", "stride-state", "mixed", "answers-stride"]


@pytest.mark.parametrize("name", ATTENDING)
@torch.no_grad()
def test_attentions_are_what_a_query_sees(name):
    """Column s of query t has weight iff t sees token s: in its window, remembered, or through its fading token."""
    model, ids = small_model(**EVERYTHING[name]), tokens(30, batch=1)
    _, sets = algorithm1_forward(model, ids[0])
    model.set_attn_implementation("eager")
    attentions = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    config = model.config
    layers = [index for index, kind in enumerate(config.layer_types) if kind != "linear_attention"]
    for index, weights in zip(layers, [layer for layer in attentions if layer is not None], strict=True):
        kind = config.layer_types[index]
        assert weights.shape == (1, config.num_attention_heads, 30, 30)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        for t in range(30):
            seen = set(range(0 if kind == "full_attention" else max(0, t - config.window_size + 1), t + 1))
            if kind == "bmojo":
                delay = config.window_size if config.fading_delay is None else config.fading_delay
                made = [s for s in range(t - delay + 1) if (s + 1) % config.fading_stride == 0]
                seen |= set(sets[index][t]) | set(made[-config.fading_size :])
            assert set(weights[0, 0, t].nonzero().flatten().tolist()) == seen


def test_memories_take_part():
    """Switching any memory off changes the logits, so equality with the loop covers all of them."""
    full = dict(window_size=4, eidetic_size=3, fading_size=2)
    ids = tokens(30, batch=1)
    with torch.no_grad():
        everything = small_model(**full)(ids).logits
        for change in ("eidetic_size", "fading_size"):
            without = small_model(**{**full, change: 0})(ids).logits
            assert (everything - without)[:, 4:].abs().max() > 1e-3
            assert torch.allclose(everything[:, :4], without[:, :4], atol=1e-9)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    delayed=st.integers(1, 9),
    shown=st.one_of(st.none(), st.integers(0, 9)),
    stride=st.sampled_from([1, 1, 2, 3]),
    slots=st.sampled_from([0, 1, 3, 8]),
    fading=st.integers(0, 9),
    decay=st.sampled_from([0.0, 0.05, 1.0]),
    innovation=st.sampled_from(["output", "state", "key"]),
    taps=st.integers(1, 6),
    tied=st.booleans(),
    block=st.integers(1, 30),
    length=st.integers(1, 26),
    seed=st.integers(0, 10**6),
)
def test_any_setting_equals_algorithm1(
    delayed, shown, stride, slots, fading, decay, innovation, taps, tied, block, length, seed
):
    model = small_model(
        seed=seed,
        window_size=delayed * stride,
        fading_stride=stride,
        fading_delay=None if shown is None else min(shown, delayed) * stride,
        eidetic_size=slots,
        fading_size=fading,
        eidetic_decay=decay,
        innovation=innovation,
        innovation_taps=taps,
        tie_fading_projections=tied,
        memory_block_size=block,
        num_hidden_layers=1,
    )
    assert_equals_algorithm1(model, tokens(length, batch=1, seed=seed))
