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


LENGTH = 16  # tokens of a chunk at most: a longer one does more work in itself than it saves at its start
# Tokens, of all heads and rows, whose chunks are taken at once. CPU: what a step touches stays in the L2 cache;
# accelerators: few, large launches.
RUN, RUN_ELSEWHERE = 1024, 1 << 14
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
        rule = _rule(*ctx.steps)
        iterates, insides = _iterates(H, keys, weights, start, queries, rule, ctx.steps[1], True)
        dH, dkeys, dweights, dstart, dqueries, before = (
            torch.zeros_like(v) for v in (H, keys, weights, keys, queries, queries)
        )
        entered, scaled, scores = torch.empty_like(keys), torch.empty_like(keys), torch.empty_like(weights)
        grad, share = grad.clone(), 0.0  # of this step's x'; `before`: of the next one's, which took `share` times x
        for index in reversed(range(len(rule))):
            (keep, step, back), found, inside = rule[index], iterates[index], insides[index]
            torch.bmm(grad, keys.mT, out=scores)
            dweights.addcmul_(scores, inside, value=-step)
            scores.mul_(weights)
            torch.bmm(grad, H, out=entered)
            dstart.addcmul_(entered, found, value=-step)
            torch.mul(grad, start, out=scaled)
            dH.baddbmm_(scaled.mT, found, alpha=-step)
            dkeys.baddbmm_(scores.mT, found, alpha=-step).baddbmm_(inside.mul_(weights).mT, grad, alpha=-step)
            dqueries.add_(grad, alpha=step)
            before.baddbmm_(scores, keys, beta=share, alpha=-step)
            before.add_(grad, alpha=keep).addcmul_(entered, start, value=-step)
            grad, before, share = before, grad, back
        dqueries.add_(grad, alpha=_first(ctx.steps[1]))
        return dH, dkeys, dweights, dstart.sum(-1, keepdim=True), dqueries, None, None


def _solve(H, keys, weights, start, queries, steps: int, ridge: float) -> torch.Tensor:
    """Return what `_Solve` does."""
    if torch.compiler.is_compiling():  # an exported program may run where gradients are on, which no `out=` can
        found, before = queries * _first(ridge), torch.zeros_like(queries)
        for keep, step, back in _rule(steps, ridge):
            entered = torch.bmm(found * start, H.mT) + torch.bmm(torch.bmm(found, keys.mT) * weights, keys)
            found, before = keep * found + back * before + step * (queries - entered), found
        return found
    iterates, _ = _iterates(H, keys, weights, start, queries, _rule(steps, ridge), ridge, False)
    return iterates[steps % len(iterates)]


def _iterates(H, keys, weights, start, queries, rule, ridge: float, keep_all: bool):
    """Return what each step began with: x `[steps + 1, b, L, N]`, the result last, and x B^T `[steps, b, L, L]`.

    Without `keep_all` only the latest, in rings: x number i stands at i modulo 3.
    """
    steps = len(rule)
    iterates = queries.new_empty(steps + 1 if keep_all else 3, *queries.shape)
    insides = weights.new_empty(steps if keep_all else 1, *weights.shape)
    scaled, weighted = torch.empty_like(queries), torch.empty_like(weights)
    found, before = torch.mul(queries, _first(ridge), out=iterates[0]), torch.zeros_like(queries)
    for index, (keep, step, back) in enumerate(rule):
        inside = torch.bmm(found, keys.mT, out=insides[index % len(insides)])
        torch.mul(inside, weights, out=weighted)
        torch.mul(found, start, out=scaled)
        new = torch.add(queries, found, alpha=keep / step, out=iterates[(index + 1) % len(iterates)])
        new.add_(before, alpha=back / step)
        new.baddbmm_(scaled, H.mT, beta=step, alpha=-step).baddbmm_(weighted, keys, alpha=-step)
        found, before = new, found
    return iterates, insides


class _Walk(torch.autograd.Function):
    """The state that enters each chunk, `[n, B, H, ., N]`, and the one that leaves the last.

    added: `[n, B, H, ., N]`, what each chunk adds. whole: `[n, B, H, 1, 1]`, what it leaves of what enters. state:
    `[B, H, ., N]`. States are the largest tensors there are: its backward pass reads each as rarely as it can.
    """

    @staticmethod
    def forward(ctx, added, whole, state) -> tuple[torch.Tensor, torch.Tensor]:
        entering = []
        for chunk, left in zip(added, whole):
            entering.append(state)
            state = torch.addcmul(chunk, left, state)
        entering = torch.stack(entering)
        ctx.save_for_backward(whole, entering)
        return entering, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dentering: torch.Tensor, dstate: torch.Tensor) -> tuple[torch.Tensor, ...]:
        whole, entering = ctx.saved_tensors
        dadded = torch.empty_like(entering)
        for index in reversed(range(len(whole))):
            dadded[index] = dstate
            dstate = torch.addcmul(dentering[index], whole[index], dstate)
        dwhole = dadded.flatten(-2)[..., None, :] @ entering.flatten(-2)[..., None]
        return dadded, dwhole, dstate


