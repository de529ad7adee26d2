"""The S6 row of the family table: SSM layers of `ssm_type="mamba"` equal transformers' Mamba with the same weights.

As in test_family.py: random tiny models copied tensor by tensor, logits compared in prefill and in cached decoding;
what has no counterpart upstream is compared with the token-by-token loop of `oracles`.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MambaConfig, MambaForCausalLM

from modeling_bmojo import BMojoConfig, BMojoForCausalLM, dispatch_bmojo
from modeling_bmojo.fading_s6_bmojo import S6FadingMemory
from modeling_bmojo.s6_ops import chunk_s6, step_s6
from tests.modeling.test_family import (
    assert_equals_algorithm1,
    assert_near,
    decode,
    fp64_norms_,
    remembered,
    small_model,
    tokens,
)
from tests.oracles import algorithm1_forward, randomize_


# fields of upstream's config. Ours takes the inner width as heads times channels per head.
MAMBA = {
    "default": {},
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(use_bias=True),
    "no-conv-bias": dict(use_conv_bias=False, conv_kernel=2),
    "one-tap-gelu": dict(conv_kernel=1, hidden_act="gelu"),
    "inner-is-hidden": dict(expand=1, state_size=3),
    "inner-wide-full-rank": dict(expand=3, time_step_rank=32, state_size=1),
}


def mamba_names(state):
    """Upstream's Mamba state dict under our names; the convolution loses its dimension of size 1."""
    renamed = {}
    for key, tensor in state.items():
        new = key.replace("backbone.embeddings", "model.embed_tokens").replace("backbone.norm_f", "model.norm")
        new = new.replace("backbone.layers", "model.layers").replace(".norm.weight", ".input_layernorm.weight")
        new = new.replace("model.input_layernorm", "model.norm").replace("mixer.dt_proj.bias", "mixer.scalars.dt_bias")
        for scalar in ("A_log", "D"):
            new = new.replace(f"mixer.{scalar}", f"mixer.scalars.{scalar}")
        new = new.replace("mixer.conv1d", "mixer.conv").replace(".mixer.", ".fading.")
        renamed[new] = tensor.squeeze(1) if new.endswith("conv.weight") else tensor
    return renamed


def mamba_pair(dtype=torch.float32, **fields):
    """(upstream model, our model) with the same random weights. In float64 upstream's residuals stay float64 too."""
    own = dict(vocab_size=61, hidden_size=32, num_hidden_layers=3, state_size=5, layer_norm_epsilon=1e-5)
    own |= dict(tie_word_embeddings=False, residual_in_fp32=dtype == torch.float32)
    theirs = MambaConfig(**{**own, **fields})
    upstream = randomize_(MambaForCausalLM(theirs)).to(dtype).eval()
    config = BMojoConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=0,
        num_hidden_layers=3,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        tie_word_embeddings=theirs.tie_word_embeddings,
        layer_types=["linear_attention"] * 3,
        ssm_type="mamba",
        ssm_num_heads=4,
        ssm_head_dim=theirs.intermediate_size // 4,
        ssm_state_size=theirs.state_size,
        ssm_time_step_rank=theirs.time_step_rank,
        ssm_conv_kernel=theirs.conv_kernel,
        ssm_conv_bias=theirs.use_conv_bias,
        ssm_conv_act=theirs.hidden_act,
        ssm_proj_bias=theirs.use_bias,
        ssm_chunk_size=9,
    )
    model = BMojoForCausalLM(config).to(dtype).eval()
    model.load_state_dict(mamba_names(upstream.state_dict()), strict=True)
    return upstream, model


@pytest.mark.parametrize("name", MAMBA)
def test_equals_mamba(name):
    upstream, model = mamba_pair(**MAMBA[name])
    ids = tokens(34)
    with torch.no_grad():
        expected = upstream(ids).logits
        assert expected.std() > 0.1
        assert_near(model(ids).logits, expected, 1e-5)
    assert_near(decode(upstream, ids, 20, "cache_params"), expected, 1e-5)
    assert_near(decode(model, ids, 20), expected, 1e-5)
    assert_near(decode(model, ids, 1), expected, 1e-5)


@pytest.mark.parametrize("name", MAMBA)
def test_equals_mamba_in_float64(name, monkeypatch):
    """Upstream rounds to float32 inside its scan and norms; without these casts only the order of sums differs."""
    upstream, model = mamba_pair(torch.float64, **MAMBA[name])
    ids = tokens(34)
    with torch.no_grad():
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        expected = fp64_norms_(upstream)(ids).logits
        monkeypatch.undo()
        assert expected.dtype == torch.float64
        assert_near(model(ids).logits, expected, 1e-9)
    assert_near(decode(model, ids, 20), expected, 1e-9)
    assert_near(decode(model, ids, 1), expected, 1e-9)


