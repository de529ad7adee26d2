"""`ssm_init: delta`: the gated delta rule starts as the running average that the smoother is."""

import pytest
import torch

from conversion.grafting.ssm_init_delta import delta
from conversion.grafting.ssm_scalars import smoother_time_constants
from modeling_bmojo import BMojoForCausalLM
from tests.conversion.grafting.test_ssm_starts import TAU, readers, start_config, started


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
    config = start_config("delta", ssm_state_size=states)
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
        config = start_config("delta", ssm_num_heads=heads, ssm_num_groups=1)
        layer = readers(config)
        u = torch.ones(1, 80, config.hidden_size, dtype=torch.float64)  # its average over a long time is itself
        y = started("delta", config, (4.0, 4.0), layer)(u)[0][0, -1]
        for name in ("k_proj.weight", "v_proj.weight") if heads == 8 else ():
            wanted = layer[name].double() @ u[0, -1]
            assert (layer[name].double() @ y - wanted).abs().max() < 0.01 * wanted.abs().max()
        assert y.isfinite().all() and y.abs().max() > 0