# Chunks --------------------------------------------------------------------------------------------------------------
class _Run(NamedTuple):
    """Some chunks, the last one filled up with tokens that do nothing.

    x: `[n, B, H, L, P]`. logs: `[n, B, H, L, 1]` l_t. mix: `[n, B, H, L, 1]`. keys, queries: `[n, B, H, L, N]`.
    """

    x: torch.Tensor
    logs: torch.Tensor
    mix: torch.Tensor
    keys: torch.Tensor
    queries: torch.Tensor


def _scan(x, log_decay, mix, B, C, initial_state, chunk_size: int, steps: int, ridge: float, upto: int):
    """Read with C, of what a chunk's own tokens wrote that of t and those before (`upto` 0) or of those before (-1).

    Returns y `[B, T, H, P]` and the state after the last token `[B, H, P + N, N]`.
    """
    state = _no_state(x, B) if initial_state is None else initial_state
    if x.shape[1] == 0:
        return torch.zeros_like(x), state
    outputs, (U, H) = [], state.split([x.shape[-1], B.shape[-1]], dim=-2)
    state = U, H, H.square().sum((-2, -1), keepdim=True)
    for run in _runs(x, log_decay, mix, B, C, chunk_size):
        y, state = _one_run(run, state, steps, ridge, upto)
        outputs.append(y.permute(1, 0, 3, 2, 4))
    return torch.cat(outputs, dim=1).flatten(1, 2)[:, : x.shape[1]], torch.cat(state[:2], dim=-2)


def _one_run(run: _Run, state: tuple[torch.Tensor, ...], steps: int, ridge: float, upto: int):
    """Return y `[n, B, H, L, P]` and the state that leaves the last chunk.

    state: U `[B, H, P, N]`, H `[B, H, N, N]` and |H|_F^2 `[B, H, 1, 1]`.
    """
    (x, logs, mix, keys, queries), (U, H, square) = run, state
    length, ends = x.shape[-2], logs[..., -1:, :]
    # What is left of the entering state at each token and at the end, and of what a token wrote, there or at the end.
    start, whole, tail = logs.exp(), ends.exp(), (ends - logs).exp()
    unread = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(upto + 1)
    decay = (logs - logs.mT).masked_fill(unread, -torch.inf).exp()

    written = tail * keys
    U, leaving_U = _Walk.apply(x.mT @ written, whole, U)
    H, leaving_H = _Walk.apply(keys.mT @ written, whole, H)

    # |H_t|_F of every token: from that of the entering state, which is handed on like the state.
    said = ((keys @ H.mT) * keys).sum(-1, keepdim=True)
    alike = (keys @ keys.mT).square()
    grown = tail.mT @ torch.add(alike @ tail, whole * said, alpha=2)
    entered, square = _Walk.apply(grown, whole.square(), square)
    own = ((decay @ alike) * decay).sum(-1, keepdim=True)
    size = _size(start * (start * entered + 2 * (decay @ said)) + own)

    flat = [value.flatten(0, 2) for value in (H, keys, decay / size, start / size, queries)]
    training = torch.is_grad_enabled() and any(value.requires_grad for value in flat)
    found = (_Solve.apply if training else _solve)(*flat, steps, ridge).view(queries.shape)
    read = torch.lerp(queries, found / size, mix)
    y = torch.addcmul((decay * (read @ keys.mT)) @ x, start, read @ U.mT)
    return y, (leaving_U, leaving_H, square)


def _runs(x, log_decay, mix, B, C, chunk_size: int) -> Iterator[_Run]:
    """Yield the chunks, up to `RUN` tokens of all heads and rows at a time."""
    rows, tokens, heads, _ = x.shape
    length = min(chunk_size, tokens, LENGTH)
    count = max((RUN if x.device.type == "cpu" else RUN_ELSEWHERE) // (length * heads * rows), 1)
    x, logs, mix, keys, queries = (_chunks(value, length) for value in (x, log_decay, mix, B, C))
    # Split, not sliced one by one: the gradient of a slice is as large as the whole.
    runs = (value.split(count) for value in (x, logs.cumsum(-1)[..., None], mix[..., None], keys, queries))
    for run in zip(*runs):
        yield _Run(*(value.contiguous() for value in run))


def _chunks(value: torch.Tensor, length: int) -> torch.Tensor:
    """`[B, T, H, ...]` to `[n, B, H, L, ...]`, zeros behind the last token."""
    if value.shape[1] % length:
        value = F.pad(value, (0, 0) * (value.dim() - 2) + (0, -value.shape[1] % length))
    return value.unflatten(1, (-1, length)).movedim((1, 2), (0, 3))


def _no_state(x: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Return the state before the first token, `[B, H, P + N, N]` zeros."""
    return x.new_zeros(x.shape[0], x.shape[2], x.shape[3] + B.shape[3], B.shape[3])
