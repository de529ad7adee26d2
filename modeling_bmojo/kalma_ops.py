"""Fading memory: Gated KalmaNet, naive, chunked and one step.

    H_t = g_t H_{t-1} + B_t B_t^T        U_t = g_t U_{t-1} + x_t B_t^T                                (arXiv 2511.21016)
    (H_t + lambda_t I) z_t = C_t         lambda_t = ridge |H_t|_F, solved by a fixed number of Chebyshev steps
    y_t = U_t (C_t + a_t (z_t - C_t))

U (H + lambda I)^-1 is the ridge regression of all values written on all keys, older pairs counting less: where the
gated delta rule corrects one key at a time, this looks up the best map from all of them.

With F = |H|_F the steps are the same for every token, a polynomial p of H / F: z = p(H / F) C / F. Chunked, with l_t
the log decay summed from the start of t's chunk to t, H and U the states that enter, D_ts = exp(l_t - l_s) for s <= t:

    H_t v = exp(l_t) H v + sum_s D_ts B_s (B_s . v)                  U_t v the same, of x_s
    F_t^2 = exp(2 l_t) |H|^2 + 2 exp(l_t) sum_s D_ts B_s . H B_s + sum_s sum_r D_ts D_tr (B_s . B_r)^2

No term of F_t^2 is negative, so nothing cancels. H_t itself is never formed but at the ends of chunks.

The backward pass of the solve is written out: the adjoint steps of the same recursion, exact for any number of steps.
It makes the iterates anew, a few chunks at a time: O(T) memory. It is not differentiable a second time.

Shapes: B batch, T tokens, H heads, P channels per head, N state channels, L chunk length, n chunks. The state is U
above H, `[B, H, P + N, N]`; its H is symmetric and has no negative eigenvalue, as every sum of B B^T. Decays are
logarithms. A token with x, B and log decay 0 leaves the state as it was: that is how pads are passed over. Everything
is computed in the inputs' dtype: the mixer hands over fp32 or fp64.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


LENGTH = 32  # tokens of a chunk at most: a longer one does more work in itself than it saves at its start
RUN = 256  # tokens whose chunks are taken at once: their iterates stay in a CPU's cache
FAINTEST = 1e-15  # |H|_F of a state that holds nothing: whatever it is divided by, it says 0


def naive_kalma(
    x: torch.Tensor,
    log_decay: torch.Tensor,
    mix: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 64,
    steps: int = 30,
    ridge: float = 0.02,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the recurrence, token by token, with the steps as published. `chunk_size` is not used.

    Args:
        x: `[B, T, H, P]` values. log_decay: `[B, T, H]` log g_t <= 0. mix: `[B, T, H]` a_t in [0, 1], how much of the
            solution is read with instead of the query. B, C: `[B, T, H, N]` keys that are written to and queries.
        initial_state: `[B, H, P + N, N]` or None for zeros. steps: of the solver. ridge: lambda / |H|_F > 0.

    Returns:
        y `[B, T, H, P]` and the state after the last token `[B, H, P + N, N]`.
    """
    channels, outputs = x.shape[-1], []
    state = _no_state(x, B) if initial_state is None else initial_state
    for t in range(x.shape[1]):
        written = torch.cat([x[:, t], B[:, t]], dim=-1)
        state = state * torch.exp(log_decay[:, t])[..., None, None] + written[..., None] * B[:, t, :, None]
        query = C[:, t]
        read = query + mix[:, t, :, None] * (_published_steps(state[:, :, channels:], query, steps, ridge) - query)
        outputs.append((state[:, :, :channels] * read[:, :, None]).sum(-1))
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x), state


