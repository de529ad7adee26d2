"""`ssm_init: mamba`: Mamba (S6) starts as the running average that the smoother is."""

import pytest
import torch

from conversion.grafting.ssm_scalars import smoother_time_constants
from tests.conversion.grafting.test_ssm_starts import TAU, readers, start_config, started


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
    config = start_config("mamba", ssm_state_size=states, ssm_num_heads=heads)
    assert heads or config.ssm_num_heads * config.ssm_head_dim == config.hidden_size + config.head_dim
    u = torch.randn(1, 30, config.hidden_size, dtype=torch.float64)
    torch.testing.assert_close(started("mamba", config)(u)[0][0], average(config, u[0]), atol=2e-6, rtol=2e-6)


def test_a_narrower_ssm_averages_what_keys_and_values_read():
    config = start_config("mamba", ssm_num_heads=2)
    layer = readers(config)
    u = torch.ones(1, 80, config.hidden_size, dtype=torch.float64)  # its average over a long time is itself
    y = started("mamba", config, (4.0, 4.0), layer)(u)[0][0, -1]
    directions = torch.linalg.svd(torch.cat(list(layer.values())).double()).Vh[: 2 * config.ssm_head_dim - 1]
    torch.testing.assert_close(directions @ y, directions @ u[0, -1], atol=1e-5, rtol=1e-5)
