"""The gated delta row of the family table: the mixer equals transformers' Qwen3-Next layer with the same weights.

Qwen3-Next as a whole does not map: its attention has an output gate and its MLPs are experts. So the layer itself is
compared, in prefill and in cached decoding, and whole models with the token-by-token loop of `oracles`.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3NextConfig
from transformers.cache_utils import DynamicCache
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from modeling_bmojo import BMojoCache, BMojoConfig, dispatch_bmojo
from modeling_bmojo.delta_ops import chunk_delta, step_delta
from modeling_bmojo.fading_delta_bmojo import GatedDeltaFadingMemory
from tests.modeling.test_family import assert_equals_algorithm1, assert_near, remembered, small_model, tokens
from tests.oracles import algorithm1_forward, randomize_


QWEN3_NEXT = {
    "default": {},
    "one-key-head": dict(linear_num_key_heads=1),
    "a-key-head-each": dict(linear_num_key_heads=4, linear_value_head_dim=3),
    "two-taps": dict(linear_conv_kernel_dim=2, hidden_act="gelu"),
}


def ours_of(theirs, config):
    """Upstream's state dict under our names and in our order of rows: theirs lie key head by key head."""
    heads, groups = config.linear_num_value_heads, config.linear_num_key_heads
    wide, long = config.linear_value_head_dim, config.linear_key_head_dim
    state = {name: value.detach() for name, value in theirs.items()}
    by_group = state["in_proj_qkvz.weight"].unflatten(0, (groups, -1))
    q, k, v, z = by_group.split([long, long, heads // groups * wide, heads // groups * wide], dim=1)
    b, a = state["in_proj_ba.weight"].unflatten(0, (groups, -1)).chunk(2, dim=1)
    conv = state["conv1d.weight"].squeeze(1)
    of_q, of_k, of_v = conv.split([groups * long, groups * long, heads * wide])
    return {
        "in_proj.weight": torch.cat([part.flatten(0, 1) for part in (z, v, k, q, a, b)]),
        "conv.weight": torch.cat([of_v, of_k, of_q]),
        "scalars.A_log": state["A_log"],
        "scalars.dt_bias": state["dt_bias"],
        "norm.weight": state["norm.weight"],
        "out_proj.weight": state["out_proj.weight"],
    }


def pair(**fields):
    """(upstream layer, our layer, our configuration) with the same random weights."""
    own = dict(hidden_size=32, num_hidden_layers=1, layer_types=["linear_attention"], linear_conv_kernel_dim=4)
    own |= dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=6, linear_value_head_dim=8)
    theirs = Qwen3NextConfig(**{**own, **fields})
    upstream = randomize_(Qwen3NextGatedDeltaNet(theirs, 0)).eval()
    config = BMojoConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        rms_norm_eps=theirs.rms_norm_eps,
        layer_types=["linear_attention"],
        ssm_type="gated_delta",
        ssm_num_heads=theirs.linear_num_value_heads,
        ssm_head_dim=theirs.linear_value_head_dim,
        ssm_state_size=theirs.linear_key_head_dim,
        ssm_num_groups=theirs.linear_num_key_heads,
        ssm_conv_kernel=theirs.linear_conv_kernel_dim,
        ssm_conv_bias=False,
        ssm_conv_act=theirs.hidden_act,
        ssm_chunk_size=9,
    )
    layer = GatedDeltaFadingMemory(config, 0).eval()
    layer.load_state_dict(ours_of(upstream.state_dict(), theirs), strict=True)
    return upstream, layer, config, theirs


def hidden(length, batch=2):
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("name", QWEN3_NEXT)
@torch.no_grad()
def test_equals_qwen3_next(name):
    upstream, layer, config, theirs = pair(**QWEN3_NEXT[name])
    u = hidden(30)
    expected = upstream(u)
    assert expected.std() > 0.05
    assert_near(layer(u)[0], expected, 1e-5)
    states, other = BMojoCache(config).layers[0], DynamicCache(config=theirs)
    states.prepare(u)
    for cut in (slice(0, 20), slice(20, 23), *(slice(t, t + 1) for t in range(23, 30))):
        assert_near(layer(u[:, cut], layer=states)[0], expected[:, cut], 1e-5)
        assert_near(upstream(u[:, cut], cache_params=other), expected[:, cut], 1e-5)


