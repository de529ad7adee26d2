"""Innovation and eidetic selection as Triton kernels: the same maps as in `memory_ops`, which defines them.

`select` streams: one program per row holds the M kept tokens and takes the leaving tokens in their order, a chunk at a
time. Once the memory is full the weakest kept key never falls, so whoever does not beat it at the chunk's start is
refused at once, and the loop runs only over those that do: its steps are the tokens that enter, about
M ln(T / M) of T when the keys come in no order, all of them when every token beats the last.

Ties: the older token stays, so a newcomer must beat strictly, and of the weakest the youngest leaves. A token's expiry
is written once, when it is refused or replaced; that of a token that is still kept is set beforehand.

Shapes: B batch, T tokens, S = tokens that may be kept, W window, M slots, L block length, n blocks, E width of an
output, k taps.
"""

import torch

from .kernels_common import TRITON_MISSING, jit, launch, power_of_two, tl, wide
from .kernels_forms import triton_form
from .memory_ops import INNOVATION_EPS, NEVER, Selection


__all__ = ["KERNELS", "TRITON_MISSING", "output_innovation", "select"]


def select(
    keys: torch.Tensor,
    valid: torch.Tensor,
    window: int,
    slots: int,
    block: int,
    queries: int,
    held: int = 0,
    past: int = 0,
) -> Selection:
    """`memory_ops.select`, token by token on the device. Same arguments, same result, slots in the same order.

    Args:
        keys: `[B, S]` retention keys, fp32 or fp64, no NaN (`retention_key` makes none). valid: `[B, S]`.
        window: W. slots: M. block: L. queries: T. held, past: tokens of the memory and of the window in front.

    Raises:
        RuntimeError: if Triton cannot run on the tensors' device.
    """
    batch, tokens = keys.shape
    first = -held - past
    place = torch.arange(tokens, device=keys.device)
    still = place + first + window if slots == 0 else torch.full_like(place, NEVER)
    expiry = torch.where(valid, still, -NEVER)
    starts = torch.arange(0, queries, block, device=keys.device)
    memory = torch.empty(batch, len(starts), slots, dtype=torch.int64, device=keys.device)
    if slots == 0:
        return Selection(expiry, memory)
    lanes = power_of_two(slots)
    launch(
        _select_kernel,
        batch,
        keys.contiguous(),
        valid.contiguous(),
        expiry,
        memory,
        tokens,
        window,
        slots,
        block,
        queries,
        held,
        first,
        len(starts),
        LANES=lanes,
        CHUNK=min(power_of_two(block, 16), 256),
        num_warps=1 if lanes <= 256 else 4,
    )
    # In the kernel a newcomer takes its predecessor's slot; listed, the slots go from old to new, the empty ones last.
    # Where no token has applied yet they are as they came, holes included.
    listed = torch.where(memory >= 0, memory, tokens).sort(-1).values
    untouched = (starts - window - first + 1).clamp(max=tokens) <= held
    return Selection(expiry, torch.where(untouched[:, None], memory, torch.where(listed < tokens, listed, -1)))


