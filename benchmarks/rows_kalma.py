"""Row "kalma": Gated KalmaNet's chunked scan, 30 steps of its solver, against Mamba-2's scan at the same sizes.

Time forward and forward + backward (gradients of all five inputs).

Shapes: T tokens, H heads of 64, N = 64 state channels; every head has keys of its own.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from . import adapters, rows_scan
from .row import Check, Context, Figure, Row, difference, figure
from .timing import Action


TOKENS, QUICK_TOKENS = 2048, 256


def inputs(tokens: int, heads: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> list:
    """x `[1, T, H, 64]`, log decays and mix `[1, T, H]`, keys and queries `[1, T, H, 64]`, keys scaled by a share."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    keys, queries = (F.normalize(normal(1, tokens, heads, 64), dim=-1) for _ in range(2))
    share, log_decay = normal(1, tokens, heads, 1).sigmoid(), -0.1 * normal(1, tokens, heads).sigmoid()
    mix = normal(1, tokens, heads).sigmoid()
    values = (share * normal(1, tokens, heads, 64), log_decay, mix, share * keys, queries / 8)
    return [value.to(dtype).requires_grad_(grad) for value in values]


def case(side: str, tokens: int, heads: int, groups: int, backward: bool) -> Action:
    """One scan of one side as a call without arguments."""
    if side == "mamba2":
        return rows_scan.case("ours", tokens, heads, groups, backward)
    values = inputs(tokens, heads, grad=backward)
    cotangent = torch.ones_like(values[0])

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(adapters.kalma(*values)[0], values, cotangent)

    def alone() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            return adapters.kalma(*values)

    return both if backward else alone


def checks(context: Context) -> list[Check]:
    """Against the token-by-token recurrence in float64."""
    values = inputs(70, 2, torch.float64, grad=True)
    (y, state), (wanted, last) = adapters.kalma(*values), adapters.naive_kalma(*values)
    largest = max(difference(y, wanted), difference(state, last))
    found = [Check("2 heads, 70 tokens, float64, output and state against the loop", largest, 1e-9)]
    gradients, right = (torch.autograd.grad(out.square().sum(), values) for out in (y, wanted))
    largest = max(difference(*pair) for pair in zip(gradients, right, strict=True))
    return [*found, Check("2 heads, 70 tokens, float64, gradients against the loop", largest, 1e-9)]


def figures(context: Context) -> Iterator[Figure]:
    tokens = QUICK_TOKENS if context.quick else TOKENS
    for heads, groups in rows_scan.SHAPES:
        for backward in (False, True):
            size = (tokens, heads, groups, backward)
            seconds = context.alternate({side: case(side, *size) for side in ("ours", "mamba2")})
            name = f"Gated KalmaNet, {heads} heads, forward" + " + backward" * backward
            goal = context.goal("kalma, mamba2")
            yield figure(name, "Mamba-2's scan, ours", tokens, seconds["ours"], seconds["mamba2"], goal=goal)


ABOUT = "Gated KalmaNet, N=64, heads of 64, fp32, 30 steps, against Mamba-2's scan"
ROWS = [Row("kalma", ABOUT, checks, figures)]
