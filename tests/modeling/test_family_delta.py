"""The gated delta row of the family table: the mixer equals transformers' Qwen3-Next layer with the same weights.

Qwen3-Next as a whole does not map: its attention has an output gate and its MLPs are experts. So the layer itself is
compared, in prefill and in cached decoding; whole models are in test_fading_whole.py.
"""

import pytest
import torch
from transformers import Qwen3NextConfig
from transformers.cache_utils import DynamicCache
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from modeling_bmojo import BMojoCache, BMojoConfig
from modeling_bmojo.fading_delta_bmojo import GatedDeltaFadingMemory
from tests.modeling.test_family import assert_near
from tests.oracles import randomize_


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