def output_innovation(y: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
    """`memory_ops.output_innovation` in one pass: the mean of the last k outputs and the scale-free error against it.

    Args:
        y: `[B, T, E]`. history: `[B, k, E]`, oldest first.

    Returns:
        e `[B, T]`, fp32 at least. Without gradient: selection is discrete.

    Raises:
        RuntimeError: if Triton cannot run on the tensors' device.
    """
    batch, tokens, width = y.shape
    y = y.detach()
    history = history.detach().to(y.dtype)
    error = torch.empty(batch, tokens, dtype=torch.promote_types(y.dtype, torch.float32), device=y.device)
    rows = 16
    launch(
        _innovation_kernel,
        batch * -(-tokens // rows),
        y,
        history,
        error,
        *y.stride(),
        *history.stride(),
        tokens,
        width,
        TAPS=history.shape[1],
        EPS=INNOVATION_EPS,
        ROWS=rows,
        COLUMNS=min(power_of_two(width, 16), 256),
        ACC=wide(y.dtype),
        num_warps=4,
    )
    return error


@jit
def _select_kernel(
    keys_ptr, valid_ptr, expiry_ptr, memory_ptr,
    tokens, window, slots, block, queries, held, first, blocks,
    LANES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: one row. Writes expiry `[B, S]` of refused and replaced tokens, and memory `[B, n, M]` unordered."""
    row = tl.program_id(0).to(tl.int64)
    keys_ptr += row * tokens
    valid_ptr += row * tokens
    expiry_ptr += row * tokens
    lane = tl.arange(0, LANES)
    inside = lane < slots
    known = inside & (lane < held) & (lane < tokens)
    known = known & (tl.load(valid_ptr + lane, mask=known, other=0) != 0)
    kept = tl.where(known, lane, -1)
    kept_key = tl.load(keys_ptr + lane, mask=known, other=float("inf"))

    done = held
    for j in range(blocks + 1):
        # The last round is for the tokens that leave between the last block's first query and the last query.
        query = tl.where(j < blocks, j * block, queries - 1)
        leaving = tl.maximum(tl.minimum(query - window - first + 1, tokens), held)
        while done < leaving:
            token = done + tl.arange(0, CHUNK)
            here = token < leaving
            applies = here & (tl.load(valid_ptr + token, mask=here, other=0) != 0)
            key = tl.load(keys_ptr + token, mask=here, other=-float("inf"))
            empty = inside & (kept < 0)
            room = tl.max(empty.to(tl.int32), 0)
            weakest = tl.min(kept_key, 0)
            # Whoever does not enter is refused when it leaves; who enters and is replaced within the chunk, then.
            out_at = token
            stays = here & (token < 0)
            waits = applies & ((key > weakest) | (room > 0))
            while tl.max(waits.to(tl.int32), 0) > 0:
                entering = tl.min(tl.where(waits, token, tokens), 0)
                entering_key = tl.load(keys_ptr + entering)
                youngest = tl.max(tl.where(inside & (kept_key == weakest), kept, -1), 0)
                free = tl.min(tl.where(empty, lane, LANES), 0)
                target = tl.where(room > 0, lane == free, inside & (kept == youngest))
                replaced = tl.where(room > 0, -1, youngest)
                tl.store(
                    expiry_ptr + replaced,
                    (entering + first + window).to(tl.int64),
                    mask=(replaced >= 0) & (replaced < done),
                )
                out_at = tl.where(token == replaced, entering, out_at)
                stays = (stays | (token == entering)) & (token != replaced)
                kept = tl.where(target, entering, kept)
                kept_key = tl.where(target, entering_key, kept_key)
                empty = inside & (kept < 0)
                room = tl.max(empty.to(tl.int32), 0)
                weakest = tl.min(kept_key, 0)
                waits = waits & (token > entering) & ((key > weakest) | (room > 0))
            tl.store(expiry_ptr + token, (out_at + first + window).to(tl.int64), mask=applies & (stays == 0))
            done = tl.minimum(done + CHUNK, leaving)
        if j < blocks:
            tl.store(memory_ptr + (row * blocks + j) * slots + lane, kept.to(tl.int64), mask=inside)


@jit
def _innovation_kernel(
    y_ptr, history_ptr, error_ptr,
    y_b, y_t, y_e, h_b, h_t, h_e, tokens, width,
    TAPS: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program: a tile of tokens. An output is read k + 1 times, but from memory once: the tile's rows overlap."""
    tiles = (tokens + ROWS - 1) // ROWS
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    time = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    y_ptr += batch * y_b
    history_ptr += batch * h_b
    apart = tl.zeros([ROWS], ACC)
    energy = tl.zeros([ROWS], ACC)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = (time < tokens)[:, None] & (column < width)[None, :]
        offset = time.to(tl.int64)[:, None] * y_t + column[None, :] * y_e
        value = tl.load(y_ptr + offset, mask=there, other=0.0).to(ACC)
        expected = tl.zeros([ROWS, COLUMNS], ACC)
        # Oldest first, as the torch form adds them.
        for tap in tl.static_range(TAPS):
            source = (time - TAPS + tap)[:, None]
            recent = tl.load(y_ptr + offset + (tap - TAPS) * y_t, mask=there & (source >= 0), other=0.0)
            before = history_ptr + (source + TAPS) * h_t + column[None, :] * h_e
            older = tl.load(before, mask=there & (source < 0), other=0.0)
            expected += recent.to(ACC) + older.to(ACC)
        expected = expected / TAPS
        apart += tl.sum((value - expected) * (value - expected), 1)
        energy += tl.sum(value * value + expected * expected, 1)
    tl.store(error_ptr + batch * tokens + time, apart / (energy + EPS), mask=time < tokens)


# Operation to kernel: one line each.
KERNELS = {
    "innovation": triton_form(output_innovation),
    "expiry": triton_form(select),
}
