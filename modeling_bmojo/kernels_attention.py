"""Attention of blocks of queries over gathered keys as Triton kernels: online softmax, forward and backward.

    out_t = softmax over { i in index[block of t] : begin_i <= t < end_i } of (q_t . k_i * scaling), times values

Scores never reach memory: each program holds a tile of queries and streams the keys that its block is offered, reading
every key's row where it lies. What is kept for the backward pass is one number per query, the log of the sum of its
exponentials (base 2). With s the scores, p their softmax, o the output and do its gradient:

    ds = p (do . v - do . o)      dq = scaling ds k      dk = scaling ds^T q      dv = p^T do

A key is offered to several blocks, and their shares of dk and dv must be added: in fp32, atomically, so the last bits
depend on the order in which the programs ran. Under `torch.use_deterministic_algorithms(True)` every share is written
out and added by `index_add_`, which has a fixed order then, at the price of `[B, n, K, G, D]` fp32 twice.

No dropout and no attention weights: those are `block_attention`'s.

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, R = H / G, D head dim, L block length, n blocks,
K keys offered to a block. In a tile, row m of block j is query j L + m // R, head m % R of its group.
"""

import math
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from .attention_ops import KeySet
from .kernels_common import TRITON_MISSING, dot, jit, launch, narrow, power_of_two, tf32_allowed, tl, wide
from .kernels_forms import Form, triton_form


__all__ = [
    "KERNELS",
    "MAX_HEAD_DIM",
    "TRITON_MISSING",
    "gathered_attention",
    "offers_to_index",
    "triton_attention_form",
    "triton_block_attention",
]

MAX_HEAD_DIM = 256

INT32_MAX = torch.iinfo(torch.int32).max


def gathered_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    begin: torch.Tensor,
    end: torch.Tensor,
    index: torch.Tensor,
    block: int,
    scaling: float,
) -> torch.Tensor:
    """One softmax per query over the keys that its block is offered and that it may see. Differentiable.

    Args:
        query: `[B, T, H, D]`, fp64, fp32, bf16 or fp16; D up to 256. keys, values: `[B, S, G, D]`, of the same dtype.
        begin, end: `[B, S]`, query t sees key i iff begin_i <= t < end_i.
        index: `[B, n, K]` int32 or int64 into S, -1 = none; n = ceil(T / L). A key listed twice counts twice.
        block: L. scaling: factor of the scores.

    Returns:
        `[B, T, H, D]`; zeros, with zero gradient, for a query that sees nothing.

    Raises:
        ValueError: if dtypes or sizes do not fit. RuntimeError: if Triton cannot run on the tensors' device.
    """
    _check(query, keys, values, index, block)
    spans = [side.clamp(0, INT32_MAX).to(torch.int32).contiguous() for side in (begin, end)]
    rows = [_rows_contiguous(value) for value in (query, keys, values)]
    return _GatheredAttention.apply(*rows, *spans, _rows_contiguous(index), block, scaling)


