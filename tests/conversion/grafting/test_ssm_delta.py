"""`ssm_init: delta`: the gated delta rule starts as the running average that the smoother is, and grafts as it does."""

import pytest
import torch
from transformers import LlamaConfig

from conversion.grafting.families import bmojo_config_for
from conversion.grafting.report import read_report
from conversion.grafting.ssm_init_delta import DELTA_DEFAULTS, DELTA_FIELDS, check_delta, delta
from conversion.grafting.ssm_scalars import smoother_time_constants
from modeling_bmojo import BMojoForCausalLM
from tests.conversion.graft_sources import SIZES, VOCAB, W, graft, logits, save_source


TAU = (2.0, 9.0)


def delta_config(**memory):
    return bmojo_config_for(LlamaConfig(**SIZES), {"window_size": W, **DELTA_FIELDS, **DELTA_DEFAULTS, **memory})


def readers(config):
    """k_proj and v_proj of a layer, which a narrow SSM keeps the inputs of."""
    shape = config.num_key_value_heads * config.head_dim, config.hidden_size
    return {name: torch.randn(shape) for name in ("k_proj.weight", "v_proj.weight")}


def average(config, u):
    """sum_j (1 - a_h) a_h^j u_{t - j} of each head's channels `[T, hidden]`, from the formula."""
    a = torch.exp(-1 / smoother_time_constants(config.ssm_num_heads, *TAU)).repeat_interleave(config.ssm_head_dim)
    rows = []
    for t in range(len(u)):
        ages = torch.arange(t, -1, -1, dtype=torch.float64)
        rows.append((((1 - a) * a ** ages[:, None]) * u[: t + 1]).sum(0))
    return torch.stack(rows)


@pytest.mark.parametrize("states", [1, 16])
def test_the_output_is_a_running_average(states):
    """Exactly without the random rows of B, within a hundredth (root mean square) with them."""
    config = delta_config(ssm_state_size=states)
    tensors = delta(config, readers(config), TAU)
    u = torch.randn(1, 60, config.hidden_size, dtype=torch.float64)
    wanted = average(config, u[0])
    fading = BMojoForCausalLM(config).model.layers[0].fading
    for random in (True, False):
        if not random:
            inner = config.ssm_num_heads * config.ssm_head_dim
            tensors["in_proj.weight"][inner:] = 0.0
        fading.load_state_dict(tensors, strict=True)
        y = fading.double()(u)[0][0]
        assert (y - wanted).norm() < (0.01 if random and states > 1 else 2e-5) * wanted.norm()


def test_a_wider_and_a_narrower_ssm_average_too():
    """Wider: all channels, each by several heads. Narrower: what k_proj and v_proj read."""
    for heads in (8, 2):
        config = delta_config(ssm_num_heads=heads, ssm_num_groups=1)
        layer = readers(config)
        fading = BMojoForCausalLM(config).model.layers[0].fading
        fading.load_state_dict(delta(config, layer, (4.0, 4.0)), strict=True)
        u = torch.ones(1, 80, config.hidden_size, dtype=torch.float64)  # its average over a long time is itself
        y = fading.double()(u)[0][0, -1]
        for name in ("k_proj.weight", "v_proj.weight") if heads == 8 else ():
            wanted = layer[name].double() @ u[0, -1]
            assert (layer[name].double() @ y - wanted).abs().max() < 0.01 * wanted.abs().max()
        assert y.isfinite().all() and y.abs().max() > 0


@pytest.mark.parametrize("name", ["llama", "qwen3", "llama_biases_tied", "llama_narrow_heads"])
def test_a_graft_accounts_for_every_tensor_and_keeps_the_source(name, tmp_path):
    source = save_source(tmp_path / "source", name)
    assert graft(tmp_path, "--set", "ssm_type=gated_delta", ssm_init="delta") == 0
    report = read_report(tmp_path / "graft")
    target = {key for key, entry in report["target_tensors"].items() if "gated delta rule" in str(entry)}
    model = BMojoForCausalLM.from_pretrained(tmp_path / "graft")
    assert model.config.ssm_type == "gated_delta" and model.config.ssm_state_size == 16
    assert target == {key for key in model.state_dict() if ".fading." in key}
    torch.testing.assert_close(logits(model), logits(source), atol=1e-5, rtol=1e-5)
    assert bool(logits(model, 5 * W).isfinite().all())


def test_a_gradient_reaches_every_tensor():
    config = delta_config()
    model = BMojoForCausalLM(config)
    for layer in model.model.layers:
        layer.fading.load_state_dict(delta(config, readers(config)))
    ids = torch.randint(3, VOCAB, (1, 3 * W))
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.model.layers[0].fading.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("assignment", "word"),
    [
        ("ssm_type=mamba2", "needs ssm_type='gated_delta'"),
        ("ssm_conv_act=silu", "needs ssm_conv_act='linear'"),
        ("ssm_projected=false", "needs ssm_projected=True"),
        ("ssm_proj_bias=false", "needs ssm_proj_bias=True"),
        ("smoother_tau=[0,3]", "smoother_tau"),
    ],
)
def test_the_program_refuses_before_any_work(assignment, word, tmp_path, capsys):
    save_source(tmp_path / "source")
    assert graft(tmp_path, "--set", assignment, ssm_init="delta") == 2
    assert word in capsys.readouterr().err
    assert not (tmp_path / "graft").exists()


def test_what_it_cannot_honour_is_refused():
    with pytest.raises(ValueError, match="ssm_gated=True: ssm_init='delta' needs False"):
        check_delta(delta_config(ssm_gated=True), TAU)
    with pytest.raises(ValueError, match="clamp"):
        check_delta(delta_config(ssm_time_step_limit=[0.3, 1.0]), TAU)
