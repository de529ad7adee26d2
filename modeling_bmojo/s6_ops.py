"""Fading memory: the Mamba (S6) selective state space recurrence, naive, chunked and one step.

    S_t[i, n] = exp(dt_t[i] A[i, n]) S_{t-1}[i, n] + dt_t[i] x_t[i] B_t[n]
    y_t[i]    = sum_n S_t[i, n] C_t[n] + D[i] x_t[i]                       (arXiv 2312.00752, section 3, algorithm 2)

B'MOJO, Algorithm 1, line 2, with the paper's SSM. Other than in Mamba-2 (`ssm_ops.py`) every channel i has N decays of
its own, so a chunk is no matrix product: T I N exponentials are the floor of the work, and each is taken once here.

Shapes: B batch, T tokens, I channels (inner width), N state channels per channel, K tokens per chunk.
A token whose dt is 0 leaves the state as it was: that is how pads are passed over. Time steps arrive already positive
(softplus and clamp are the module's). Everything is computed in the inputs' dtype: the module hands over fp32 or fp64.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


# Most numbers that the states of a chunk may have before it is made shorter, down to MIN_CHUNK tokens. A CPU waits for
# memory beyond its caches; other devices rather launch fewer and larger operations.
CPU_CHUNK_NUMBERS = 2**19
CHUNK_NUMBERS = 2**24
MIN_CHUNK = 16


def naive_s6(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the recurrence, token by token: the oracle of the other forms. `chunk_size` is not used.

    Args:
        x: `[B, T, I]` inputs. dt: `[B, T, I]` time steps >= 0. A: `[I, N]` negative decay rates.
        B, C: `[B, T, N]` write and read keys, shared by all channels. D: `[I]` skip weights or None.
        initial_state: `[B, I, N]` or None for zeros.

    Returns:
        y `[B, T, I]` and the state after the last token `[B, I, N]`.
    """
    state = _zero_state(x, A) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        y, state = step_s6(x[:, t : t + 1], dt[:, t : t + 1], A, B[:, t : t + 1], C[:, t : t + 1], D, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1) if outputs else torch.zeros_like(x), state


