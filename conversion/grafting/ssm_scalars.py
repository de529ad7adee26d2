"""Time constants of a grafted fading memory: every head forgets at a constant rate, in prefill and in decoding alike.

    dt_h = 1 / tau_h,  A_h = -1:   S_t = exp(-1 / tau_h) S_{t-1} + dt_h x_t B_t^T

tau_h is log-spaced over the heads. The weights of the past, dt_h exp(-j / tau_h), sum to dt / (1 - exp(-dt)), about
1 + dt/2: the state is nearly an average over the last tau_h tokens, not a sum, whatever the length of the text.

Shapes: H heads of the SSM.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from modeling_bmojo import BMojoConfig


def smoother_time_constants(heads: int, low: float, high: float) -> torch.Tensor:
    """tau_h [heads] in tokens, log-spaced from `low` to `high`; the geometric mean for a single head. float64."""
    if heads == 1:
        return torch.tensor([math.sqrt(low * high)], dtype=torch.float64)
    return torch.logspace(math.log10(low), math.log10(high), heads, dtype=torch.float64)


def constant_scalars(dt: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors below `fading.scalars` for constant time steps `dt` `[H]`, no skip; dt's projection must be
    zero."""
    return {
        "scalars.A_log": torch.zeros_like(dt),
        "scalars.dt_bias": dt + torch.log(-torch.expm1(-dt)),  # softplus^-1
        "scalars.D": torch.zeros_like(dt),
    }


def check_start(init: str, fields: Mapping[str, Any], config: BMojoConfig, tau: tuple[float, float]) -> None:
    """Refuse a config without the `fields` that the start `init` stands on, or time constants that it cannot honour
    (ValueError)."""
    for name, value in fields.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name}={getattr(config, name)!r}: ssm_init={init!r} needs {value!r}; leave it out.")
    check_time_constants(config, tau)


def check_time_constants(config: BMojoConfig, tau: tuple[float, float]) -> None:
    """Refuse time constants that are no range, or that `config` would clamp away (ValueError)."""
    low, high = tau
    if not 0 < low <= high < math.inf:
        raise ValueError(f"smoother_tau={list(tau)}: must be two numbers of tokens, 0 < low <= high; e.g. [2, 16].")
    floor, ceiling = config.ssm_time_step_limit
    if not (floor <= 1.0 / high and 1.0 / low <= ceiling):
        raise ValueError(
            f"smoother_tau={list(tau)}: time steps 1/tau must lie in ssm_time_step_limit={[floor, ceiling]}, which "
            "would clamp them; widen the limit or move the time constants."
        )
