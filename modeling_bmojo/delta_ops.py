"""Fading memory: the gated delta rule, naive, chunked and one step.

    S_t = g_t S_{t-1} + beta_t (x_t - g_t S_{t-1} B_t) B_t^T          y_t = S_t C_t     (arXiv 2412.06464, equation 10)

A token first looks up what the state holds under its key, and writes what is missing: where Mamba-2 adds, this
replaces. x_t - g_t S_{t-1} B_t is what the state did not know of x_t, the innovation "state" itself.

Chunked (section 3.3 there), with l_t the log decay summed from the start of t's chunk to t, S the state that enters:

    u_t = beta_t (x_t - exp(l_t) S B_t - sum_{s < t} exp(l_t - l_s) (B_t . B_s) u_s)      a triangular system
    y_t = exp(l_t) S C_t + sum_{s <= t} exp(l_t - l_s) (C_t . B_s) u_s
    S'  = exp(l_end) S + sum_s exp(l_end - l_s) u_s B_s^T

Shapes: B batch, T tokens, H heads, P channels per head, N state channels, G groups that share B and C, L chunk length,
n chunks. Keys B and queries C arrive normalised, decays as logarithms. A token with beta 0 and log decay 0 leaves the
state as it was: that is how pads are passed over. Everything is computed in the inputs' dtype: the mixer hands over
fp32 or fp64.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F


RUN = 512  # tokens whose chunks are taken at once: they stay in a CPU's cache, and a long prompt needs little memory


def naive_delta(
    x: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the recurrence, token by token: the oracle of the other forms. `chunk_size` is not used.

    Args:
        x: `[B, T, H, P]` inputs. log_decay: `[B, T, H]` log g_t <= 0. beta: `[B, T, H]` shares written, in [0, 1].
        B, C: `[B, T, G, N]` keys that are written to and read. initial_state: `[B, H, P, N]` or None for zeros.

    Returns:
        y `[B, T, H, P]` and the state after the last token `[B, H, P, N]`.
    """
    repeat = x.shape[2] // B.shape[2]
    state = _no_state(x, B) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        key, query = (value[:, t].repeat_interleave(repeat, dim=1)[:, :, None] for value in (B, C))
        state = state * torch.exp(log_decay[:, t])[..., None, None]
        missing = x[:, t] - (state * key).sum(-1)
        state = state + (beta[:, t, :, None] * missing)[..., None] * key
        outputs.append((state * query).sum(-1))
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x), state


