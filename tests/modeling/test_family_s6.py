"""The S6 row of the family table: SSM layers of `ssm_type="mamba"` equal transformers' Mamba with the same weights.

As in test_family.py: random tiny models copied tensor by tensor, logits compared in prefill and in cached decoding;
what has no counterpart upstream is in test_fading_whole.py.
"""

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from modeling_bmojo import BMojoConfig, BMojoForCausalLM
from tests.modeling.test_family import assert_near, decode, fp64_norms_, tokens
from tests.oracles import randomize_


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
