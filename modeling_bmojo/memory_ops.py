"""Eidetic memory: which tokens a layer keeps, as pure functions, and the formulas of the innovation tests.

    e_t  = |y_t - y_hat_t|^2 / (|y_t|^2 + |y_hat_t|^2 + eps)          innovation   (B'MOJO, Algorithm 1, line 3);
                                                                       y_t the SSM's output, its input, or the key
    key_t = e_t, or log e_t + g t when scores fade as exp(-g age)      retention key
    expiry_s = W + max(s, p_s)                                         the query from which on token s is out of sight

p_s is the position of the M-th earliest token whose key beats that of token s (infinite if fewer than M do). It is the
closed form of "a token that leaves the window replaces the smallest stored innovation if it beats it": the set of
inputs that query t may see is exactly { s : s <= t < expiry_s }. Ties: the older token stays.

Shapes: B batch, T tokens, S = tokens that may be kept, W window, M slots, L block length.
"""

import heapq
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


INNOVATION_EPS = 1e-12
INNOVATION_BLOCK = 512  # tokens predicted at once on a CPU, so that they stay in its cache
KEY_BLOCK = 1024  # keys predicted at once, in float64
ROUNDING = 1e-11  # errors of keys below it are fp32's rounding
APPLY = 128  # tokens that apply for the memory at once
NEVER = torch.iinfo(torch.int64).max // 4  # an expiry beyond any position, with room for sums


OverDevices = Callable[[torch.Tensor], torch.Tensor] | None


def prediction_error(value: torch.Tensor, prediction: torch.Tensor, total: OverDevices = None) -> torch.Tensor:
    """Scale-free squared error over the last dimension, in [0, 2]; fp32 at least.

    Scale-free, because an absolute error keeps the loud tokens instead of the unexpected ones (docs/log.md).

    Args:
        total: the sum over devices that each have a part of the last dimension; None: it is whole.
    """
    value, prediction = at_least_fp32(value), at_least_fp32(prediction)
    squares = [torch.linalg.vector_norm(x, dim=-1).square() for x in (value - prediction, value, prediction)]
    missed, own, expected = squares if total is None else total(torch.stack(squares)).unbind()
    return missed / (own + expected + INNOVATION_EPS)


