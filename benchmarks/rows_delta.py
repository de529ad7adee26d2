"""Row "delta": the chunked gated delta rule against the torch fallback of transformers' Qwen3-Next, and Mamba-2's scan.

Time forward and forward + backward (gradients of all five inputs).

Shapes: T tokens, H heads of 64, N = 64 state channels, G groups that share keys and queries.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from transformers.models.qwen3_next import modeling_qwen3_next

from . import adapters, rows_scan
from .row import Check, Context, Figure, Row, difference, figure
from .timing import Action


def inputs(tokens: int, heads: int, groups: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> list:
    """x `[1, T, H, 64]`, log decays and shares `[1, T, H]`, keys and queries `[1, T, G, 64]` of length 1."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    keys, queries = (F.normalize(normal(1, tokens, groups, 64), dim=-1) for _ in range(2))
    log_decay, shares = -0.1 * normal(1, tokens, heads).sigmoid(), normal(1, tokens, heads).sigmoid()
    values = (normal(1, tokens, heads, 64), log_decay, shares, keys, queries)
    return [value.to(dtype).requires_grad_(grad) for value in values]


def theirs(x, log_decay, shares, keys, queries) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the undecorated torch function, which scales queries by 1 / 8 and computes in fp32."""
    rule = modeling_qwen3_next.torch_chunk_gated_delta_rule
    rule = getattr(rule, "__wrapped__", rule)
    y, state = rule(8 * queries, keys, x, g=log_decay, beta=shares, output_final_state=True)
    return y, state.mT


def case(side: str, tokens: int, heads: int, groups: int, backward: bool) -> Action:
    """One scan of one side as a call without arguments."""
    make = rows_scan.inputs if side == "mamba2" else inputs
    values = make(tokens, heads, groups, grad=backward)
    scan = {"ours": adapters.delta, "theirs": theirs, "mamba2": adapters.scan}[side]
    cotangent = torch.ones_like(values[0])

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(scan(*values)[0], values, cotangent)

    def alone() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            return scan(*values)

    return both if backward else alone


def checks(context: Context) -> list[Check]:
    """Against the token-by-token recurrence in float64, and against theirs at every size that is timed."""
    found = []
    for heads, groups in rows_scan.SHAPES:
        values = inputs(130, heads, groups, torch.float64, grad=True)
        (y, state), (wanted, last) = adapters.delta(*values), adapters.naive_delta(*values)
        largest = max(difference(y, wanted), difference(state, last))
        found.append(Check(f"{heads} heads, 130 tokens, float64, output and state against the loop", largest, 1e-10))
        gradients, right = (torch.autograd.grad(out.square().sum(), values) for out in (y, wanted))
        largest = max(difference(*pair) for pair in zip(gradients, right, strict=True))
        found.append(Check(f"{heads} heads, 130 tokens, float64, gradients against the loop", largest, 1e-10))
        for tokens in _tokens(context):
            with torch.no_grad():
                values = inputs(tokens, heads, groups)
                largest = max(map(difference, adapters.delta(*values), theirs(*values)))
            name = f"{heads} heads, {tokens:,} tokens, fp32, output and state against theirs"
            found.append(Check(name, largest, 1e-4))
    return found


def _tokens(context: Context) -> tuple[int, ...]:
    return rows_scan.QUICK_TOKENS if context.quick else rows_scan.TOKENS


def figures(context: Context) -> Iterator[Figure]:
    for heads, groups in rows_scan.SHAPES:
        for tokens in _tokens(context):
            for backward in (False, True):
                size = (tokens, heads, groups, backward)
                seconds = context.alternate({side: case(side, *size) for side in ("ours", "theirs", "mamba2")})
                name = f"gated delta rule, {heads} heads, {groups} groups, forward" + " + backward" * backward
                for side, label in (("theirs", "transformers' Qwen3-Next"), ("mamba2", "Mamba-2's scan, ours")):
                    goal = context.goal(f"delta, {side}")
                    yield figure(name, label, tokens, seconds["ours"], seconds[side], goal=goal)


ABOUT = "gated delta rule, N=64, heads of 64, fp32, against transformers' Qwen3-Next in torch and Mamba-2's scan"
ROWS = [Row("delta", ABOUT, checks, figures)]
