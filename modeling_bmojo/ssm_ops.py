"""Fading memory: the Mamba-2 selective state space recurrence (SSD), naive, chunked and one step.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T          y_t = S_t C_t + D x_t          (arXiv 2405.21060, section 6)

B'MOJO, Algorithm 1, line 2: this is its `x_t = A x_{t-1} + B u_t ; y_t = C x_t`.

Shapes: B batch, T tokens, H heads, P channels per head, N state channels, G groups that share B and C, L chunk length.
A token whose dt is 0 leaves the state as it was: that is how pads are passed over. Time steps arrive already positive
(softplus and clamp are the mixer's). Everything is computed in the inputs' dtype: the mixer hands over fp32 or fp64.
"""

import torch

from .memory_ops import cast
from .scan_ops import scan_chunks


CONV_BLOCK = 128  # tokens convolved at once on a CPU, so that they stay in its cache


def naive_ssd(
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
        x: `[B, T, H, P]` inputs. dt: `[B, T, H]` time steps >= 0. A: `[H]` negative decay rates.
        B, C: `[B, T, G, N]` write and read keys. D: `[H]` skip weights or None.
        initial_state: `[B, H, P, N]` or None for zeros.

    Returns:
        y `[B, T, H, P]` and the state after the last token `[B, H, P, N]`.
    """
    batch, tokens, heads, channels = x.shape
    repeat = heads // B.shape[2]
    state = _no_state(x, B) if initial_state is None else initial_state
    outputs = []
    for t in range(tokens):
        write = B[:, t].repeat_interleave(repeat, dim=1)
        read = C[:, t].repeat_interleave(repeat, dim=1)
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * write[:, :, None, :]
        outputs.append((state * read[:, :, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)
    return (y if D is None else y + D[:, None] * x), state


def chunk_ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same map as `naive_ssd` by batched matrix products over chunks of `chunk_size` tokens (SSD, Listing
    1).

    Shapes and returns as `naive_ssd`. Within a chunk the recurrence is a masked attention; between chunks only the
    state travels. The T / L chunks are taken a few at a time, and training keeps one state per chunk: O(T) memory.
    """
    if x.shape[1] == 0:
        return torch.zeros_like(x), _no_state(x, B) if initial_state is None else initial_state
    return scan_chunks(x, dt, A, B, C, D, initial_state, chunk_size)


def step_ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token (T = 1) of the recurrence, for decoding; the caller keeps the state. Shapes as `naive_ssd`.

    Where gradients are off, `initial_state` is overwritten and returned: no new state per token.

    Raises:
        ValueError: if T is not 1.
    """
    if x.shape[1] != 1:
        raise ValueError(f"x has {x.shape[1]} tokens: step_ssd takes exactly one; use chunk_ssd for more.")
    if initial_state is None:
        return _step(x, dt, A, B, C, D, _no_state(x, B))
    decay = torch.exp(dt * A).view(*initial_state.shape[:2], 1, 1)
    return _step(x, dt, A, B, C, D, decay * initial_state if torch.is_grad_enabled() else initial_state.mul_(decay))


def predict_input(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> torch.Tensor:
    """Return what the state expects of x_t before it is written: x_hat_t = (exp(dt_t A) S_{t-1}) B_t, `[B, T, H, P]`.

    The chunked scan with C := B and the token's own write left out of every sum. For `innovation="state"`.
    """
    if x.shape[1] == 0:
        return torch.zeros_like(x)
    return scan_chunks(x, dt, A, B, B, None, initial_state, chunk_size, own=False)[0]


def causal_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, history: torch.Tensor | None = None
) -> torch.Tensor:
    """Depthwise causal convolution: out_t = bias + sum_j weight[:, j] x_{t - K + 1 + j}.

    Args:
        x: `[B, T, C]`. weight: `[C, K]`. bias: `[C]` or None.
        history: `[B, K - 1, C]`, the inputs before x, oldest first; None for zeros.

    Returns:
        `[B, T, C]`.
    """
    tokens, kernel = x.shape[1], weight.shape[1]
    if tokens == 0:
        return x
    if history is None:
        history = x.new_zeros(x.shape[0], kernel - 1, x.shape[2])
    history = cast(history, x.dtype)
    if tokens == 1:
        out = (torch.cat([history, x], dim=1) * weight.T).sum(1, keepdim=True)
        return out if bias is None else out + bias
    # One product per tap: a grouped conv1d is several times slower on a CPU. In fp32, as conv1d adds up.
    wide = torch.promote_types(x.dtype, torch.float32)
    taps, start = weight.T.to(wide).contiguous(), torch.zeros((), dtype=wide) if bias is None else bias.to(wide)
    start = start.to(x.device)
    live = torch.is_grad_enabled() and any(value.requires_grad for value in (x, weight, start, history))
    if live or x.device.type != "cpu" or torch.compiler.is_compiling():
        return _tap_by_tap(torch.cat([history, x], dim=1).to(wide), taps, start).to(x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype)
    size = max(CONV_BLOCK, kernel)
    for first in range(0, tokens, size):
        block = x[:, first - kernel + 1 : first + size] if first else torch.cat([history, x[:, :size]], dim=1)
        out[:, first : first + size] = _tap_by_tap(block.to(wide), taps, start)
    return out


def _tap_by_tap(padded: torch.Tensor, taps: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """start + sum_j taps[j] padded_{t + j}: `[B, K - 1 + T, C]` to `[B, T, C]`."""
    tokens = padded.shape[1] - taps.shape[0] + 1
    out = start
    for tap in range(taps.shape[0]):
        out = torch.addcmul(out, padded[:, tap : tap + tokens], taps[tap])
    return out


def _no_state(x: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Return the state before the first token, `[B, H, P, N]` zeros."""
    return x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])


def _step(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    decayed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write one token into the decayed state `[B, H, P, N]`, in place, and read it: y `[B, 1, H, P]` and the state.

    Heads stand as (group, head of the group), so that B and C broadcast instead of repeating.
    """
    rows, _, groups, width = B.shape
    u = dt[..., None] * x
    state = decayed.unflatten(1, (groups, -1))
    state.addcmul_(u.view(*state.shape[:-1], 1), B.view(rows, groups, 1, 1, width))
    y = torch.bmm(C.reshape(rows * groups, 1, width), state.reshape(rows * groups, -1, width).mT).view_as(x)
    return (y if D is None else torch.addcmul(y, D[:, None], x)), decayed