def _check(query, keys, values, index, block: int) -> None:
    if not query.dtype == keys.dtype == values.dtype:
        raise ValueError(
            f"query, keys, values are {query.dtype}, {keys.dtype}, {values.dtype}: must be one dtype; cast the keys."
        )
    if query.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"query.dtype={query.dtype}: must be float64, float32, bfloat16 or float16; cast it.")
    if query.shape[-1] > 256:
        raise ValueError(f"head dim {query.shape[-1]}: the kernels hold at most 256; use the torch form.")
    if query.shape[2] % max(keys.shape[2], 1):
        raise ValueError(f"{query.shape[2]} query heads over {keys.shape[2]} key heads: must divide; repeat the keys.")
    if index.shape[1] != -(-query.shape[1] // block):
        raise ValueError(
            f"index has {index.shape[1]} blocks for {query.shape[1]} queries in blocks of {block}: must be "
            f"{-(-query.shape[1] // block)}; build it with offers_to_index."
        )


def _rows_contiguous(value: torch.Tensor) -> torch.Tensor:
    return value if value.shape[-1] <= 1 or value.stride(-1) == 1 else value.contiguous()


# From key sets to one index -------------------------------------------------------------------------------------------


def offers_to_index(
    sets: list[tuple[KeySet, tuple[int, int] | torch.Tensor]], blocks: int, block: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Join key sets along S and write what each block is offered as one index.

    Args:
        sets: per set its keys and either a band `(low, high)`, block j being offered the coordinates
            j L + low ... j L + L - 1 + high as `banded` does, or an index `[B, n, M]` as `gathered` takes it.
            A `KeySet` that is listed twice, with a band and with an index, is joined once.
        blocks: n. block: L.

    Returns:
        keys, values `[B, S, G, D]`, begin, end `[B, S]` and index `[B, n, K]` (int32, -1 = none).
    """
    joined: list[KeySet] = []
    offsets: list[int] = []
    indices = []
    for keyset, offer in sets:
        known = [offset for other, offset in zip(joined, offsets, strict=True) if other is keyset]
        if not known:
            known = [sum(other.keys.shape[1] for other in joined)]
            joined.append(keyset)
            offsets += known
        index = offer if isinstance(offer, torch.Tensor) else _band(keyset, *offer, blocks, block)
        indices.append(torch.where(index >= 0, index + known[0], -1).to(torch.int32))
    merged = (joined[0][i] if len(joined) == 1 else torch.cat([keyset[i] for keyset in joined], 1) for i in range(4))
    return (*merged, torch.cat(indices, dim=2))


def _band(keyset: KeySet, low: int, high: int, blocks: int, block: int) -> torch.Tensor:
    """Return the index form of a band: `[B, n, L + high - low]`, -1 where the set has no such coordinate."""
    batch, stored = keyset.begin.shape
    device = keyset.begin.device
    start = torch.arange(blocks, device=device)[:, None] * block + (low - keyset.first)
    index = start + torch.arange(block + high - low, device=device)
    return torch.where((index >= 0) & (index < stored), index, -1).expand(batch, -1, -1)


def triton_block_attention(
    query: torch.Tensor, sets: list[tuple[KeySet, tuple[int, int] | torch.Tensor]], block: int, scaling: float
) -> torch.Tensor:
    """`block_attention` over key sets, by the kernels: see `offers_to_index` and `gathered_attention`.

    Args:
        query: `[B, T, H, D]`. sets: per set a `KeySet` and its band `(low, high)` or index `[B, n, M]`. block: L.

    Returns:
        `[B, T, H, D]`.
    """
    blocks = -(-query.shape[1] // block)
    return gathered_attention(query, *offers_to_index(sets, blocks, block), block, scaling)


# Autograd -------------------------------------------------------------------------------------------------------------


class _GatheredAttention(torch.autograd.Function):
    """Keeps the inputs, the output and one log-sum per query for the backward pass."""

    @staticmethod
    def forward(ctx, query, keys, values, begin, end, index, block, scaling):
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        logsum = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
        shared, constants = _arguments(query, keys, values, begin, end, index, block, scaling)
        tiles, programs = _tiles("forward", query, keys, index, block)
        launch(_forward_kernel, programs, *shared, out, logsum, **constants, **tiles)
        ctx.save_for_backward(query, keys, values, begin, end, index, out, logsum)
        ctx.block, ctx.scaling = block, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, keys, values, begin, end, index, out, logsum = ctx.saved_tensors
        grad, delta = grad.contiguous(), torch.empty_like(logsum)
        shared, constants = _arguments(query, keys, values, begin, end, index, ctx.block, ctx.scaling)
        shared += (grad, logsum, delta)
        dq = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        tiles, programs = _tiles("query gradient", query, keys, index, ctx.block)
        launch(_query_gradient_kernel, programs, *shared, out, dq, **constants, **tiles)

        apart = torch.are_deterministic_algorithms_enabled()
        shape = (*index.shape, *keys.shape[2:]) if apart else keys.shape
        dk, dv = (torch.zeros(shape, dtype=logsum.dtype, device=keys.device) for _ in range(2))
        tiles, programs = _tiles("key gradient", query, keys, index, ctx.block)
        launch(_key_gradient_kernel, programs, *shared, dk, dv, APART=apart, **constants, **tiles)
        if apart:
            dk, dv = (_add_shares(share, index, keys.shape[1]) for share in (dk, dv))
        return dq, dk.to(keys.dtype), dv.to(values.dtype), None, None, None, None, None


def _add_shares(shares: torch.Tensor, index: torch.Tensor, stored: int) -> torch.Tensor:
    """Add each key's shares, `[B, n, K, G, D]` to `[B, S, G, D]`, in the order of the blocks."""
    batch = index.shape[0]
    # One row more than keys per batch row: where the shares of -1 go.
    target = torch.where(index >= 0, index, stored).flatten(1)
    target = target + torch.arange(batch, device=index.device)[:, None] * (stored + 1)
    total = shares.new_zeros(batch * (stored + 1), *shares.shape[3:])
    total.index_add_(0, target.flatten(), shares.flatten(0, 2))
    return total.unflatten(0, (batch, stored + 1))[:, :stored]


def _arguments(query, keys, values, begin, end, index, block: int, scaling: float) -> tuple[tuple, dict]:
    """Return what all three kernels take first, and their constants."""
    strides = [stride for value in (query, keys, values, index) for stride in value.stride()[:-1]]
    sizes = (query.shape[1], *keys.shape[1:3], *index.shape[1:], block)
    constants = {
        "SCALING": scaling,
        "LOG2_SCALING": scaling / math.log(2),
        "REPEAT": query.shape[2] // max(keys.shape[2], 1),
        "DIM": query.shape[3],
        "BLOCK_D": power_of_two(query.shape[3], 16),
        "ACC": wide(query.dtype),
        "PRECISION": "tf32" if query.dtype == torch.float32 and tf32_allowed() else "ieee",
    }
    return (query, keys, values, begin, end, index, *strides, *sizes), constants


# (BLOCK_M, BLOCK_N, num_warps, num_stages) by the padded head dim of 16-bit inputs, and by dtype for wider ones. Judged
# by the compiler's report for sm_90: 16-bit products on the tensor cores (wgmma), loads pipelined, hardly a register
# spilled, shared memory within a multiprocessor's 227 KiB. Not tuned by timing.
TILES = {
    "forward": {
        64: (128, 64, 4, 3),
        128: (128, 64, 8, 3),
        256: (64, 32, 8, 2),
        torch.float32: (32, 32, 8, 2),
        torch.float64: (16, 16, 8, 1),
    },
    "query gradient": {
        64: (128, 64, 8, 3),
        128: (64, 64, 4, 2),
        256: (64, 32, 8, 2),
        torch.float32: (32, 32, 8, 2),
        torch.float64: (16, 16, 8, 1),
    },
    "key gradient": {
        64: (64, 128, 8, 2),
        128: (32, 128, 8, 2),
        256: (32, 64, 8, 2),
        torch.float32: (16, 32, 8, 1),
        torch.float64: (16, 16, 8, 1),
    },
}


def _tiles(kernel: str, query: torch.Tensor, keys: torch.Tensor, index: torch.Tensor, block: int) -> tuple[dict, int]:
    """Tile sizes and the number of programs; no tile has more rows or columns than a block can fill."""
    size = power_of_two(query.shape[3], 64) if query.element_size() == 2 else query.dtype
    rows, columns, warps, stages = TILES[kernel][size]
    used = query.shape[2] // max(keys.shape[2], 1) * block
    rows, columns = min(rows, power_of_two(used, 16)), min(columns, power_of_two(index.shape[2], 16))
    tiles = -(-index.shape[2] // columns) if kernel == "key gradient" else -(-used // rows)
    options = {"BLOCK_M": rows, "BLOCK_N": columns, "num_warps": warps, "num_stages": stages}
    return options, index.shape[:2].numel() * keys.shape[2] * tiles


# Kernels --------------------------------------------------------------------------------------------------------------


@jit
def _query_tile(tile, group, j, block, tokens, REPEAT: tl.constexpr, BLOCK_M: tl.constexpr):
    """Time and head of each row; a row that is no query stands at time -1, where nothing is visible."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    time = j * block + row // REPEAT
    real = (row < block * REPEAT) & (time < tokens)
    return tl.where(real, time, -1), group * REPEAT + row % REPEAT, real


@jit
def _key_tile(column, offered, index_ptr, begin_ptr, end_ptr):
    """Where each column's key lies, whether there is one, and its span; without a key the span is empty."""
    place = tl.load(index_ptr + column, mask=column < offered, other=-1)
    there = place >= 0
    place = tl.where(there, place, 0).to(tl.int64)
    begin = tl.load(begin_ptr + place, mask=there, other=0)
    end = tl.load(end_ptr + place, mask=there, other=0)
    return place, there, begin, end


@jit
def _load_rows(ptr, offset, there, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the rows at `offset` `[rows]`, `[rows, BLOCK_D]`, zero where there is none and beyond the head dim."""
    channel = tl.arange(0, BLOCK_D)
    mask = there[:, None]
    if DIM != BLOCK_D:
        mask = mask & (channel < DIM)[None, :]
    return tl.load(ptr + offset[:, None] + channel[None, :], mask=mask, other=0.0)


@jit
def _store_rows(ptr, offset, there, value, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    channel = tl.arange(0, BLOCK_D)
    mask = there[:, None] & (channel < DIM)[None, :]
    tl.store(ptr + offset[:, None] + channel[None, :], narrow(value, ptr.dtype.element_ty), mask=mask)


@jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, begin_ptr, end_ptr, index_ptr,
    q_b, q_t, q_h, k_b, k_s, k_g, v_b, v_s, v_g, i_b, i_n,
    tokens, stored, groups, blocks, offered, block,
    out_ptr, logsum_ptr,
    LOG2_SCALING: tl.constexpr, SCALING: tl.constexpr, REPEAT: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the queries of one block and group, against every key the block is offered."""
    tiles = (block * REPEAT + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    tile, j = program % tiles, program // tiles % blocks
    g, b = program // (tiles * blocks) % groups, (program // (tiles * blocks * groups)).to(tl.int64)
    time, head, real = _query_tile(tile, g, j, block, tokens, REPEAT, BLOCK_M)
    q = _load_rows(q_ptr + b * q_b, time.to(tl.int64) * q_t + head * q_h, real, DIM, BLOCK_D)

    # exp2 is the hardware's exponential: scores are in units of log 2.
    top = tl.full([BLOCK_M], -float("inf"), ACC)
    total = tl.zeros([BLOCK_M], ACC)
    out = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for start in range(0, offered, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        place, there, begin, end = _key_tile(
            column, offered, index_ptr + b * i_b + j * i_n, begin_ptr + b * stored, end_ptr + b * stored
        )
        k = _load_rows(k_ptr + b * k_b + g * k_g, place * k_s, there, DIM, BLOCK_D)
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], ACC), PRECISION) * LOG2_SCALING
        seen = (begin[None, :] <= time[:, None]) & (time[:, None] < end[None, :])
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        # While a row has seen nothing its maximum is -inf, and -inf - -inf is no number.
        level = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(scores - level[:, None])
        rescale = tl.exp2(top - level)
        total = total * rescale + tl.sum(weights, 1)
        v = _load_rows(v_ptr + b * v_b + g * v_g, place * v_s, there, DIM, BLOCK_D)
        out = dot(narrow(weights, v.dtype), v, out * rescale[:, None], PRECISION)
        top = higher

    some = total > 0
    out = out / tl.where(some, total, 1.0)[:, None]
    row = (b * tokens + time) * (groups * REPEAT) + head
    _store_rows(out_ptr, row * DIM, real, out, DIM, BLOCK_D)
    tl.store(logsum_ptr + row, tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), 0.0), mask=real)


@jit
def _query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, begin_ptr, end_ptr, index_ptr,
    q_b, q_t, q_h, k_b, k_s, k_g, v_b, v_s, v_g, i_b, i_n,
    tokens, stored, groups, blocks, offered, block,
    grad_ptr, logsum_ptr, delta_ptr, out_ptr, dq_ptr,
    LOG2_SCALING: tl.constexpr, SCALING: tl.constexpr, REPEAT: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and delta = do . o for the other kernel. Programs as in the forward pass."""
    tiles = (block * REPEAT + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    tile, j = program % tiles, program // tiles % blocks
    g, b = program // (tiles * blocks) % groups, (program // (tiles * blocks * groups)).to(tl.int64)
    time, head, real = _query_tile(tile, g, j, block, tokens, REPEAT, BLOCK_M)
    row = (b * tokens + time) * (groups * REPEAT) + head
    q = _load_rows(q_ptr + b * q_b, time.to(tl.int64) * q_t + head * q_h, real, DIM, BLOCK_D)
    grad = _load_rows(grad_ptr, row * DIM, real, DIM, BLOCK_D)
    out = _load_rows(out_ptr, row * DIM, real, DIM, BLOCK_D)
    delta = tl.sum(grad.to(ACC) * out.to(ACC), 1)
    tl.store(delta_ptr + row, delta, mask=real)
    logsum = tl.load(logsum_ptr + row, mask=real, other=0.0)

    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for start in range(0, offered, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        place, there, begin, end = _key_tile(
            column, offered, index_ptr + b * i_b + j * i_n, begin_ptr + b * stored, end_ptr + b * stored
        )
        k = _load_rows(k_ptr + b * k_b + g * k_g, place * k_s, there, DIM, BLOCK_D)
        v = _load_rows(v_ptr + b * v_b + g * v_g, place * v_s, there, DIM, BLOCK_D)
        scores = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], ACC), PRECISION) * LOG2_SCALING
        seen = (begin[None, :] <= time[:, None]) & (time[:, None] < end[None, :])
        weights = tl.where(seen, tl.exp2(scores - logsum[:, None]), 0.0)
        change = weights * (dot(grad, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], ACC), PRECISION) - delta[:, None])
        dq = dot(narrow(change, k.dtype), k, dq, PRECISION)
    _store_rows(dq_ptr, row * DIM, real, dq * SCALING, DIM, BLOCK_D)


@jit
def _key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, begin_ptr, end_ptr, index_ptr,
    q_b, q_t, q_h, k_b, k_s, k_g, v_b, v_s, v_g, i_b, i_n,
    tokens, stored, groups, blocks, offered, block,
    grad_ptr, logsum_ptr, delta_ptr, dk_ptr, dv_ptr, APART: tl.constexpr,
    LOG2_SCALING: tl.constexpr, SCALING: tl.constexpr, REPEAT: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the keys that a block is offered, against the block's queries that may see any of them.

    Its shares of dk and dv are added to `[B, S, G, D]`, or stored `[B, n, K, G, D]` if `APART`.
    """
    tiles = (offered + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    column = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    j, g = program // tiles % blocks, program // (tiles * blocks) % groups
    b = (program // (tiles * blocks * groups)).to(tl.int64)
    place, there, begin, end = _key_tile(
        column, offered, index_ptr + b * i_b + j * i_n, begin_ptr + b * stored, end_ptr + b * stored
    )
    k = _load_rows(k_ptr + b * k_b + g * k_g, place * k_s, there, DIM, BLOCK_D)
    v = _load_rows(v_ptr + b * v_b + g * v_g, place * v_s, there, DIM, BLOCK_D)

    # Rows before the first span's begin and behind the last one's end have nothing to add.
    first = tl.minimum(tl.min(tl.where(there, begin, tokens)), tokens) - j * block
    last = tl.minimum(tl.max(end), tl.minimum(tokens, (j + 1) * block)) - j * block
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for tile in range(tl.maximum(first, 0) * REPEAT // BLOCK_M, (last * REPEAT + BLOCK_M - 1) // BLOCK_M):
        time, head, real = _query_tile(tile, g, j, block, tokens, REPEAT, BLOCK_M)
        row = (b * tokens + time) * (groups * REPEAT) + head
        q = _load_rows(q_ptr + b * q_b, time.to(tl.int64) * q_t + head * q_h, real, DIM, BLOCK_D)
        grad = _load_rows(grad_ptr, row * DIM, real, DIM, BLOCK_D)
        logsum = tl.load(logsum_ptr + row, mask=real, other=0.0)
        delta = tl.load(delta_ptr + row, mask=real, other=0.0)
        # Transposed, [keys, queries]: both products below then take their left factor as it is.
        scores = dot(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], ACC), PRECISION) * LOG2_SCALING
        seen = (begin[:, None] <= time[None, :]) & (time[None, :] < end[:, None])
        weights = tl.where(seen, tl.exp2(scores - logsum[None, :]), 0.0)
        dv = dot(narrow(weights, grad.dtype), grad, dv, PRECISION)
        change = weights * (dot(v, tl.trans(grad), tl.zeros([BLOCK_N, BLOCK_M], ACC), PRECISION) - delta[None, :])
        dk = dot(narrow(change, q.dtype), q, dk, PRECISION)

    channel = tl.arange(0, BLOCK_D)
    if APART:
        share = (((b * blocks + j) * offered + column) * groups + g) * DIM
        _store_rows(dk_ptr, share, there, dk * SCALING, DIM, BLOCK_D)
        _store_rows(dv_ptr, share, there, dv, DIM, BLOCK_D)
    else:
        target = (((b * stored + place) * groups + g) * DIM)[:, None] + channel[None, :]
        mask = there[:, None] & (channel < DIM)[None, :]
        tl.atomic_add(dk_ptr + target, dk * SCALING, mask=mask, sem="relaxed")
        tl.atomic_add(dv_ptr + target, dv, mask=mask, sem="relaxed")


# The table ------------------------------------------------------------------------------------------------------------


def triton_attention_form(call: Callable) -> Form:
    """Return the entry for a kernel `(query, sets, block, scaling) -> out`, which forms no weights and knows no
    dropout."""

    def attention(query, sets, block, scaling, dropout=0.0, implementation="sdpa", columns=None):
        return call(query, sets, block, scaling), None

    def refuse(query, sets, block, scaling, dropout=0.0, implementation="sdpa", columns=None) -> str | None:
        if columns is not None or implementation != "sdpa":
            return "attention weights, or attn_implementation='eager', were asked for"
        if query.shape[-1] > MAX_HEAD_DIM:
            return f"it holds heads of at most {MAX_HEAD_DIM} channels, the model's have {query.shape[-1]}"
        if any(type(each) is not tuple or getattr(each[1], "ndim", 3) == 4 for each in sets):
            return "it knows no keys that differ per head, and no bias per query"
        return "it has no dropout" if dropout else None

    return triton_form(attention, refuse)._replace(label=f"triton: {call.__name__}")


# Operation to kernel: one line each.
KERNELS = {"memory_attention": triton_attention_form(triton_block_attention)}
