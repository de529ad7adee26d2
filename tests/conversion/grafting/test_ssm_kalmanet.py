"""`ssm_init: kalmanet`: Gated KalmaNet starts as a running average, and grafts as the smoother does."""

import pytest
import torch
from transformers import LlamaConfig

from conversion.grafting.families import bmojo_config_for
from conversion.grafting.report import read_report
from conversion.grafting.ssm_init_kalmanet import KALMANET_FIELDS, check_kalmanet, kalmanet, kalmanet_memory
from conversion.grafting.ssm_scalars import smoother_time_constants
from modeling_bmojo import BMojoForCausalLM
from tests.conversion.graft_sources import SIZES, VOCAB, W, graft, logits, save_source
from tests.conversion.grafting.test_ssm_delta import readers
from tests.oracles import chebyshev_solution


TAU = (2.0, 9.0)


def kalmanet_config(**memory):
    memory = kalmanet_memory(SIZES, {"window_size": W, **KALMANET_FIELDS, **memory})
    return bmojo_config_for(LlamaConfig(**SIZES), memory)


def average(config, u):
    """Each head's channels `[T, hidden]`, from the formula: half a mean, half what fades in to one."""
    one = torch.ones(1, dtype=torch.float64)
    kappa = chebyshev_solution(one[None], one, config.ssm_solver_steps, config.ssm_ridge).item()
    g = torch.exp(-1 / smoother_time_constants(config.ssm_num_heads, *TAU)).repeat_interleave(config.ssm_head_dim)
    rows = []
    for t in range(len(u)):
        weights = (1 - g) * g ** torch.arange(t, -1, -1, dtype=torch.float64)[:, None]
        total = (weights * u[: t + 1]).sum(0)
        rows.append((total + kappa * total / weights.sum(0)) / (1 + kappa))
    return torch.stack(rows)


@pytest.mark.parametrize("states", [1, 16])
def test_the_output_is_a_running_average(states):
    """Exactly without the random rows of B, within two hundredths (root mean square) with them."""
    config = kalmanet_config(ssm_state_size=states)
    tensors = kalmanet(config, readers(config), TAU)
    u = torch.randn(1, 40, config.hidden_size, dtype=torch.float64)
    wanted = average(config, u[0])
    fading = BMojoForCausalLM(config).model.layers[0].fading
    for random in (True, False):
        if not random:
            inner = config.ssm_num_heads * config.ssm_head_dim
            tensors["in_proj.weight"][inner:] = 0.0
        fading.load_state_dict(tensors, strict=True)
        y = fading.double()(u)[0][0]
        assert (y - wanted).norm() < (0.02 if random and states > 1 else 2e-5) * wanted.norm()


def test_a_graft_accounts_for_every_tensor_and_keeps_the_source(tmp_path):
    source = save_source(tmp_path / "source", "qwen3")
    assert graft(tmp_path, "--set", "ssm_type=kalmanet", ssm_init="kalmanet") == 0
    report = read_report(tmp_path / "graft")
    target = {key for key, entry in report["target_tensors"].items() if "KalmaNet" in str(entry)}
    model = BMojoForCausalLM.from_pretrained(tmp_path / "graft")
    assert model.config.ssm_type == "kalmanet" and model.config.ssm_state_size == 16
    assert target == {key for key in model.state_dict() if ".fading." in key}
    torch.testing.assert_close(logits(model), logits(source), atol=1e-5, rtol=1e-5)
    assert bool(logits(model, 5 * W).isfinite().all())


def test_a_gradient_reaches_every_tensor():
    config = kalmanet_config()
    model = BMojoForCausalLM(config)
    for layer in model.model.layers:
        layer.fading.load_state_dict(kalmanet(config, readers(config)))
    ids = torch.randint(3, VOCAB, (1, 3 * W))
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.model.layers[0].fading.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_what_it_cannot_honour_is_refused():
    with pytest.raises(ValueError, match="ssm_gated=True: ssm_init='kalmanet' needs False"):
        check_kalmanet(kalmanet_config(ssm_gated=True), TAU)
    with pytest.raises(ValueError, match="ssm_num_groups=1: ssm_init='kalmanet' needs 4"):
        check_kalmanet(kalmanet_config(ssm_num_heads=4, ssm_num_groups=1), TAU)
    with pytest.raises(ValueError, match="clamp"):
        check_kalmanet(kalmanet_config(ssm_time_step_limit=[0.3, 1.0]), TAU)