def chunk_delta(
    x: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same map as `naive_delta` by matrix products over chunks of `chunk_size` tokens.

    Shapes and returns as `naive_delta`.
    """
    return _scan(x, log_decay, beta, B, C, initial_state, chunk_size, 0)


def predict_delta_input(
    x: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    B: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> torch.Tensor:
    """Return what the state expects of x_t before it is written: g_t S_{t-1} B_t, `[B, T, H, P]`.

    What the rule subtracts from x_t itself; read with the write keys, the token's own write left out.
    """
    return _scan(x, log_decay, beta, B, B, initial_state, chunk_size, -1)[0]


def step_delta(
    x: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token (T = 1) of the recurrence, for decoding; the caller keeps the state. Shapes as `naive_delta`.

    Where gradients are off, `initial_state` is overwritten and returned: no new state per token.

    Raises:
        ValueError: if T is not 1.
    """
    if x.shape[1] != 1:
        raise ValueError(f"x has {x.shape[1]} tokens: step_delta takes exactly one; use chunk_delta for more.")
    decay = torch.exp(log_decay[:, 0])[..., None, None]
    if initial_state is None:
        state = _no_state(x, B)
    else:
        state = initial_state * decay if torch.is_grad_enabled() else initial_state.mul_(decay)
    # Heads stand as (group, head of the group), so that keys and queries broadcast instead of repeating.
    grouped = state.unflatten(1, (B.shape[2], -1))
    key, query = (value[:, 0, :, None, :, None] for value in (B, C))
    missing = x[:, 0].view(grouped.shape[:-1]) - (grouped @ key)[..., 0]
    write = (beta[:, 0].view(grouped.shape[:3])[..., None] * missing)[..., None] * key.mT
    grouped = grouped + write if torch.is_grad_enabled() else grouped.add_(write)
    return (grouped @ query).reshape(x.shape), grouped.flatten(1, 2)


class _Run(NamedTuple):
    """Some chunks, the last one filled up with tokens that do nothing; R heads in each of G groups.

    x: `[n, B, G, R, L, P]`. beta, start, tail: `[n, B, G, R, L, 1]`, the last two what is left of the entering state at
    each token, exp(l_t), and of what a token wrote at the end, exp(l_end - l_t). whole: `[n, B, G, R, 1, 1]`, what is
    left of the entering state at the end. keys, queries: `[n, B, G, 1, L, N]`. system, weights: `[n, B, G, R, L, L]`,
    beta_t exp(l_t - l_s) (B_t . B_s), of which what is below the diagonal counts, and exp(l_t - l_s) (C_t . B_s) for
    the tokens s that t reads.
    """

    x: torch.Tensor
    beta: torch.Tensor
    start: torch.Tensor
    tail: torch.Tensor
    whole: torch.Tensor
    keys: torch.Tensor
    queries: torch.Tensor
    system: torch.Tensor
    weights: torch.Tensor


def _scan(x, log_decay, beta, B, C, initial_state, chunk_size: int, upto: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Read with C, of what a chunk's own tokens wrote that of t and those before (`upto` 0) or of those before (-1).

    Returns y `[B, T, H, P]` and the state after the last token `[B, H, P, N]`.
    """
    if x.shape[1] == 0:
        return torch.zeros_like(x), _no_state(x, B) if initial_state is None else initial_state
    groups, outputs = B.shape[2], []
    state = (_no_state(x, B) if initial_state is None else initial_state).unflatten(1, (groups, -1)).mT
    for run in _runs(x, log_decay, beta, B, C, chunk_size, upto):
        for chunk in zip(*run):
            y, state = _one_chunk(_Run(*chunk), state)
            outputs.append(y)
    return torch.cat(outputs, dim=1)[:, : x.shape[1]], state.mT.flatten(1, 2).contiguous()


def _one_chunk(chunk: _Run, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y `[B, L, H, P]` of a chunk (without the leading n) and the state that leaves it `[B, G, R, N, P]`."""
    missing = chunk.beta * torch.addcmul(chunk.x, chunk.start, chunk.keys @ state, value=-1)
    u = torch.linalg.solve_triangular(chunk.system, missing, upper=False, unitriangular=True)
    y = torch.addcmul(chunk.weights @ u, chunk.start, chunk.queries @ state)
    state = torch.addcmul(chunk.keys.mT @ (chunk.tail * u), chunk.whole, state)
    return y.movedim(3, 1).flatten(2, 3), state


def _runs(x, log_decay, beta, B, C, chunk_size: int, upto: int) -> Iterator[_Run]:
    """Yield the chunks of up to `RUN` tokens at a time."""
    tokens, groups = x.shape[1], B.shape[2]
    length, repeat = min(chunk_size, tokens), x.shape[2] // groups
    unread = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    per_head = (_chunks(value, groups, repeat, length) for value in (x, log_decay, beta))
    per_group = (_chunks(value, groups, 1, length) for value in (B, C))
    # Split, not sliced one by one: the gradient of a slice is as large as the whole.
    runs = (value.split(max(RUN // length, 1)) for value in (*per_head, *per_group))
    for values, logs, shares, keys, queries in zip(*runs):
        keys, queries = keys.contiguous(), queries.contiguous()
        logs, shares = logs.cumsum(-1)[..., None], shares[..., None]
        decay = (logs - logs.mT).masked_fill(unread, -torch.inf).exp()
        ends = logs[..., -1:, :]
        shared = values, shares, logs.exp(), (ends - logs).exp(), ends.exp(), keys, queries
        yield _Run(*shared, decay * (keys @ keys.mT) * shares, (decay * (queries @ keys.mT)).tril(upto))


def _chunks(value: torch.Tensor, groups: int, heads: int, length: int) -> torch.Tensor:
    """`[B, T, G * heads, ...]` to `[n, B, G, heads, L, ...]`, zeros behind the last token."""
    if value.shape[1] % length:
        value = F.pad(value, (0, 0) * (value.dim() - 2) + (0, -value.shape[1] % length))
    return value.unflatten(2, (groups, heads)).unflatten(1, (-1, length)).movedim((1, 2), (0, 4))


def _no_state(x: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Return the state before the first token, `[B, H, P, N]` zeros."""
    return x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])