def chunk_kalma(
    x: torch.Tensor,
    log_decay: torch.Tensor,
    mix: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 64,
    steps: int = 30,
    ridge: float = 0.02,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same map as `naive_kalma` by matrix products over chunks of `chunk_size` tokens, `LENGTH` at most.

    Shapes and returns as `naive_kalma`.
    """
    return _scan(x, log_decay, mix, B, C, initial_state, chunk_size, steps, ridge, 0)


def predict_kalma_input(
    x: torch.Tensor,
    log_decay: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 64,
    steps: int = 30,
    ridge: float = 0.02,
) -> torch.Tensor:
    """Return what the state before token t says under C_t, U (H + lambda I)^-1 C_t, `[B, T, H, P]`.

    The regression's own prediction: with C the token's key and x_t its value, x_t minus it is the innovation of a
    Kalman filter. Decay changes nothing of it: U, H and lambda fade by one factor.
    """
    return _scan(x, log_decay, torch.ones_like(log_decay), B, C, initial_state, chunk_size, steps, ridge, -1)[0]


def step_kalma(
    x: torch.Tensor,
    log_decay: torch.Tensor,
    mix: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 64,
    steps: int = 30,
    ridge: float = 0.02,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token (T = 1) of the recurrence, for decoding; the caller keeps the state. Shapes as `naive_kalma`.

    Where gradients are off, `initial_state` is overwritten and returned: no new state per token.

    Raises:
        ValueError: if T is not 1.
    """
    if x.shape[1] != 1:
        raise ValueError(f"x has {x.shape[1]} tokens: step_kalma takes exactly one; use chunk_kalma for more.")
    decay = torch.exp(log_decay[:, 0])[..., None, None]
    written = torch.cat([x[:, 0], B[:, 0]], dim=-1)[..., None] * B[:, 0, :, None]
    state = _no_state(x, B) if initial_state is None else initial_state
    state = state * decay + written if torch.is_grad_enabled() else state.mul_(decay).add_(written)
    values, squares = state.split([x.shape[-1], B.shape[-1]], dim=-2)
    size, query = _size(squares.square().sum((-2, -1), keepdim=True)), C[:, 0, :, :, None]
    found, before, scaled = query * _first(ridge), torch.zeros_like(query), squares / size
    for keep, step, back in _rule(steps, ridge):
        found, before = keep * found + step * (query - scaled @ found) + back * before, found
    read = torch.lerp(query, found / size, mix[:, 0, :, None, None])
    return (values @ read)[..., 0][:, None], state


# Steps of the solver -------------------------------------------------------------------------------------------------
def _published_steps(H: torch.Tensor, query: torch.Tensor, steps: int, ridge: float) -> torch.Tensor:
    """Return x of (H + lambda I) x = query, H `[..., N, N]`, query `[..., N]`, as the paper's listing has it."""
    size = _size(H.square().sum((-2, -1)))[..., None]
    penalty = ridge * size
    stride, rho = 2 / (2 * penalty + size), size / (2 * penalty + size)
    found, before, omega = stride * query, torch.zeros_like(query), torch.full_like(size, 2.0)
    for _ in range(steps):
        omega = 1 / (1 - rho**2 * omega / 4)
        error = (H * found[..., None, :]).sum(-1) + penalty * found - query
        found, before = omega * (found - stride * error) + (1 - omega) * before, found
    return found


def _size(square: torch.Tensor) -> torch.Tensor:
    """Return |H|_F from its square."""
    return square.clamp(min=FAINTEST**2).sqrt()


def _first(ridge: float) -> float:
    """Return the step along the residual, in units of 1 / |H|_F; the first iterate is that many queries."""
    return 2 / (1 + 2 * ridge)


def _rule(steps: int, ridge: float) -> tuple[tuple[float, float, float], ...]:
    """Return (a, b, d) of every step x' = a x + b (q - H x / F) + d x_before: lambda / F is the same for all tokens."""
    stride, rho, omega, rule = _first(ridge), 1 / (1 + 2 * ridge), 2.0, []
    for _ in range(steps):
        omega = 1 / (1 - rho**2 * omega / 4)
        rule.append((omega * (1 - stride * ridge), omega * stride, 1 - omega))
    return tuple(rule)


class _Solve(torch.autograd.Function):
    """p(H_t / F_t) q_t of every token, with the derivative of exactly these steps.

    H: `[b, N, N]`, which enters each chunk. keys, queries: `[b, L, N]`. weights: `[b, L, L]` D_ts / F_t. start: `[b, L,
    1]` exp(l_t) / F_t. b counts chunks, rows and heads.
    """

    @staticmethod
    def forward(ctx, H, keys, weights, start, queries, steps: int, ridge: float) -> torch.Tensor:
        ctx.save_for_backward(H, keys, weights, start, queries)
        ctx.steps = steps, ridge
        return _solve(H, keys, weights, start, queries, steps, ridge)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        H, keys, weights, start, queries = ctx.saved_tensors
        rule, iterates = _rule(*ctx.steps), []
        _solve(H, keys, weights, start, queries, *ctx.steps, iterates)
        dH, dkeys, dweights, dstart, dqueries = (torch.zeros_like(v) for v in (H, keys, weights, keys, queries))
        carried = torch.zeros_like(grad)  # what the step after gave to this one's x
        for (keep, step, back), (found, inside) in zip(reversed(rule), reversed(iterates)):
            entered, scores = torch.bmm(grad, H), torch.bmm(grad, keys.mT)
            weighted = scores * weights
            dqueries.add_(grad, alpha=step)
            dH.baddbmm_((grad * start).mT, found, alpha=-step)
            dstart.addcmul_(entered, found, value=-step)
            dweights.addcmul_(scores, inside, value=-step)
            dkeys.baddbmm_(weighted.mT, found, alpha=-step).baddbmm_((inside * weights).mT, grad, alpha=-step)
            carried.add_(grad, alpha=keep).addcmul_(entered, start, value=-step)
            grad, carried = carried.baddbmm_(weighted, keys, alpha=-step), grad * back
        dqueries.add_(grad, alpha=_first(ctx.steps[1]))
        return dH, dkeys, dweights, dstart.sum(-1, keepdim=True), dqueries, None, None


def _solve(H, keys, weights, start, queries, steps: int, ridge: float, iterates: list | None = None) -> torch.Tensor:
    """Return what `_Solve` does; fill `iterates` with what each step began with, x and x B^T."""
    found, before = queries * _first(ridge), torch.zeros_like(queries)
    for keep, step, back in _rule(steps, ridge):
        inside = torch.bmm(found, keys.mT)
        if iterates is not None:
            iterates.append((found, inside))
        new = torch.add(queries, found, alpha=keep / step).add_(before, alpha=back / step)
        new.baddbmm_(found * start, H.mT, beta=step, alpha=-step).baddbmm_(inside * weights, keys, alpha=-step)
        found, before = new, found
    return found


# Chunks --------------------------------------------------------------------------------------------------------------
class _Run(NamedTuple):
    """Some chunks, the last one filled up with tokens that do nothing.

    x: `[n, B, H, L, P]`. mix, start, tail: `[n, B, H, L, 1]`, the last two what is left of the entering state at each
    token, exp(l_t), and of what a token wrote at the end, exp(l_end - l_t). whole: `[n, B, H, 1, 1]`, what is left of
    the entering state at the end. keys, queries: `[n, B, H, L, N]`. decay: `[n, B, H, L, L]`, D_ts for the tokens s
    that t reads.
    """

    x: torch.Tensor
    mix: torch.Tensor
    start: torch.Tensor
    tail: torch.Tensor
    whole: torch.Tensor
    keys: torch.Tensor
    queries: torch.Tensor
    decay: torch.Tensor


def _scan(x, log_decay, mix, B, C, initial_state, chunk_size: int, steps: int, ridge: float, upto: int):
    """Read with C, of what a chunk's own tokens wrote that of t and those before (`upto` 0) or of those before (-1).

    Returns y `[B, T, H, P]` and the state after the last token `[B, H, P + N, N]`.
    """
    state = _no_state(x, B) if initial_state is None else initial_state
    if x.shape[1] == 0:
        return torch.zeros_like(x), state
    outputs = []
    for run in _runs(x, log_decay, mix, B, C, chunk_size, upto):
        y, state = _one_run(run, state, steps, ridge)
        outputs.append(y)
    return torch.cat(outputs, dim=1)[:, : x.shape[1]], state


def _one_run(run: _Run, state: torch.Tensor, steps: int, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y `[B, n L, H, P]` and the state that leaves the last chunk."""
    entering = []
    for added, whole in zip((run.tail * torch.cat([run.x, run.keys], dim=-1)).mT @ run.keys, run.whole):
        entering.append(state)
        state = torch.addcmul(added, whole, state)
    U, H = torch.stack(entering).split([run.x.shape[-1], run.keys.shape[-1]], dim=-2)

    # |H_t|_F of every token.
    said = ((run.keys @ H.mT) * run.keys).sum(-1, keepdim=True)
    own = ((run.decay @ (run.keys @ run.keys.mT).square()) * run.decay).sum(-1, keepdim=True)
    entered = H.square().sum((-2, -1), keepdim=True)
    size = _size(run.start * (run.start * entered + 2 * (run.decay @ said)) + own)

    problem = H, run.keys, run.decay / size, run.start / size, run.queries
    flat = [value.flatten(0, 2) for value in problem]
    training = torch.is_grad_enabled() and any(value.requires_grad for value in flat)
    found = (_Solve.apply if training else _solve)(*flat, steps, ridge).view(run.queries.shape)
    read = torch.lerp(run.queries, found / size, run.mix)
    y = torch.addcmul((run.decay * (read @ run.keys.mT)) @ run.x, run.start, read @ U.mT)
    return y.permute(1, 0, 3, 2, 4).flatten(1, 2), state


def _runs(x, log_decay, mix, B, C, chunk_size: int, upto: int) -> Iterator[_Run]:
    """Yield the chunks of up to `RUN` tokens at a time."""
    tokens = x.shape[1]
    length = min(chunk_size, tokens, LENGTH)
    stride = max(RUN // length, 1) * length
    lower = torch.ones(length, length, dtype=torch.bool, device=x.device).tril(upto)
    for first in range(0, tokens, stride):
        some = slice(first, min(first + stride, tokens))
        values, mixes, logs, keys, queries = (_chunks(each[:, some], length) for each in (x, mix, log_decay, B, C))
        logs = logs.cumsum(-1)[..., None]
        decay = (logs - logs.mT).masked_fill(~lower, -torch.inf).exp()
        ends = logs[..., -1:, :]
        yield _Run(values, mixes[..., None], logs.exp(), (ends - logs).exp(), ends.exp(), keys, queries, decay)


def _chunks(value: torch.Tensor, length: int) -> torch.Tensor:
    """`[B, T, H, ...]` to `[n, B, H, L, ...]`, zeros behind the last token."""
    value = F.pad(value, (0, 0) * (value.dim() - 2) + (0, -value.shape[1] % length))
    return value.unflatten(1, (-1, length)).movedim((1, 2), (0, 3))


def _no_state(x: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Return the state before the first token, `[B, H, P + N, N]` zeros."""
    return x.new_zeros(x.shape[0], x.shape[2], x.shape[3] + B.shape[3], B.shape[3])
