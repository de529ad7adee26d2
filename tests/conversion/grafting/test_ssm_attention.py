"""`ssm_init: attention`: the SSM is the layer's linear attention, every tensor has its formula, the rest is refused."""

import math

import pytest
import torch
from transformers import LlamaConfig

from conversion.grafting.families import backbone_fields, bmojo_config_for
from conversion.grafting.report import read_report
from conversion.grafting.ssm_init import SSM_INITS
from conversion.grafting.ssm_init_attention import ATTENTION_FIELDS, attention, attention_memory, check_attention
from conversion.grafting.ssm_scalars import smoother_time_constants
from modeling_bmojo import BMojoForCausalLM
from tests.conversion.graft_sources import SIZES, SOURCES, VOCAB, W, graft, logits, save_source


TAU = (2.0, 16.0)


def attention_config(source=None, **memory):
    source = source or LlamaConfig(**SIZES)
    memory = attention_memory(backbone_fields(source), {**ATTENTION_FIELDS, "window_size": W, **memory})
    return bmojo_config_for(source, memory)


def layer_tensors(config, biases: bool) -> dict[str, torch.Tensor]:
    inner, narrow, hidden = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
        config.hidden_size,
    )
    shapes = {
        "q_proj": (inner, hidden),
        "k_proj": (narrow, hidden),
        "v_proj": (narrow, hidden),
        "o_proj": (hidden, inner),
    }
    tensors = {f"{name}.weight": torch.randn(shape) / math.sqrt(shape[1]) for name, shape in shapes.items()}
    return tensors | ({f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()} if biases else {})


def linear_attention(config, layer, u: torch.Tensor) -> torch.Tensor:
    """The module's equation with loops over tokens, heads and the past; `u` `[T, hidden]` in float64."""
    heads, shared, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    maps = {name: value.double() for name, value in layer.items()}
    q, k, v = (u @ maps[f"{n}_proj.weight"].T + maps.get(f"{n}_proj.bias", 0.0) for n in "qkv")
    q, k, v = q.unflatten(1, (heads, size)), k.unflatten(1, (shared, size)), v.unflatten(1, (shared, size))
    tau = smoother_time_constants(heads, *TAU)
    scale = config.attention_multiplier or 1 / math.sqrt(size)
    rows = []
    for t in range(len(u)):
        parts = []
        for h in range(heads):
            g, out = h // (heads // shared), torch.zeros(size, dtype=torch.float64)
            for s in range(t + 1):
                weight = math.exp(-(t - s) / tau[h]) / tau[h] * (q[t, h] @ k[s, g]) * scale
                out = out + weight * v[s, g]
            parts.append(out)
        y = torch.cat(parts)
        if config.ssm_gated:
            values = v[t].repeat_interleave(heads // shared, dim=0).flatten()
            z = 0.5 * (u[t] @ maps["o_proj.weight"] + values)
            y = y * torch.nn.functional.silu(z)
        if config.ssm_norm:
            y = y.unflatten(0, (heads, size))
            y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + config.rms_norm_eps)).flatten()
        rows.append(maps["o_proj.weight"] @ y + maps.get("o_proj.bias", 0.0))
    return torch.stack(rows)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("head_dim", [8, 6])
def test_the_ssm_is_the_layer_s_linear_attention(gated, norm, biases, head_dim):
    source = LlamaConfig(**SIZES, attention_bias=biases, head_dim=head_dim)
    config = attention_config(source, ssm_gated=gated, ssm_norm=norm)
    assert config.ssm_proj_bias is biases
    layer = layer_tensors(config, biases)
    fading = BMojoForCausalLM(config).model.layers[0].fading
    fading.load_state_dict(attention(config, layer, TAU))
    u = torch.randn(1, 40, 32, dtype=torch.float64)
    y, _ = fading.double()(u)
    torch.testing.assert_close(y[0], linear_attention(config, layer, u[0]), atol=2e-6, rtol=2e-6)


def test_the_scale_of_the_scores_is_the_source_s():
    config = attention_config()
    config.attention_multiplier = 0.7
    layer = layer_tensors(config, False)
    fading = BMojoForCausalLM(config).model.layers[0].fading
    fading.load_state_dict(attention(config, layer, TAU))
    u = torch.randn(1, 20, 32, dtype=torch.float64)
    y, _ = fading.double()(u)
    torch.testing.assert_close(y[0], linear_attention(config, layer, u[0]), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    "name", ["llama", "llama_biases_tied", "llama_narrow_heads", "mistral", "qwen2", "smollm3", "phi3", "granite"]
)
def test_graft_from_attention_accounts_for_every_tensor_and_keeps_the_source(name, tmp_path):
    source = save_source(tmp_path / "source", name)
    assert graft(tmp_path, ssm_init="attention") == 0
    report = read_report(tmp_path / "graft")
    target = {key for key, entry in report["target_tensors"].items() if "attention without its softmax" in str(entry)}
    model = BMojoForCausalLM.from_pretrained(tmp_path / "graft")
    assert target == {key for key in model.state_dict() if ".fading." in key}
    torch.testing.assert_close(logits(model), logits(source), atol=1e-5, rtol=1e-5)
    assert bool(logits(model, 5 * W).isfinite().all())


def test_attention_lets_a_gradient_reach_every_tensor():
    config = attention_config(ssm_gated=True, ssm_norm=True)
    model = BMojoForCausalLM(config)
    for layer in model.model.layers:
        own = {name: value.detach() for name, value in layer.self_attn.state_dict().items()}
        layer.fading.load_state_dict(attention(config, own))
    ids = torch.randint(3, VOCAB, (1, 3 * W))
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.model.layers[0].fading.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("source", "memory", "words"),
    [
        ("qwen3", {}, ["qk_norm='head'", "smoother"]),
        ("llama", {"ssm_num_groups": 2}, ["ssm_num_groups=2", "must be 4"]),
        ("llama", {"ssm_state_size": 16}, ["ssm_state_size=16", "must be 8"]),
        ("llama", {"ssm_num_heads": 8, "ssm_head_dim": 4}, ["ssm_num_heads=8", "must be 4"]),
        ("llama_biases_tied", {"ssm_proj_bias": False}, ["ssm_proj_bias=False", "biases"]),
        ("llama", {"ssm_time_step_limit": [0.1, 1.0]}, ["smoother_tau", "clamp"]),
    ],
)
def test_what_attention_cannot_express_is_refused(source, memory, words):
    config = attention_config(SOURCES[source], **memory)
    with pytest.raises(ValueError) as error:
        check_attention(config, TAU)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("assignment", "word"),
    [
        ("ssm_type=mamba", "needs ssm_type='mamba2'"),
        ("ssm_projected=false", "needs ssm_projected=True"),
        ("ssm_conv_act=silu", "needs ssm_conv_act='linear'"),
        ("ssm_num_groups=2", "must be 4"),
    ],
)
def test_the_program_refuses_before_any_work(assignment, word, tmp_path, capsys):
    save_source(tmp_path / "source")
    assert graft(tmp_path, "--set", assignment, ssm_init="attention") == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "graft").exists()


def test_every_initialisation_has_its_functions():
    assert set(SSM_INITS) == {"smoother", "attention", "delta", "kalmanet", "mamba"}
    assert all(callable(getattr(init, name)) for init in SSM_INITS.values() for name in ("complete", "check", "build"))