def output_innovation(y: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
    """`innovation="output"`: y_hat_t is the mean of the last k outputs, zeros before the first (a causal conv).

    Args:
        y: `[B, T, E]` SSM outputs. history: `[B, k, E]` the outputs before them, oldest first, zeros where none was.

    Returns:
        e `[B, T]`.
    """
    taps, tokens = history.shape[1], y.shape[1]
    history, y = at_least_fp32(history), at_least_fp32(y)
    if tokens == 1:
        return prediction_error(y, history.mean(dim=1, keepdim=True))
    if y.device.type != "cpu" or torch.compiler.is_compiling():
        return _error_of_mean(torch.cat([history, y], dim=1), taps)
    size = max(INNOVATION_BLOCK, taps)
    errors = []
    for first in range(0, tokens, size):
        before = y[:, first - taps : first] if first else history
        errors.append(_error_of_mean(torch.cat([before, y[:, first : first + size]], dim=1), taps))
    return torch.cat(errors, dim=1) if errors else y.new_zeros(y.shape[:2])


def key_innovation(
    keys: torch.Tensor, total: torch.Tensor, count: torch.Tensor, average: OverDevices = None
) -> torch.Tensor:
    """`innovation="key"`: k_hat_t is the mean of all keys before token t, zeros before the first.

    Args:
        keys: `[B, T, G, D]` keys without positions. total: `[B, G, D]` the sum of the keys before them, in float64
            where the device has it, so that equal keys have equal means. count: `[B]` how many those were.
        average: the mean over devices that each have as many of the heads; None: all heads are here.

    Returns:
        e `[B, T]`, the mean over the heads.
    """
    tokens, errors = keys.shape[1], []
    size = tokens if torch.compiler.is_compiling() else KEY_BLOCK
    for first in range(0, tokens, max(size, 1)):
        part = at_least_fp32(keys if tokens <= size else keys[:, first : first + size])
        wide = part.to(total.dtype)
        before = total[:, None] + wide.cumsum(dim=1) - wide if part.shape[1] > 1 else total[:, None]
        number = count[:, None]
        if tokens > 1:
            number = number + torch.arange(first, first + part.shape[1], device=keys.device)
        mean = (before / number.clamp(min=1)[..., None, None]).to(part.dtype)
        errors.append(prediction_error(part, mean).mean(dim=-1))
        if first + size < tokens:
            total = total + wide.sum(dim=1)
    error = keys.new_zeros(keys.shape[:2]) if not errors else torch.cat(errors, 1) if errors[1:] else errors[0]
    error = error if average is None else average(error)
    # One token repeated: what rounding leaves must not decide against "ties: the older token stays".
    return error.masked_fill(error < ROUNDING, 0.0)


def _error_of_mean(values: torch.Tensor, taps: int) -> torch.Tensor:
    """Error of predicting each token but the first k by the mean of the k before it: `[B, k + T, E]` to `[B, T]`."""
    tokens = values.shape[1] - taps
    prediction = values[:, :tokens] / taps
    for tap in range(1, taps):
        prediction.add_(values[:, tap : tap + tokens], alpha=1 / taps)
    return prediction_error(values[:, taps:], prediction)


def presence(innovation: torch.Tensor, gain: float) -> torch.Tensor:
    """One for every token, with a gradient for its innovation: `gain` times that of the factor it stands for.

    Selection is discrete: no gradient says what a choice costs. A kept token's value is multiplied by this, which
    changes nothing, and its innovation learns whether more of that value would have helped (a straight-through
    estimator): what is of use comes to surprise, what is in the way comes to be expected.
    """
    return 1 + gain * (innovation - innovation.detach())


def retention_key(innovation: torch.Tensor, clock: torch.Tensor, decay: float) -> torch.Tensor:
    """Return the static key whose order is the order of the faded scores e_s exp(-g (t - s)) at every t. `[B, S]`.

    All scores fade at one rate, so their order never changes: log e_s + g s needs no updating. In float64 (float32
    where the device has none): g s grows with the stream, the difference that decides does not. clock: s, the token's
    position, or whatever else never runs back and is the same for all tokens of a row.
    """
    if decay == 0:
        return _nan_last(innovation)
    wide = widest(innovation.device)
    return _nan_last(torch.log(innovation.to(wide)) + decay * clock.to(wide))


def _nan_last(keys: torch.Tensor) -> torch.Tensor:
    """Return keys whose NaN are weaker than every number; torch_xla's `nan_to_num` takes no infinity."""
    return keys.masked_fill(keys.isnan(), -torch.inf)


def heap_expiry(keys: list[float], window: int, slots: int) -> list[float]:
    """Expiry of every token of one row by streaming with a heap: the oracle, O(T log M).

    Args:
        keys: retention keys, one per token. window: W. slots: M.

    Returns:
        expiries, `math.inf` for tokens that are still kept at the end.
    """
    expiry = [float("inf")] * len(keys)
    memory: list[tuple[float, int]] = []
    for leaving, key in enumerate(keys):
        # The weakest is the smallest key, and among equals the youngest: (key, -position) is its heap order.
        heapq.heappush(memory, (key, -leaving))
        if len(memory) > slots:
            _, weakest = heapq.heappop(memory)
            expiry[-weakest] = leaving + window
    return expiry


def blocked_expiry(keys: torch.Tensor, window: int, slots: int, block: int = 128) -> torch.Tensor:
    """Expiry of every token of a whole stream, `[B, T]` keys to `[B, T]` int64, `NEVER` for tokens kept at the end."""
    tokens = keys.shape[1]
    valid = torch.ones_like(keys, dtype=torch.bool)
    return select(keys, valid, window, slots, block, queries=tokens + window).expiry


class Selection(NamedTuple):
    """Which tokens the queries of a stretch may see.

    expiry: `[B, S]`, the query from which on a token is out of sight; `NEVER` if none yet, negative if it is no token.
    slots: `[B, n, M]`, indices into S of the tokens kept when each block of queries starts, -1 = empty slot.
    """

    expiry: torch.Tensor
    slots: torch.Tensor


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
    """Run the eidetic memory over a stretch of tokens, `block` queries at a time: no loop over tokens.

    The S tokens are listed from old to new: `held` tokens that are in the memory already, `past` tokens in the window,
    then the new ones. Token i has the coordinate `i - held - past`, so the first new token and its query are at 0.

    Args:
        keys: `[B, S]` retention keys. valid: `[B, S]`, False for pads and empty slots: never kept, never seen.
        window: W. slots: M. block: L. queries: T, which may be more than the new tokens.
        past: tokens of the window in front of the new ones; W, fewer at the start of a text (then `held` is 0).

    Returns:
        a `Selection` with ceil(T / L) blocks.
    """
    batch, tokens = keys.shape
    first = -held - past
    # One column more than tokens: a place to write what empty slots would write.
    expiry = torch.full((batch, tokens + 1), NEVER, dtype=torch.int64, device=keys.device)
    if slots == 0:
        expiry[:, :tokens] = torch.arange(tokens, device=keys.device) + first + window
    memory = torch.arange(slots, device=keys.device).expand(batch, slots)
    memory = torch.where((memory < held) & F.pad(valid, (0, slots))[:, :slots], memory, -1)

    def admit(upto: int, starts: range) -> torch.Tensor:
        """Let the tokens apply that have left by query `upto`; the memory at the queries `starts`, `[B, k, M]`."""
        nonlocal done
        leaving = min(upto - window - first + 1, tokens)
        if slots == 0 or leaving <= done:
            return memory[:, None].expand(-1, len(starts), -1)
        index, out_at = _apply(keys, valid, expiry, memory, range(done, leaving), window, first)
        done = leaving
        return _held_at(
            index,
            out_at,
            torch.arange(starts.start, starts.stop, starts.step, device=keys.device),
            window + first,
            slots,
        )

    at_block, done = [], held
    # Several blocks apply at once: what costs is the number of operations, not their size.
    stride = max(block, APPLY // block * block)
    for query in range(0, queries, stride):
        starts = range(query, min(query + stride, queries), block)
        at_block.append(admit(starts[-1], starts))
        memory = at_block[-1][:, -1]
    admit(queries - 1, range(queries - 1, queries))
    return Selection(torch.where(valid, expiry[:, :tokens], -NEVER), torch.cat(at_block, dim=1))


def _apply(
    keys: torch.Tensor,
    valid: torch.Tensor,
    expiry: torch.Tensor,
    memory: torch.Tensor,
    leaving: range,
    window: int,
    first: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens `leaving` the window apply for the memory, in their order; writes `expiry`.

    Candidates c are the kept tokens and the leaving ones, from old to new. Candidate s is out once M candidates that
    have left the window beat it, so one cumulated count of a comparison matrix `[B, c, c]` settles them all.

    Returns:
        the candidates `[B, c]` as indices, and the expiry of each, `-NEVER` if it is no token.
    """
    batch, slots = memory.shape
    count = len(leaving)
    newcomers = torch.arange(leaving.start, leaving.stop, device=keys.device).expand(batch, count)
    index = torch.cat([memory, newcomers], dim=1)
    known = torch.cat([memory >= 0, valid[:, leaving.start : leaving.stop]], dim=1)
    key = keys.gather(1, index.clamp(min=0))

    older = torch.ones(slots + count, slots + count, dtype=torch.bool, device=keys.device).tril(-1)
    rival, own = key[:, None, :], key[:, :, None]
    beaten_by = ((rival > own) | ((rival == own) & older)) & known[:, None, :]
    by_kept = beaten_by[:, :, :slots].sum(-1, keepdim=True)
    beaten = by_kept + beaten_by[:, :, slots:].cumsum(-1)
    survived = (beaten < slots).sum(-1)  # leaving tokens that came and went before this candidate was out

    out_at = torch.maximum(index, leaving.start + survived) + first + window
    out_at = torch.where(survived == count, NEVER, out_at)
    expiry.scatter_(1, torch.where(known, index, expiry.shape[1] - 1), out_at)
    return index, torch.where(known, out_at, -NEVER)


def _held_at(index: torch.Tensor, out_at: torch.Tensor, starts: torch.Tensor, lag: int, slots: int) -> torch.Tensor:
    """Return the memory at each query of `starts` `[k]`, oldest token first: `[B, k, M]` indices, -1 = empty.

    Args:
        index, out_at: `[B, c]` the M kept tokens and the leaving ones, and their expiries.
        lag: token i leaves the window at query i + lag.
    """
    query, count = starts[:, None], index.shape[1]
    order = torch.arange(count, device=index.device)
    left = (order < slots) | (index[:, None] + lag <= query)
    held = left & (out_at[:, None] > query)
    place = torch.where(held, order, count).sort(dim=-1).values[..., :slots]
    return F.pad(index, (0, 1), value=-1)[:, None].expand(-1, len(starts), -1).gather(2, place)


def widest(device: torch.device) -> torch.dtype:
    """float64, or float32 on the one device that has no wider numbers."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower: what sums are formed in."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def at_least_fp32(value: torch.Tensor) -> torch.Tensor:
    """Return the value in its `wide_dtype`."""
    return cast(value, wide_dtype(value.dtype))


def cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`value.to(dtype)`; a step asks for it so often that it shows where there is nothing to do."""
    return value if value.dtype == dtype else value.to(dtype)
