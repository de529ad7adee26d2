"""Row "scan": the SSM chunk scan against the torch fallback of transformers' Mamba2.

Theirs at its default chunk of 256 tokens and at the chunk that is fastest here, searched for every size. Time forward
and forward + backward (gradients of all six inputs), peak memory beyond the inputs in processes of their own.

Shapes: T tokens, H heads of 64, N = 64 state channels, G groups that share B and C.
"""

from collections.abc import Iterator

import torch
from transformers.models.mamba2 import modeling_mamba2

from . import adapters
from .memory import in_child
from .row import Check, Context, Figure, Row, difference, figure
from .timing import Action, Rounds, alternate


SHAPES = ((9, 3), (24, 1))  # heads, groups
TOKENS, QUICK_TOKENS = (2048, 8192), (256, 512)
DEFAULT_CHUNK, CHUNKS = 256, (16, 32, 64, 128, 256)
CASE = "benchmarks.rows_scan:case"


def inputs(tokens: int, heads: int, groups: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> list:
    """x `[1, T, H, 64]`, dt `[1, T, H]`, A `[H]`, B and C `[1, T, G, 64]`, D `[H]`, as a trained Mamba-2 has them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, B, C = normal(1, tokens, heads, 64), normal(1, tokens, groups, 64) / 8, normal(1, tokens, groups, 64) / 8
    dt = torch.rand(1, tokens, heads, generator=generator, dtype=torch.float64) * 0.1 + 0.001
    A, D = -torch.linspace(1, 16, heads, dtype=torch.float64), torch.ones(heads, dtype=torch.float64)
    return [value.to(dtype).requires_grad_(grad) for value in (x, dt, A, B, C, D)]


def theirs(x, dt, A, B, C, D, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the undecorated torch function: with mamba-ssm installed the decorated one would be a CUDA kernel."""
    return modeling_mamba2.mamba2_chunk_scan.__wrapped__(x, dt, A, B, C, chunk, D=D, return_final_states=True)


def case(side: str, tokens: int, heads: int, groups: int, backward: bool, chunk: int = DEFAULT_CHUNK) -> Action:
    """One scan of one side as a call without arguments; also what a child process measures."""
    values = inputs(tokens, heads, groups, grad=backward)
    cotangent = torch.ones_like(values[0])

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        return adapters.scan(*values) if side == "ours" else theirs(*values, chunk)

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward()[0], values, cotangent)

    def alone() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            return forward()

    return both if backward else alone


def checks(context: Context) -> list[Check]:
    """Against the token-by-token recurrence in float64, and against theirs at every size that is timed."""
    found = []
    for heads, groups in SHAPES:
        values = inputs(130, heads, groups, torch.float64, grad=True)
        (y, state), (wanted, last) = adapters.scan(*values), adapters.naive_scan(*values)
        largest = max(difference(y, wanted), difference(state, last))
        found.append(Check(f"{heads} heads, 130 tokens, float64, output and state against the loop", largest, 1e-10))
        gradients, right = (torch.autograd.grad(out.square().sum(), values) for out in (y, wanted))
        largest = max(difference(*pair) for pair in zip(gradients, right, strict=True))
        found.append(Check(f"{heads} heads, 130 tokens, float64, gradients against the loop", largest, 1e-10))
        for tokens in QUICK_TOKENS if context.quick else TOKENS:
            with torch.no_grad():
                values = inputs(tokens, heads, groups)
                largest = max(map(difference, adapters.scan(*values), theirs(*values, DEFAULT_CHUNK)))
            name = f"{heads} heads, {tokens:,} tokens, fp32, output and state against theirs"
            found.append(Check(name, largest, 1e-4))
    return found


def best_chunk(tokens: int, heads: int, groups: int, backward: bool) -> int:
    """Return the chunk at which theirs is fastest here: the smallest median of three rounds."""
    runs = {chunk: case("theirs", tokens, heads, groups, backward, chunk) for chunk in CHUNKS if chunk <= tokens}
    seconds = alternate({str(chunk): run for chunk, run in runs.items()}, Rounds(least=3, most=3))
    return min(runs, key=lambda chunk: sorted(seconds[str(chunk)])[1])


def figures(context: Context) -> Iterator[Figure]:
    for heads, groups in SHAPES:
        for tokens in QUICK_TOKENS if context.quick else TOKENS:
            for backward in (False, True):
                yield from measure(context, tokens, heads, groups, backward)


def measure(context: Context, tokens: int, heads: int, groups: int, backward: bool) -> Iterator[Figure]:
    """Time against both chunks, then peak memory against both."""
    size = (tokens, heads, groups, backward)
    chunk = best_chunk(*size)
    seconds = context.alternate(
        {
            "ours": case("ours", *size),
            "default": case("theirs", *size),
            "best": case("theirs", *size, chunk),
        }
    )
    name = f"{heads} heads, {groups} groups, forward" + (" + backward" if backward else "")
    labels = {"default": f"transformers, chunk {DEFAULT_CHUNK}", "best": f"transformers, best chunk ({chunk})"}
    for which, label in labels.items():
        goal = None if backward else context.goal(f"scan, {which} chunk")
        yield figure(name, label, tokens, seconds["ours"], seconds[which], goal=goal)
    arguments = dict(tokens=tokens, heads=heads, groups=groups, backward=backward)
    small = {"tokens": 64}

    def extra(side: str, **more: int) -> list[float]:
        return [in_child(CASE, {"side": side, **arguments, **more}, small, context.threads).extra]

    ours = extra("ours")
    goal = None if backward else context.goal("scan, memory")
    yield figure(f"{name}, peak memory", labels["default"], tokens, ours, extra("theirs"), "B", goal)
    if not context.quick:
        best = extra("theirs", chunk=chunk)
        yield figure(f"{name}, peak memory", labels["best"], tokens, ours, best, "B")


ROWS = [Row("scan", "SSM chunk scan, N=64, heads of 64, fp32, against transformers' Mamba2 in torch", checks, figures)]