def step_s6(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token (T = 1) of the recurrence, for decoding; the caller keeps the state. Shapes as `naive_s6`.

    Raises:
        ValueError: if T is not 1.
    """
    if x.shape[1] != 1:
        raise ValueError(f"x has {x.shape[1]} tokens: step_s6 takes exactly one; use chunk_s6 for more.")
    state = (dt * x).transpose(1, 2) * B
    if initial_state is not None:
        state = torch.addcmul(state, torch.exp(dt.transpose(1, 2) * A), initial_state)
    y = C @ state.transpose(1, 2)
    return (y if D is None else y + D * x), state


def chunk_s6(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same map as `naive_s6`, chunk by chunk. Shapes and returns as `naive_s6`.

    The states of one chunk of K <= `chunk_size` tokens are held at a time, and found in 3 sqrt(K) steps (`_scan_`).
    Memory: two tensors of B K I N numbers, whatever T is. With gradients the state before each chunk is kept as well
    (B T I N / K numbers), and the backward pass makes the rest anew in four tensors of B K I N.
    """
    tokens = x.shape[1]
    state = _zero_state(x, A) if initial_state is None else initial_state
    if tokens == 0:
        return torch.zeros_like(x), state
    room = (CPU_CHUNK_NUMBERS if x.device.type == "cpu" else CHUNK_NUMBERS) // max(1, x.shape[0] * A.numel())
    grid = _chunk_grid(min(tokens, chunk_size, max(room, MIN_CHUNK)))
    # The channels come last, so that the inner loops are long; ends of chunks are filled up with dt = 0.
    missing = -tokens % grid[1]
    values = (dt * x, dt, B, C)
    if missing:
        values = tuple(F.pad(value, (0, 0, 0, missing)) for value in values)
    written, steps, write, read = values
    inputs = (written, steps, A.T.contiguous(), write, read, state.transpose(1, 2).contiguous())
    if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
        y, state = _ChunkedScan.apply(*inputs, grid)
    else:
        y, state = _scan_chunks(*inputs, grid, None)
    y = y[:, :tokens]
    return (y if D is None else y + D * x), state.transpose(1, 2)


def predict_s6_input(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> torch.Tensor:
    """Return what the state expects of x_t before it is written: x_hat_t = (exp(dt_t A) S_{t-1}) B_t, `[B, T, I]`.

    The chunked scan with C := B, less the token's own contribution dt_t (B_t . B_t) x_t. For `innovation="state"`.
    """
    read, _ = chunk_s6(x, dt, A, B, B, None, initial_state, chunk_size)
    return read - (B * B).sum(-1, keepdim=True) * dt * x


def _zero_state(x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    return x.new_zeros(x.shape[0], *A.shape)


def _chunk_grid(chunk: int) -> tuple[int, int]:
    """Return a chunk of at most that many tokens as (columns, tokens per column), about square."""
    length = math.isqrt(chunk)
    return chunk // length, length


def _scan_(decay: torch.Tensor, states: torch.Tensor, state: torch.Tensor, reverse: bool = False) -> torch.Tensor:
    """S_t = decay_t S_{t-1} + added_t, in place, for one chunk: all columns step together, then the columns are joined.

    Args:
        decay: `[B, columns, L, N, I]` factors in [0, 1]; holds their products within a column afterwards.
        states: the added terms, of the same shape; holds the states S_t afterwards.
        state: `[B, N, I]` the state before the first token.
        reverse: runs from the last token to the first.

    Returns:
        the last state, `[B, N, I]`.
    """
    turn = -1 if reverse else 1
    pairs = list(zip(decay.unbind(2), states.unbind(2), strict=True))[::turn]
    for (product, before), (factor, after) in pairwise(pairs):
        after.addcmul_(factor, before)
        factor.mul_(product)
    product, last = pairs[-1]
    entering = torch.empty_like(last)
    for column in range(last.shape[1])[::turn]:
        entering[:, column] = state
        state = torch.addcmul(last[:, column], product[:, column], state)
    states.addcmul_(decay, entering[:, :, None])
    return state


def _chunks(tokens: int, grid: tuple[int, int]) -> list[slice]:
    size = grid[0] * grid[1]
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _workspace(written: torch.Tensor, A: torch.Tensor, grid: tuple[int, int], count: int) -> torch.Tensor:
    """`count` tensors `[B, K, N, I]`, used for every chunk: fresh memory costs more than the arithmetic."""
    return written.new_empty(count, written.shape[0], min(grid[0] * grid[1], written.shape[1]), *A.shape)


def _scan_chunks(
    written: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    grid: tuple[int, int],
    entering: list[torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All chunks from left to right; `written` is dt x, A and states are `[N, I]`; `entering` collects their states."""
    space, outputs = _workspace(written, A, grid, 2), torch.empty_like(written)
    for part in _chunks(written.shape[1], grid):
        if entering is not None:
            entering.append(state)
        decay, states = space[:, :, : part.stop - part.start]
        _fill(decay, states, written[:, part], dt[:, part], A, B[:, part])
        state = _scan_(decay.unflatten(1, (-1, grid[1])), states.unflatten(1, (-1, grid[1])), state)
        outputs[:, part] = (C[:, part, None] @ states).squeeze(2)
    return outputs, state


def _fill(
    decay: torch.Tensor,
    added: torch.Tensor,
    written: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
) -> None:
    """decay_t = exp(dt_t A) and added_t = dt_t x_t B_t of one chunk, `[B, K, N, I]`."""
    torch.mul(dt[:, :, None], A, out=decay).exp_()
    torch.mul(written[:, :, None], B[..., None], out=added)


class _ChunkedScan(torch.autograd.Function):
    """`_scan_chunks` with gradients: states are made anew chunk by chunk, from right to left.

    With g_t the gradient of y_t, the gradient G_t of S_t runs backwards through the same recurrence,

        G_t = g_t C_t^T + a_{t+1} G_{t+1}          a_t = exp(dt_t A)

    and gives those of C_t (S_t^T g_t), B_t (G_t^T u_t), u_t = dt_t x_t (G_t B_t) and dt_t A (G_t a_t S_{t-1}).
    """

    @staticmethod
    def forward(ctx, written, dt, A, B, C, state, grid):
        entering = []
        y, last = _scan_chunks(written, dt, A, B, C, state, grid, entering)
        ctx.save_for_backward(written, dt, A, B, C, *entering)
        ctx.grid = grid
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_state):
        written, dt, A, B, C, *entering = ctx.saved_tensors
        space = _workspace(written, A, ctx.grid, 4)
        grads = [torch.empty_like(value) for value in (written, dt, B, C)]
        grad_A = torch.zeros_like(A)
        for part in _chunks(written.shape[1], ctx.grid)[::-1]:
            inputs = [value[:, part] for value in (written, dt, B, C, grad_y)]
            outputs = [value[:, part] for value in grads]
            buffers = space[:, :, : part.stop - part.start]
            grad_state = _backward_chunk(inputs, A, entering.pop(), grad_state, ctx.grid[1], buffers, outputs, grad_A)
        grad_written, grad_dt, grad_B, grad_C = grads
        return grad_written, grad_dt, grad_A, grad_B, grad_C, grad_state, None


def _backward_chunk(inputs, A, before, grad_state, length, buffers, outputs, grad_A) -> torch.Tensor:
    """Return gradients of one chunk, written into `outputs` (those of dt x, dt, B, C) and added to `grad_A`.

    Args:
        inputs: dt x, dt, B, C and the gradient of y of the chunk. before: the state before it, `[B, N, I]`.
        grad_state: of the state after it; returns that of the state before it.
        buffers: four tensors `[B, K, N, I]` to work in.
    """
    written, dt, B, C, grad_y = inputs
    decay, moved, states, scratch = buffers

    def columns(value):
        return value.unflatten(1, (-1, length))

    _fill(decay, states, written, dt, A, B)
    scratch.copy_(decay)
    _scan_(columns(scratch), columns(states), before)
    # a_t S_{t-1}
    torch.mul(decay[:, 1:], states[:, :-1], out=moved[:, 1:])
    torch.mul(decay[:, 0], before, out=moved[:, 0])
    outputs[3].copy_((grad_y[:, :, None] @ states.transpose(2, 3)).squeeze(2))
    # G_t, over the states that are no longer needed
    torch.mul(grad_y[:, :, None], C[..., None], out=states)
    scratch[:, :-1] = decay[:, 1:]
    scratch[:, -1] = 1
    grad_before = _scan_(columns(scratch), columns(states), grad_state, reverse=True) * decay[:, 0]
    outputs[0].copy_((B[:, :, None] @ states).squeeze(2))
    outputs[2].copy_((written[:, :, None] @ states.transpose(2, 3)).squeeze(2))
    # of dt_t A
    moved.mul_(states)
    torch.sum(torch.mul(moved, A, out=scratch), dim=2, out=outputs[1])
    grad_A += torch.mul(moved, dt[:, :, None], out=scratch).sum((0, 1))
    return grad_before