def test_gradients_equal_those_of_qwen3_next():
    upstream, layer, _, theirs = pair()
    u, weights = hidden(24), hidden(24).flip(1)
    (upstream(u) * weights).sum().backward()
    (layer(u)[0] * weights).sum().backward()
    wanted = ours_of({name: value.grad for name, value in upstream.named_parameters()}, theirs)
    found = {name: value.grad for name, value in layer.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0
        assert_near(found[name], gradient, 1e-5)


# Everything on -------------------------------------------------------------------------------------------------------
DELTA = dict(ssm_type="gated_delta", window_size=4, eidetic_size=3, fading_size=2, ssm_state_size=3)
EVERYTHING = {
    "output": {},
    "state-decay": dict(innovation="state", eidetic_decay=0.05, tie_fading_projections=False),
    "biases": dict(ssm_proj_bias=True, attention_bias=True, innovation_taps=1),
    "bare": dict(ssm_gated=False, ssm_norm=False, ssm_conv_bias=False, ssm_conv_act="linear", ssm_conv_kernel=1),
    "wide": dict(ssm_num_heads=6, ssm_num_groups=3, ssm_head_dim=8, ssm_time_step_limit=[0.2, 0.8]),
    "mixed": dict(
        num_hidden_layers=4, layer_types=["bmojo", "linear_attention", "sliding_attention", "full_attention"]
    ),
}


@pytest.mark.parametrize("name", EVERYTHING)
def test_equals_algorithm1(name):
    model, ids = small_model(**DELTA, **EVERYTHING[name]), tokens(30, batch=1)
    assert all(isinstance(layer.fading, GatedDeltaFadingMemory) for layer in model.model.layers if layer.spec.has_ssm)
    assert_equals_algorithm1(model, ids)


@pytest.mark.parametrize("name", ["output", "state-decay", "mixed"])
@torch.no_grad()
def test_decoding_equals_algorithm1_token_by_token(name):
    """After every single token: its logits, and the set of positions that each layer remembers."""
    model, ids = small_model(**DELTA, **EVERYTHING[name]), tokens(24, batch=1, seed=1)
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
    groups=st.integers(1, 3),
    repeat=st.integers(1, 2),
    kernel=st.integers(1, 4),
    chunk=st.integers(1, 20),
    length=st.integers(1, 22),
    seed=st.integers(0, 10**6),
)
def test_any_setting_equals_algorithm1(window, slots, fading, innovation, groups, repeat, kernel, chunk, length, seed):
    model = small_model(
        seed=seed,
        ssm_type="gated_delta",
        window_size=window,
        eidetic_size=slots,
        fading_size=fading,
        innovation=innovation,
        ssm_num_heads=groups * repeat,
        ssm_num_groups=groups,
        ssm_head_dim=3,
        ssm_conv_kernel=kernel,
        ssm_chunk_size=chunk,
        num_hidden_layers=1,
    )
    assert_equals_algorithm1(model, tokens(length, batch=1, seed=seed))


@pytest.mark.parametrize("name", ["output", "state-decay"])
def test_one_token_trains_on_a_cache_as_many_do(name, monkeypatch):
    """A step's gradients are those of the chunked scan from the same state, although the step overwrites that state."""
    model, ids = small_model(**DELTA, **EVERYTHING[name]).train(), tokens(13)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :12], use_cache=True).past_key_values
    found = []
    for form in (step_delta, chunk_delta):
        monkeypatch.setitem(dispatch_bmojo.FORMS["torch"], "delta_step", dispatch_bmojo.Form("torch", "", form))
        model.zero_grad()
        logits = model(input_ids=ids[:, 12:], past_key_values=copy.deepcopy(cache)).logits
        logits.square().sum().backward()
        found.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    assert found[0].keys() == found[1].keys() and any("A_log" in key for key in found[0])
    for key, gradient in found[0].items():
        assert_near(gradient, found[1][key], 1e-9)
