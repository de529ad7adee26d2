"""Fading memory: the Mamba-2 selective state space recurrence (SSD), naive, chunked and one step.

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T          y_t = S_t C_t + D x_t          (arXiv 2405.21060, section 6)

B'MOJO, Algorithm 1, line 2: this is its `x_t = A x_{t-1} + B u_t ; y_t = C x_t`.

Shapes: B batch, T tokens, H heads, P channels per head, N state channels, G groups that share B and C, L chunk length.
A token whose dt is 0 leaves the state as it was: that is how pads are passed over. Time steps arrive already positive
(softplus and clamp are the mixer's). Everything is computed in the inputs' dtype: the mixer hands over fp32 or fp64.
"""

import torch
import torch.nn.functional as F


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
    """The recurrence, token by token: the oracle of the other forms. `chunk_size` is not used.

    Args:
        x: `[B, T, H, P]` inputs. dt: `[B, T, H]` time steps >= 0. A: `[H]` negative decay rates.
        B, C: `[B, T, G, N]` write and read keys. D: `[H]` skip weights or None.
        initial_state: `[B, H, P, N]` or None for zeros.

    Returns:
        y `[B, T, H, P]` and the state after the last token `[B, H, P, N]`.
    """
    batch, tokens, heads, channels = x.shape
    repeat = heads // B.shape[2]
    state = x.new_zeros(batch, heads, channels, B.shape[3]) if initial_state is None else initial_state
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
    """The same map as `naive_ssd` by batched matrix products over chunks of `chunk_size` tokens (SSD, Listing 1).

    Shapes and returns as `naive_ssd`. Within a chunk the recurrence is a masked attention; between chunks only the
    state travels, so memory is O(T L) and the loop has T / L steps.
    """
    batch, tokens, heads, channels = x.shape
    groups, width = B.shape[2:]
    repeat = heads // groups
    if tokens == 0:
        empty = x.new_zeros(batch, heads, channels, width) if initial_state is None else initial_state
        return torch.zeros_like(x), empty
    length = min(chunk_size, tokens)
    xc, dtc, Bc, Cc = (_into_chunks(value, length) for value in (x, dt, B, C))
    # [B, n, G, R, L, P] and [B, n, G, R, L]: heads as (group, repeat) so that B and C broadcast instead of repeating.
    xc = xc.unflatten(3, (groups, repeat)).permute(0, 1, 3, 4, 2, 5)
    dtc = dtc.unflatten(3, (groups, repeat)).permute(0, 1, 3, 4, 2)
    Bc, Cc = Bc.permute(0, 1, 3, 2, 4), Cc.permute(0, 1, 3, 2, 4)
    log_decay = torch.cumsum(dtc * A.view(groups, repeat, 1), dim=-1)

    # 1. inside the chunks: y_t += sum_{s <= t} (C_t . B_s) exp(sum of log decays in (s, t]) dt_s x_s
    weights = (Cc @ Bc.transpose(-1, -2))[:, :, :, None] * _segment_decay(log_decay) * dtc[..., None, :]
    y = weights @ xc
    # 2. what each chunk adds to the state: sum_s exp(log decays in (s, end]) dt_s x_s B_s^T -> [B, n, G, R, P, N]
    to_end = torch.exp(log_decay[..., -1:] - log_decay) * dtc
    added = (xc * to_end[..., None]).transpose(-1, -2) @ Bc[:, :, :, None]
    # 3. the state travels from chunk to chunk
    chunk_decay = torch.exp(log_decay[..., -1])[..., None, None]
    state = torch.zeros_like(added[:, 0]) if initial_state is None else initial_state.unflatten(1, (groups, repeat))
    entering = []
    for index in range(added.shape[1]):
        entering.append(state)
        state = chunk_decay[:, index] * state + added[:, index]
    # 4. what the entering state contributes: y_t += exp(log decays in (start, t]) S_start C_t
    y = y + (Cc[:, :, :, None] @ torch.stack(entering, 1).transpose(-1, -2)) * torch.exp(log_decay)[..., None]

    y = y.permute(0, 1, 4, 2, 3, 5).reshape(batch, -1, heads, channels)[:, :tokens]
    return (y if D is None else y + D[:, None] * x), state.flatten(1, 2)


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

    Raises:
        ValueError: if T is not 1.
    """
    if x.shape[1] != 1:
        raise ValueError(f"x has {x.shape[1]} tokens: step_ssd takes exactly one; use chunk_ssd for more.")
    repeat = x.shape[2] // B.shape[2]
    write = B[:, 0].repeat_interleave(repeat, dim=1)
    read = C[:, 0].repeat_interleave(repeat, dim=1)
    added = (dt[:, 0, :, None] * x[:, 0])[..., None] * write[:, :, None, :]
    state = added if initial_state is None else torch.exp(dt[:, 0] * A)[..., None, None] * initial_state + added
    y = (state @ read[..., None]).squeeze(-1)[:, None]
    return (y if D is None else y + D[:, None] * x), state


def predict_input(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    chunk_size: int = 64,
) -> torch.Tensor:
    """What the state expects of x_t before it is written: x_hat_t = (exp(dt_t A) S_{t-1}) B_t, `[B, T, H, P]`.

    The chunked scan with C := B, less the token's own contribution dt_t (B_t . B_t) x_t. For `innovation="state"`.
    """
    read, _ = chunk_ssd(x, dt, A, B, B, None, initial_state, chunk_size)
    own = (B * B).sum(-1).repeat_interleave(x.shape[2] // B.shape[2], dim=2) * dt
    return read - own[..., None] * x


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
    history = history.to(x.dtype)
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


def _into_chunks(value: torch.Tensor, length: int) -> torch.Tensor:
    """`[B, T, ...]` to `[B, T / L, L, ...]`, zero-padded at the end: dt = 0 there, so the state holds."""
    missing = -value.shape[1] % length
    if missing:
        value = F.pad(value, (0, 0) * (value.dim() - 2) + (0, missing))
    return value.unflatten(1, (-1, length))


def _segment_decay(log_decay: torch.Tensor) -> torch.Tensor:
    """exp(sum of log decays in (s, t]) for s <= t, else 0: `[..., L]` cumulated log decays to `[..., L, L]`.

    Masked before the exponential: above the diagonal the exponent is positive, and an overflow there would turn the
    gradient into NaN even though its value is discarded.
    """
    length = log_decay.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=log_decay.device).triu(1)
    return torch.exp((log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(future, -torch.inf))
