"""`ssm_init: kalmanet`: Gated KalmaNet starts as a running average."""

import pytest
import torch

from conversion.grafting.ssm_init_kalmanet import kalmanet
from conversion.grafting.ssm_scalars import smoother_time_constants
from modeling_bmojo import BMojoForCausalLM
from tests.conversion.grafting.test_ssm_starts import TAU, readers, start_config
from tests.oracles import chebyshev_solution


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
    config = start_config("kalmanet", ssm_state_size=states)
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