def test_gradients_equal_those_of_mamba():
    upstream, model = mamba_pair(use_bias=True)
    ids = tokens(24)
    upstream(ids, labels=ids).loss.backward()
    model(ids, labels=ids).loss.backward()
    ours = dict(model.named_parameters())
    theirs = mamba_names({key: value.grad for key, value in upstream.named_parameters()})
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        assert gradient.abs().max() > 0
        assert_near(ours[key].grad, gradient, 1e-5)


# Everything on -------------------------------------------------------------------------------------------------------
S6 = dict(ssm_type="mamba", window_size=4, eidetic_size=3, fading_size=2, ssm_state_size=3)
EVERYTHING = {
    "output": {},
    "state-decay": dict(innovation="state", eidetic_decay=0.05, tie_fading_projections=False),
    "biases": dict(ssm_proj_bias=True, attention_bias=True, innovation_taps=1),
    "bare": dict(ssm_gated=False, ssm_conv_bias=False, ssm_conv_act="linear", ssm_conv_kernel=1, innovation="state"),
    "wide": dict(ssm_num_heads=3, ssm_head_dim=8, ssm_time_step_rank=5, ssm_time_step_limit=[0.2, 0.8]),
    "mixed": dict(
        num_hidden_layers=4, layer_types=["bmojo", "linear_attention", "sliding_attention", "full_attention"]
    ),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_equals_algorithm1(name):
    model, ids = small_model(**S6, **EVERYTHING[name]), tokens(30, batch=1)
    assert all(isinstance(layer.fading, S6FadingMemory) for layer in model.model.layers if layer.spec.has_ssm)
    assert_equals_algorithm1(model, ids)


@pytest.mark.parametrize("name", ["output", "state-decay", "mixed"])
@torch.no_grad()
def test_decoding_equals_algorithm1_token_by_token(name):
    """After every single token: its logits, and the set of positions that each layer remembers."""
    model, ids = small_model(**S6, **EVERYTHING[name]), tokens(24, batch=1, seed=1)
    expected, sets = algorithm1_forward(model, ids[0], rope_dtype=torch.float32)
    cache = None
    for t in range(24):
        out = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        assert_near(out.logits[0, 0], expected[t], 1e-9)
        for layer, kind in enumerate(model.config.layer_types):
            if kind == "bmojo":
                assert remembered(cache, layer) == sets[layer][t]


@settings(max_examples=12)
@given(
    window=st.integers(1, 6),
    slots=st.sampled_from([0, 1, 3]),
    fading=st.integers(0, 5),
    innovation=st.sampled_from(["output", "state"]),
    heads=st.integers(1, 5),
    rank=st.integers(1, 4),
    kernel=st.integers(1, 4),
    chunk=st.integers(1, 20),
    length=st.integers(1, 22),
    seed=st.integers(0, 10**6),
)
def test_any_setting_equals_algorithm1(window, slots, fading, innovation, heads, rank, kernel, chunk, length, seed):
    model = small_model(
        seed=seed,
        ssm_type="mamba",
        window_size=window,
        eidetic_size=slots,
        fading_size=fading,
        innovation=innovation,
        ssm_num_heads=heads,
        ssm_head_dim=3,
        ssm_time_step_rank=rank,
        ssm_conv_kernel=kernel,
        ssm_chunk_size=chunk,
        num_hidden_layers=1,
    )
    assert_equals_algorithm1(model, tokens(length, batch=1, seed=seed))


@pytest.mark.parametrize("name", ["output", "state-decay"])
def test_one_token_trains_on_a_cache_as_many_do(name, monkeypatch):
    """A step's gradients are those of the chunked scan from the same state, although the step overwrites that state."""
    model, ids = small_model(**S6, **EVERYTHING[name]).train(), tokens(13)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :12], use_cache=True).past_key_values
    found = []
    for form in (step_s6, chunk_s6):
        monkeypatch.setitem(dispatch_bmojo.FORMS["torch"], "s6_step", dispatch_bmojo.Form("torch", "", form))
        model.zero_grad()
        logits = model(input_ids=ids[:, 12:], past_key_values=copy.deepcopy(cache)).logits
        logits.square().sum().backward()
        found.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    assert found[0].keys() == found[1].keys() and any("A_log" in key for key in found[0])
    for key, gradient in found[0].items():
        assert_near(gradient, found[1][key], 1e-9)
