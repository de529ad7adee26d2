"""Whole models with each of the other fading memories equal the token-by-token loop of `oracles`, everything on.

That their mixers are Mamba's, Qwen3-Next's and the published KalmaNet's is in test_family_s6, test_family_delta and
test_family_kalma; Mamba-2 is in test_family and everywhere else.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_bmojo import dispatch_bmojo
from modeling_bmojo.delta_ops import chunk_delta, step_delta
from modeling_bmojo.fading_delta_bmojo import GatedDeltaFadingMemory
from modeling_bmojo.fading_kalma_bmojo import GatedKalmaFadingMemory
from modeling_bmojo.fading_s6_bmojo import S6FadingMemory
from modeling_bmojo.kalma_ops import chunk_kalma, step_kalma
from modeling_bmojo.s6_ops import chunk_s6, step_s6
from tests.modeling.test_family import assert_equals_algorithm1, assert_near, remembered, small_model, tokens
from tests.oracles import algorithm1_forward


MIXERS = {"mamba": S6FadingMemory, "gated_delta": GatedDeltaFadingMemory, "kalmanet": GatedKalmaFadingMemory}
# name of the step's operation, its two forms
STEPS = {
    "mamba": ("s6_step", step_s6, chunk_s6),
    "gated_delta": ("delta_step", step_delta, chunk_delta),
    "kalmanet": ("kalma_step", step_kalma, chunk_kalma),
}
ALL = dict(window_size=4, eidetic_size=3, fading_size=2, ssm_state_size=3)
BARE = dict(ssm_gated=False, ssm_conv_bias=False, ssm_conv_act="linear", ssm_conv_kernel=1)
EVERYTHING = {
    "output": {},
    "state-decay": dict(innovation="state", eidetic_decay=0.05, tie_fading_projections=False),
    "biases": dict(ssm_proj_bias=True, attention_bias=True, innovation_taps=1),
    "bare": BARE | dict(ssm_norm=False),
    "wide": dict(ssm_num_heads=6, ssm_num_groups=3, ssm_head_dim=8, ssm_time_step_limit=[0.2, 0.8]),
    "mixed": dict(
        num_hidden_layers=4, layer_types=["bmojo", "linear_attention", "sliding_attention", "full_attention"]
    ),
}
# What a kind adds to a setting, or has in its place.
OWN = {
    ("mamba", "bare"): BARE | dict(innovation="state"),
    ("mamba", "wide"): dict(
        ssm_num_heads=3, ssm_num_groups=1, ssm_head_dim=8, ssm_time_step_rank=5, ssm_time_step_limit=[0.2, 0.8]
    ),
    ("kalmanet", "output"): dict(ssm_expand_rank=2),
    ("kalmanet", "biases"): dict(ssm_ridge=0.2),
}
CASES = [(kind, name) for kind in MIXERS for name in EVERYTHING]


def everything(kind, name):
    steps = dict(ssm_solver_steps=6) if kind == "kalmanet" else {}
    own = OWN.get((kind, name), {})
    return small_model(ssm_type=kind, **steps, **ALL | EVERYTHING[name] | own)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_equals_algorithm1(kind, name):
    model, ids = everything(kind, name), tokens(20 if kind == "kalmanet" else 30, batch=1)
    assert all(isinstance(layer.fading, MIXERS[kind]) for layer in model.model.layers if layer.spec.has_ssm)
    assert_equals_algorithm1(model, ids)


@pytest.mark.parametrize(("kind", "name"), [case for case in CASES if case[1] in ("output", "state-decay", "mixed")])
@torch.no_grad()
def test_decoding_equals_algorithm1_token_by_token(kind, name):
    """After every single token: its logits, and the set of positions that each layer remembers."""
    length = 16 if kind == "kalmanet" else 24
    model, ids = everything(kind, name), tokens(length, batch=1, seed=1)
    expected, sets = algorithm1_forward(model, ids[0], rope_dtype=torch.float32)
    cache = None
    for t in range(length):
        out = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        assert_near(out.logits[0, 0], expected[t], 1e-9)
        for layer, layer_type in enumerate(model.config.layer_types):
            if layer_type == "bmojo":
                assert remembered(cache, layer) == sets[layer][t]


SIZES_OF = {
    "mamba": dict(
        ssm_num_heads=st.integers(1, 5), ssm_time_step_rank=st.integers(1, 4), ssm_conv_kernel=st.integers(1, 4)
    ),
    "gated_delta": dict(groups=st.integers(1, 3), repeat=st.integers(1, 2), ssm_conv_kernel=st.integers(1, 4)),
    "kalmanet": dict(
        groups=st.integers(1, 2), repeat=st.integers(1, 2), ssm_expand_rank=st.sampled_from([None, 1]),
        ssm_solver_steps=st.just(4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MIXERS)
@settings(max_examples=10)
@given(
    data=st.data(),
    window=st.integers(1, 6),
    slots=st.sampled_from([0, 1, 3]),
    fading=st.integers(0, 5),
    innovation=st.sampled_from(["output", "state"]),
    chunk=st.integers(1, 20),
    length=st.integers(1, 20),
    seed=st.integers(0, 10**6),
)
def test_any_setting_equals_algorithm1(kind, data, window, slots, fading, innovation, chunk, length, seed):
    sizes = data.draw(st.fixed_dictionaries(SIZES_OF[kind]))
    if "groups" in sizes:
        sizes |= dict(ssm_num_groups=sizes["groups"], ssm_num_heads=sizes.pop("groups") * sizes.pop("repeat"))
    model = small_model(
        seed=seed,
        ssm_type=kind,
        window_size=window,
        eidetic_size=slots,
        fading_size=fading,
        innovation=innovation,
        ssm_head_dim=3,
        ssm_chunk_size=chunk,
        num_hidden_layers=1,
        **sizes,
    )
    assert_equals_algorithm1(model, tokens(length, batch=1, seed=seed))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in MIXERS
        for name in ("output", "state-decay")
        if (kind, name) != ("kalmanet", "state-decay")
    ],
)
def test_one_token_trains_on_a_cache_as_many_do(kind, name, monkeypatch):
    """A step's gradients are those of the chunked scan from the same state, although the step overwrites that state."""
    model, ids = everything(kind, name).train(), tokens(13)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :12], use_cache=True).past_key_values
    operation, *forms = STEPS[kind]
    found = []
    for form in forms:
        monkeypatch.setitem(dispatch_bmojo.FORMS["torch"], operation, dispatch_bmojo.Form("torch", "", form))
        model.zero_grad()
        logits = model(input_ids=ids[:, 12:], past_key_values=copy.deepcopy(cache)).logits
        logits.square().sum().backward()
        found.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    assert found[0].keys() == found[1].keys() and any("A_log" in key for key in found[0])
    for key, gradient in found[0].items():
        assert_near(gradient, found[1][key], 1e-9)
