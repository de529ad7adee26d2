"""`ssm_init: mamba`: Mamba (S6) starts as the running average that the smoother is, and grafts as it does."""

import pytest
import torch
from transformers import LlamaConfig

from conversion.grafting.families import bmojo_config_for
from conversion.grafting.report import read_report
from conversion.grafting.ssm_init_mamba import MAMBA_FIELDS, check_mamba, mamba, mamba_memory
from conversion.grafting.ssm_scalars import smoother_time_constants
from modeling_bmojo import BMojoForCausalLM
from tests.conversion.graft_sources import SIZES, VOCAB, W, graft, logits, save_source


TAU = (2.0, 9.0)


def mamba_config(**memory):
    memory = mamba_memory(SIZES, {"window_size": W, **MAMBA_FIELDS, **memory})
    return bmojo_config_for(LlamaConfig(**SIZES), memory)


def readers(config):
    """k_proj and v_proj of a layer, which a narrow SSM keeps the inputs of."""
    shape = config.num_key_value_heads * config.head_dim, config.hidden_size
    return {name: torch.randn(shape) for name in ("k_proj.weight", "v_proj.weight")}


def average(config, u):
    """sum_j (1 - a_c) a_c^j u_{t - j}, the mean over the inner channels that carry a channel of u, from the formula."""
    tau = smoother_time_constants(config.ssm_num_heads, *TAU).repeat_interleave(config.ssm_head_dim)[:-1]
    found, copies = torch.zeros_like(u), torch.zeros(config.hidden_size)
    for channel, a in enumerate(torch.exp(-1 / tau)):
        carried = channel % config.hidden_size
        copies[carried] += 1
        for t in range(len(u)):
            ages = torch.arange(t, -1, -1, dtype=torch.float64)
            found[t, carried] += ((1 - a) * a**ages * u[: t + 1, carried]).sum()
    return found / copies


@pytest.mark.parametrize("states", [1, 16])
@pytest.mark.parametrize("heads", [None, 9])
def test_the_output_is_a_running_average(states, heads):
    """Exactly: no query reads what the random rows of B write."""
    config = mamba_config(ssm_state_size=states, ssm_num_heads=heads)
    assert heads or config.ssm_num_heads * config.ssm_head_dim == config.hidden_size + config.head_dim
    u = torch.randn(1, 30, config.hidden_size, dtype=torch.float64)
    fading = BMojoForCausalLM(config).model.layers[0].fading
    fading.load_state_dict(mamba(config, readers(config), TAU), strict=True)
    torch.testing.assert_close(fading.double()(u)[0][0], average(config, u[0]), atol=2e-6, rtol=2e-6)


def test_a_narrower_ssm_averages_what_keys_and_values_read():
    config = mamba_config(ssm_num_heads=2)
    layer = readers(config)
    fading = BMojoForCausalLM(config).model.layers[0].fading
    fading.load_state_dict(mamba(config, layer, (4.0, 4.0)), strict=True)
    u = torch.ones(1, 80, config.hidden_size, dtype=torch.float64)  # its average over a long time is itself
    y = fading.double()(u)[0][0, -1]
    directions = torch.linalg.svd(torch.cat(list(layer.values())).double()).Vh[: 2 * config.ssm_head_dim - 1]
    torch.testing.assert_close(directions @ y, directions @ u[0, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama_biases_tied", "llama_narrow_heads"])
def test_a_graft_accounts_for_every_tensor_and_keeps_the_source(name, tmp_path):
    source = save_source(tmp_path / "source", name)
    assert graft(tmp_path, "--set", "ssm_type=mamba", ssm_init="mamba") == 0
    report = read_report(tmp_path / "graft")
    target = {key for key, entry in report["target_tensors"].items() if "by Mamba" in str(entry)}
    model = BMojoForCausalLM.from_pretrained(tmp_path / "graft")
    assert model.config.ssm_type == "mamba" and model.config.ssm_state_size == 16
    assert target == {key for key in model.state_dict() if ".fading." in key}
    torch.testing.assert_close(logits(model), logits(source), atol=1e-5, rtol=1e-5)
    assert bool(logits(model, 5 * W).isfinite().all())


def test_a_gradient_reaches_every_tensor():
    config = mamba_config()
    model = BMojoForCausalLM(config)
    for layer in model.model.layers:
        layer.fading.load_state_dict(mamba(config, readers(config)))
    ids = torch.randint(3, VOCAB, (1, 3 * W))
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.model.layers[0].fading.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("assignment", "word"),
    [
        ("ssm_type=mamba2", "needs ssm_type='mamba'"),
        ("ssm_conv_act=silu", "needs ssm_conv_act='linear'"),
        ("ssm_conv_bias=false", "needs ssm_conv_bias=True"),
        ("ssm_num_heads=0", "ssm_num_heads"),
        ("smoother_tau=[0,3]", "smoother_tau"),
    ],
)
def test_the_program_refuses_before_any_work(assignment, word, tmp_path, capsys):
    save_source(tmp_path / "source")
    assert graft(tmp_path, "--set", assignment, ssm_init="mamba") == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "graft").exists()


def test_what_it_cannot_honour_is_refused():
    with pytest.raises(ValueError, match="ssm_gated=True: ssm_init='mamba' needs False"):
        check_mamba(mamba_config(ssm_gated=True), TAU)
    with pytest.raises(ValueError, match="needs 2 channels"):
        check_mamba(mamba_config(ssm_num_heads=1, ssm_head_dim=1), TAU)
    with pytest.raises(ValueError, match="clamp"):
        check_mamba(mamba_config(ssm_time_step_limit=[0.3, 1.0]), TAU)
