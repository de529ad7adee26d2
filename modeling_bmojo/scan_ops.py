"""The chunked SSD scan, forward and backward, in bounded memory. `ssm_ops.chunk_ssd` is its public form.

With l_t the log decay summed from the start of t's chunk to t, u = dt x, and S the state that enters the chunk:

    y_t = sum_{s <= t} exp(l_t - l_s) (C_t . B_s) u_s + exp(l_t) C_t S + D x_t         (arXiv 2405.21060, section 6)
    S'  = exp(l_end) S + sum_s exp(l_end - l_s) B_s u_s^T

The backward pass is written out. It keeps the inputs and the state that enters each chunk and makes everything of size
[L, L] anew: O(T) memory. It is not differentiable a second time.

Shapes: as `scan_blocks`. States stand as [B, G, N, R, P], so that the R heads of a group are columns of one product.
"""

import re

import torch

from .scan_blocks import Block, Scratch, runs, scores, segment_decay, wide


def scan_chunks(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    chunk_size: int,
    own: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scan over at least one token. Arguments and returns as `ssm_ops.naive_ssd`.

    Args:
        own: whether y_t reads what token t itself wrote; False leaves s = t out of the sum.
    """
    tensors = (x, dt, A, B, C, D, initial_state)
    training = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in tensors)
    if training or torch.compiler.is_compiling():
        return _scan(*tensors, chunk_size, own, training)[:2]
    return _forward(*tensors, chunk_size, own, keep=False)[:2]


def _forward(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    chunk_size: int,
    own: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, the final state, and with `keep` the state before each chunk and after the last, `[n + 1, B, G, N, R, P]`."""
    (rows, tokens, heads, channels), (groups, width) = x.shape, B.shape[2:]
    shape = (rows, groups, width, heads // groups, channels)
    if initial_state is None:
        state = x.new_zeros(shape)
    else:
        state = initial_state.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3)
    kept = x.new_empty(-(-tokens // chunk_size) + 1 if keep else 0, *shape)
    y, take = x.new_empty(x.shape), Scratch(x)
    for run in runs(tokens, chunk_size, groups):
        outputs = run.heads(y)
        for block in run.blocks(x, dt, A, B, C):
            count = len(block.x)
            first = run.chunk + block.chunks.start
            states = kept[first : first + count + 1] if keep else take("states", count + 1, *shape)
            states[0] = state
            _forward_block(block, D, states, outputs[block.chunks], own, take)
            state = states[count]
    return y, _public(state), kept


def _forward_block(
    block: Block, D: torch.Tensor | None, states: torch.Tensor, y: torch.Tensor, own: bool, take: Scratch
) -> None:
    """Fill y `[k, B, G, R, L, P]` and `states[1:]`, given `states[0]`."""
    x, reads, writes = block.x, block.C, block.B
    *outer, repeat, length, channels = x.shape
    width, columns = writes.shape[2], repeat * channels

    # Inside the chunks a masked attention, with D x added to it.
    weights = segment_decay(block, own, take).mul_(scores(block, take)).view(-1, length, length)
    u = torch.mul(x, block.dt, out=take("u", *x.shape)).view(-1, length, channels)
    inside = take("inside", *x.shape)
    if D is None:
        torch.bmm(weights, u, out=inside.view(u.shape))
    else:
        torch.mul(x, D.view(outer[2], repeat, 1, 1), out=inside)
        inside.view(u.shape).baddbmm_(weights, u)

    # What each chunk adds to the state, then the states one after the other.
    added = take("columns", *outer, length, repeat, channels)
    torch.mul(x.transpose(3, 4), (block.end * block.dt).transpose(3, 4), out=added)
    torch.bmm(writes.mT, added.view(-1, length, columns), out=states[1:].view(-1, width, columns))
    for index, decay in enumerate(block.whole):
        states[index + 1].addcmul_(decay, states[index])

    # What reads the entering state.
    entered = torch.bmm(reads, states[:-1].view(-1, width, columns), out=added.view(-1, length, columns))
    torch.addcmul(inside.transpose(3, 4), block.start.transpose(3, 4), entered.view_as(added), out=y.transpose(3, 4))


def _backward(
    dy: torch.Tensor,
    dfinal: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    states: torch.Tensor,
    chunk_size: int,
    own: bool,
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of x, dt, A, B, C, D (empty if there is none) and the initial state."""
    groups = B.shape[2]
    dx, ddt, dB, dC = (value.new_empty(value.shape) for value in (x, dt, B, C))
    dA, dD = A.new_zeros(A.shape), x.new_zeros(0 if D is None else len(D))
    dstate = dfinal.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3)
    take = Scratch(x)
    for run in reversed(runs(x.shape[1], chunk_size, groups)):
        q, steps = run.heads(dy), run.heads(dt[..., None])
        dlog = torch.empty_like(steps, dtype=wide(x))
        views = run.heads(dx), run.heads(ddt[..., None]), run.keys(dB), run.keys(dC), dlog
        for block in run.blocks(x, dt, A, B, C, backward=True):
            first, count = run.chunk + block.chunks.start, len(block.x)
            dstates = take("dstates", count + 1, *states.shape[1:])
            dstates[count] = dstate
            grads = [value[block.chunks] for value in views]
            _backward_block(block, D, states[first : first + count], dstates, q[block.chunks], grads, dD, own, take)
            dstate = dstates[0]
        # l_t sums the log decays dt A up to t: that of token s is in every l_t with t >= s.
        ddecay = dlog.flip(-2).cumsum(-2).flip(-2)
        dA += (ddecay * steps).sum((0, 1, 4, 5)).flatten()
        views[1].add_(ddecay * A.view(groups, -1, 1, 1))
    return dx, ddt, dA, dB, dC, dD, _public(dstate)


def _backward_block(
    block: Block,
    D: torch.Tensor | None,
    states: torch.Tensor,
    dstates: torch.Tensor,
    dy: torch.Tensor,
    grads: list[torch.Tensor],
    dD: torch.Tensor,
    own: bool,
    take: Scratch,
) -> None:
    """Fill `grads`, those of x, dt (but for its way through l), B, C and l, and `dstates[:-1]`; adds to dD."""
    x, dt, reads, writes = block.x, block.dt, block.C, block.B
    *outer, repeat, length, channels = x.shape
    width, columns = writes.shape[2], repeat * channels
    by_column, flat = (*outer, length, repeat, channels), (-1, length, columns)
    dx, ddt, dB, dC, dlog = grads
    q = take("q", *x.shape).copy_(dy)
    du, dscores, through = _backward_inside(block, q, own, take)

    # What read the entering state: exp(l_t) C_t S.
    qs = torch.mul(q.transpose(3, 4), block.start.transpose(3, 4), out=take("columns", *by_column))
    entering, leaving = states.reshape(-1, width, columns), dstates[1:].view(-1, width, columns)
    keys = torch.bmm(dscores, writes, out=take("keys", *reads.shape))
    dC.copy_(keys.baddbmm_(qs.view(flat), entering.mT).view(dC.shape))
    torch.bmm(reads.mT, qs.view(flat), out=dstates[:-1].view(-1, width, columns))
    for index in reversed(range(len(x))):
        dstates[index].addcmul_(block.whole[index], dstates[index + 1])
    other = take("more columns", *by_column)
    torch.bmm(reads, entering, out=other.view(flat))
    through += other.mul_(qs).sum(-1).mT

    # What wrote the leaving state: exp(l_end - l_s) B_s u_s^T.
    us = torch.mul(x.transpose(3, 4), (block.end * dt).transpose(3, 4), out=qs)
    torch.bmm(dscores.mT, reads, out=keys)
    dB.copy_(keys.baddbmm_(us.view(flat), leaving.mT).view(dB.shape))
    torch.bmm(writes, leaving, out=other.view(flat))
    du += other.mul_(block.end.transpose(3, 4)).transpose(3, 4)
    ending = (other.mul_(x.transpose(3, 4)).sum(-1).mT * dt[..., 0]).to(through.dtype)
    held = torch.mul(states, dstates[1:], out=take("product", *states.shape)).sum((3, 5)) * block.whole[..., 0, :, 0]
    through -= ending
    through[..., -1] += ending.sum(-1) + held

    dlog.copy_(through[..., None])
    torch.mul(du, dt, out=dx)
    if D is not None:
        dx.addcmul_(q, D.view(outer[2], repeat, 1, 1))
        dD += q.mul_(x).sum((0, 1, 4, 5)).flatten()
    ddt.copy_(du.mul_(x).sum(-1, keepdim=True))


def _backward_inside(
    block: Block, q: torch.Tensor, own: bool, take: Scratch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward of the masked attention inside the chunks, given q, the gradient of y.

    Returns:
        du `[k, B, G, R, L, P]`, the gradients of C_t . B_s `[k B G, L, L]` and of l `[k, B, G, R, L]`.
    """
    *_, length, channels = q.shape
    decay, shared = segment_decay(block, own, take), scores(block, take)
    u = torch.mul(block.x, block.dt, out=take("u", *q.shape))
    flat_u, flat_q = u.view(-1, length, channels), q.view(-1, length, channels)
    dscores = take("dscores", *decay.shape)
    torch.bmm(flat_q, flat_u.mT, out=dscores.view(-1, length, length))
    dscores.mul_(decay)
    torch.bmm(decay.mul_(shared).view(-1, length, length).mT, flat_q, out=flat_u)
    # What runs through l_t - l_s. Summed wide: l_t gains what l_s loses, and a decay's gradient is a difference of
    # such sums, in which the largest terms cancel.
    through = torch.mul(dscores, shared, out=take("through", *decay.shape, dtype=wide(q)))
    return u, dscores.sum(3).view(-1, length, length), through.sum(-1) - through.sum(-2)


def _public(state: torch.Tensor) -> torch.Tensor:
    """`[B, G, N, R, P]` to `[B, H, P, N]`, a copy."""
    return state.permute(0, 1, 3, 4, 2).flatten(1, 2).clone(memory_format=torch.contiguous_format)


# Two opaque operators: torch.compile puts one call into its graph instead of unrolling the chunks, and autograd saves
# the inputs and the states only.
def _namespace() -> str:
    """Return a name that is this module's own: a checkpoint may bring another copy of this file, or load one a second
    time. torch reads it as ASCII, and the name of a checkpoint's folder, which is part of `__name__`, may hold any
    letter."""
    name = re.sub(r"\W", "_", __name__, flags=re.ASCII)
    while hasattr(getattr(torch.ops, name), "scan"):
        name += "_"
    return name


_NAMESPACE = _namespace()
_TENSORS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D"
_scan = torch.library.custom_op(
    f"{_NAMESPACE}::scan",
    _forward,
    mutates_args=(),
    schema=f"({_TENSORS}, Tensor? initial_state, int chunk_size, bool own, bool keep) -> (Tensor, Tensor, Tensor)",
)
_scan_backward = torch.library.custom_op(
    f"{_NAMESPACE}::scan_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor dfinal, {_TENSORS}, Tensor states, int chunk_size, bool own)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_scan.register_fake
def _(x, dt, A, B, C, D, initial_state, chunk_size, own, keep):
    (rows, tokens, heads, channels), (groups, width) = x.shape, B.shape[2:]
    chunks = -(-tokens // chunk_size) + 1 if keep else 0
    states = x.new_empty(chunks, rows, groups, width, heads // groups, channels)
    return x.new_empty(x.shape), x.new_empty(rows, heads, channels, width), states


@_scan_backward.register_fake
def _(dy, dfinal, x, dt, A, B, C, D, states, chunk_size, own):
    dD = x.new_empty(0 if D is None else len(D))
    return *(value.new_empty(value.shape) for value in (x, dt, A, B, C)), dD, x.new_empty(dfinal.shape)


def _setup_context(ctx, inputs, output):
    *tensors, initial_state, ctx.chunk_size, ctx.own, _ = inputs
    ctx.skip, ctx.started = tensors[-1] is not None, initial_state is not None
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # or it would fill zeros for the states


def _backward_of_scan(ctx, dy, dfinal, _):
    saved = ctx.saved_tensors  # once: gradient checkpointing hands them out one time only
    x, B = saved[0], saved[3]
    if dy is None:
        dy = x.new_zeros(x.shape)
    if dfinal is None:
        dfinal = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])
    *grads, dD, dinitial = _scan_backward(dy, dfinal, *saved, ctx.chunk_size, ctx.own)
    return *grads, dD if ctx.skip else None, dinitial if ctx.started else None, None, None, None


_scan.register_autograd(_backward_of_scan, setup_context=_setup_context)
