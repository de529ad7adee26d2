"""The fading memory's convolution and its one-token step as Triton kernels: the same maps as in `ssm_ops`.

    out_t = bias + sum_j weight[:, j] x_{t - K + 1 + j}            S = exp(dt A) S + dt x B^T,   y = S C + D x

`causal_conv` reads every input once, forward and backward: the shifted rows of a tile come from the cache, and the
backward kernel forms dx, dhistory and the partial sums of dweight and dbias in one pass. The partial sums, one per
tile, are added by torch in a fixed order: no atomics. `step_ssd` moves the state, which is nearly all that it reads and
writes, through the chip once. The chunked scan has no kernel here: it is batched matrix products, and those are cuBLAS.

Shapes: B batch, T tokens, C channels, K taps, H heads, P channels per head, N state channels, G groups.
"""

import torch
from torch.autograd.function import once_differentiable

from .kernels_common import TRITON_MISSING, jit, launch, narrow, power_of_two, tl, wide
from .kernels_forms import triton_form
from .ssm_ops import step_ssd as torch_step_ssd


__all__ = ["KERNELS", "TRITON_MISSING", "causal_conv", "step_ssd"]


def causal_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, history: torch.Tensor | None = None
) -> torch.Tensor:
    """`ssm_ops.causal_conv` as one kernel, differentiable in all four arguments. Accumulates in fp32 at least.

    Args:
        x: `[B, T, C]`. weight: `[C, K]`. bias: `[C]` or None.
        history: `[B, K - 1, C]`, the inputs before x, oldest first; None for zeros.

    Returns:
        `[B, T, C]`, in x's dtype.

    Raises:
        RuntimeError: if Triton cannot run on the tensors' device.
    """
    if x.shape[1] == 0:
        return x
    if history is not None:
        history = history.to(x.dtype)
    return _CausalConv.apply(x, weight, bias, history)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, history):
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        options = _conv_options(x, weight, bias, history, 32)
        programs = _conv_programs(x.shape[1], x, options)
        launch(_conv_kernel, programs, *_conv_arguments(x, weight, bias, history), out, **options)
        ctx.save_for_backward(x, weight, bias, history)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias, history = ctx.saved_tensors
        batch, tokens, channels = x.shape
        taps = weight.shape[1]
        grad = grad.contiguous()
        options = _conv_options(x, weight, bias, history, 64)
        padded = tokens + (0 if history is None else taps - 1)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dhistory = None if history is None else torch.empty(history.shape, dtype=x.dtype, device=x.device)
        tiles = -(-padded // options["ROWS"])
        sums = torch.empty(batch, tiles, taps + 1, channels, dtype=_accumulated(x), device=x.device)
        programs = _conv_programs(padded, x, options)
        arguments = _conv_arguments(x, weight, bias, history)
        launch(
            _conv_gradient_kernel, programs, *arguments, grad, dx, x if dhistory is None else dhistory, sums, **options
        )
        sums = sums.sum((0, 1))
        dbias = None if bias is None else sums[taps].to(bias.dtype)
        return dx, sums[:taps].T.to(weight.dtype), dbias, dhistory


def _accumulated(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _conv_options(x, weight, bias, history, rows: int) -> dict:
    return {
        "TAPS": weight.shape[1],
        "BIAS": bias is not None,
        "HISTORY": history is not None,
        "ROWS": min(power_of_two(x.shape[1]), rows),
        "COLUMNS": min(power_of_two(x.shape[2], 16), 64),
        "ACC": wide(x.dtype),
        "num_warps": 4,
    }


def _conv_programs(rows: int, x: torch.Tensor, options: dict) -> int:
    return x.shape[0] * -(-rows // options["ROWS"]) * -(-x.shape[2] // options["COLUMNS"])


def _conv_arguments(x, weight, bias, history) -> tuple:
    """Return pointers, strides and sizes. What is absent is stood in for by another tensor, which is not read."""
    bias = weight if bias is None else bias.contiguous()
    past = x if history is None else history
    return (x, weight.contiguous(), bias, past, *x.stride(), *past.stride(), *x.shape[1:])


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
    """`ssm_ops.step_ssd` as one kernel: the state is read and written once. `chunk_size` is not used.

    Differentiable: the backward pass runs the torch form again, because decoding, which this is for, needs none.

    Args:
        x: `[B, 1, H, P]`. dt: `[B, 1, H]`. A: `[H]`. B, C: `[B, 1, G, N]`. D: `[H]` or None.
        initial_state: `[B, H, P, N]` or None for zeros.

    Returns:
        y `[B, 1, H, P]` and the state `[B, H, P, N]`, in the dtype that the arguments promote to.

    Raises:
        ValueError: if T is not 1. RuntimeError: if Triton cannot run on the tensors' device.
    """
    if x.shape[1] != 1:
        raise ValueError(f"x has {x.shape[1]} tokens: step_ssd takes exactly one; use chunk_ssd for more.")
    return _Step.apply(x, dt, A, B, C, D, initial_state)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        x, dt, A, B, C, D, state = inputs
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        dtype = x.dtype
        for value in inputs[1:]:
            dtype = dtype if value is None else torch.promote_types(dtype, value.dtype)
        batch, _, heads, channels = x.shape
        groups, width = B.shape[2:]
        y = torch.empty(batch, 1, heads, channels, dtype=dtype, device=x.device)
        after = torch.empty(batch, heads, channels, width, dtype=dtype, device=x.device)
        # No group of rows larger than 4,096 numbers: they are held in registers.
        columns = power_of_two(width)
        rows = min(power_of_two(channels), max(4096 // columns, 1))
        given = [value.contiguous() for value in (x, dt, A, B, C)]
        given += [x if value is None else value.contiguous() for value in (D, state)]
        launch(
            _step_kernel,
            batch * heads * -(-channels // rows),
            *given,
            y,
            after,
            heads,
            groups,
            channels,
            width,
            SKIP=D is not None,
            STARTED=state is not None,
            ROWS=rows,
            COLUMNS=columns,
            ACC=wide(dtype),
            num_warps=4,
        )
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dstate):
        with torch.enable_grad():
            inputs = [None if value is None else value.detach().requires_grad_() for value in ctx.saved_tensors]
            results = torch_step_ssd(*inputs)
        used = [(result, grad) for result, grad in zip(results, (dy, dstate), strict=True) if grad is not None]
        leaves = [value for value in inputs if value is not None]
        outputs, directions = zip(*used, strict=True)
        grads = iter(torch.autograd.grad(outputs, leaves, directions, allow_unused=True))
        return tuple(None if value is None else next(grads) for value in inputs)


@jit
def _conv_kernel(
    x_ptr, weight_ptr, bias_ptr, history_ptr, x_b, x_t, x_c, h_b, h_t, h_c, tokens, channels,
    out_ptr,
    TAPS: tl.constexpr, BIAS: tl.constexpr, HISTORY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: a tile of tokens and channels."""
    across, down = (channels + COLUMNS - 1) // COLUMNS, (tokens + ROWS - 1) // ROWS
    program = tl.program_id(0)
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)
    time = program // across % down * ROWS + tl.arange(0, ROWS)
    batch = (program // (across * down)).to(tl.int64)
    inside = column < channels
    there = (time < tokens)[:, None] & inside[None, :]
    total = tl.zeros([ROWS, COLUMNS], ACC)
    if BIAS:
        total += tl.load(bias_ptr + column, mask=inside, other=0.0).to(ACC)[None, :]
    for tap in tl.static_range(TAPS):
        source = (time - (TAPS - 1) + tap).to(tl.int64)[:, None]
        x = x_ptr + batch * x_b + source * x_t + column[None, :] * x_c
        value = tl.load(x, mask=there & (source >= 0), other=0.0).to(ACC)
        if HISTORY:
            past = history_ptr + batch * h_b + (source + (TAPS - 1)) * h_t + column[None, :] * h_c
            value += tl.load(past, mask=there & (source < 0), other=0.0).to(ACC)
        weight = tl.load(weight_ptr + column * TAPS + tap, mask=inside, other=0.0).to(ACC)
        total += weight[None, :] * value
    out = out_ptr + (batch * tokens + time)[:, None] * channels + column[None, :]
    tl.store(out, narrow(total, out_ptr.dtype.element_ty), mask=there)


@jit
def _conv_gradient_kernel(
    x_ptr, weight_ptr, bias_ptr, history_ptr, x_b, x_t, x_c, h_b, h_t, h_c, tokens, channels,
    grad_ptr, dx_ptr, dhistory_ptr, sums_ptr,
    TAPS: tl.constexpr, BIAS: tl.constexpr, HISTORY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: a tile of inputs, the history in front of x counted in if it is given.

    sums `[B, tiles, K + 1, C]`: the tile's share of dweight by tap, and of dbias.
    """
    AHEAD: tl.constexpr = TAPS - 1 if HISTORY else 0
    across, down = (channels + COLUMNS - 1) // COLUMNS, (tokens + AHEAD + ROWS - 1) // ROWS
    program = tl.program_id(0)
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)
    tile = program // across % down
    batch = (program // (across * down)).to(tl.int64)
    inside = column < channels
    source = (tile * ROWS - AHEAD + tl.arange(0, ROWS)).to(tl.int64)
    there = (source < tokens)[:, None] & inside[None, :]
    is_x = there & (source >= 0)[:, None]
    x = x_ptr + batch * x_b + source[:, None] * x_t + column[None, :] * x_c
    value = tl.load(x, mask=is_x, other=0.0).to(ACC)
    if HISTORY:
        past = history_ptr + batch * h_b + (source + AHEAD)[:, None] * h_t + column[None, :] * h_c
        value += tl.load(past, mask=there & (source < 0)[:, None], other=0.0).to(ACC)

    change = tl.zeros([ROWS, COLUMNS], ACC)
    share = sums_ptr + (batch * down + tile) * (TAPS + 1) * channels + column
    for tap in tl.static_range(TAPS):
        time = source + (TAPS - 1 - tap)
        reached = (time >= 0) & (time < tokens)
        grad = grad_ptr + (batch * tokens + time)[:, None] * channels + column[None, :]
        grad = tl.load(grad, mask=reached[:, None] & inside[None, :], other=0.0).to(ACC)
        weight = tl.load(weight_ptr + column * TAPS + tap, mask=inside, other=0.0).to(ACC)
        change += weight[None, :] * grad
        tl.store(share + tap * channels, tl.sum(value * grad, 0), mask=inside)
        if tap == TAPS - 1:
            tl.store(share + TAPS * channels, tl.sum(grad, 0), mask=inside)
    dx = dx_ptr + (batch * tokens + source)[:, None] * channels + column[None, :]
    tl.store(dx, narrow(change, dx_ptr.dtype.element_ty), mask=is_x)
    if HISTORY:
        dpast = dhistory_ptr + (batch * AHEAD + source + AHEAD)[:, None] * channels + column[None, :]
        tl.store(dpast, narrow(change, dhistory_ptr.dtype.element_ty), mask=there & (source < 0)[:, None])


@jit
def _step_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, state_ptr, y_ptr, after_ptr,
    heads, groups, channels, width,
    SKIP: tl.constexpr, STARTED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: some channels of one head."""
    tiles = (channels + ROWS - 1) // ROWS
    program = tl.program_id(0)
    head, row = program // tiles % heads, (program // tiles).to(tl.int64)
    key = (row // heads * groups + head // (heads // groups)) * width + tl.arange(0, COLUMNS)
    channel = program % tiles * ROWS + tl.arange(0, ROWS)
    inside, there = channel < channels, tl.arange(0, COLUMNS) < width
    both = inside[:, None] & there[None, :]
    cell = (row * channels + channel)[:, None] * width + tl.arange(0, COLUMNS)[None, :]

    x = tl.load(x_ptr + row * channels + channel, mask=inside, other=0.0).to(ACC)
    dt = tl.load(dt_ptr + row).to(ACC)
    write = tl.load(B_ptr + key, mask=there, other=0.0).to(ACC)
    read = tl.load(C_ptr + key, mask=there, other=0.0).to(ACC)
    state = (dt * x)[:, None] * write[None, :]
    if STARTED:
        decay = tl.exp(dt * tl.load(A_ptr + head).to(ACC))
        state += decay * tl.load(state_ptr + cell, mask=both, other=0.0).to(ACC)
    y = tl.sum(state * read[None, :], 1)
    if SKIP:
        y += tl.load(D_ptr + head).to(ACC) * x
    tl.store(y_ptr + row * channels + channel, narrow(y, y_ptr.dtype.element_ty), mask=inside)
    tl.store(after_ptr + cell, narrow(state, after_ptr.dtype.element_ty), mask=both)


# Operation to kernel: one line each.
KERNELS = {
    "conv": triton_form(causal_conv),
    "conv_step": triton_form(causal_conv),
    "scan_step": triton_form(step_ssd),
}
