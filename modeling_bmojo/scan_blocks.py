"""How the chunked scan cuts its tensors: runs of equally long chunks, taken a block of chunks at a time.

What is at work on one block stays in the processor's cache, and every block uses the same buffers. `scan_ops` computes.

Shapes: B rows, T tokens, H heads in G groups of R, P channels per head, N state channels, n chunks of L tokens in a
run, k of them in a block. Heads stand as (G, R), so that the keys B and C broadcast instead of repeating.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch


# Bytes at work in one block. CPU: an L2 cache and some of the L3; accelerators: enough for few, large launches.
WORKING_SET = {"cpu": 4 << 20}
WORKING_SET_ELSEWHERE = 256 << 20


class Block(NamedTuple):
    """k chunks of a run. With l the log decays summed from a chunk's start, l_t up to token t and l_end over all:"""

    chunks: slice
    x: torch.Tensor  # [k, B, G, R, L, P]
    dt: torch.Tensor  # [k, B, G, R, L, 1]
    B: torch.Tensor  # [k B G, L, N]
    C: torch.Tensor  # [k B G, L, N]
    log: torch.Tensor  # l_t / log(2) [k, B, G, R, L]
    start: torch.Tensor  # exp(l_t) [k, B, G, R, L, 1]
    end: torch.Tensor  # exp(l_end - l_t) [k, B, G, R, L, 1]
    whole: torch.Tensor  # exp(l_end) [k, B, G, 1, R, 1]


class Scratch:
    """Buffers by name, shape and dtype, used by one block after another: fresh pages cost more than arithmetic."""

    def __init__(self, like: torch.Tensor):
        self.like = like
        self.buffers = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        key = (name, shape, dtype)
        if key not in self.buffers:
            self.buffers[key] = self.like.new_empty(shape, dtype=dtype)
        return self.buffers[key]


class Run:
    """`count` chunks of `length` tokens, from token `first` and chunk `chunk` on; views tensors of all T by chunk."""

    def __init__(self, first: int, chunk: int, count: int, length: int, groups: int):
        self.tokens = slice(first, first + count * length)
        self.chunk, self.count, self.length, self.groups = chunk, count, length, groups

    def keys(self, value: torch.Tensor) -> torch.Tensor:
        """`[B, T, G, N]` to `[n, B, G, L, N]`, a view."""
        return value[:, self.tokens].unflatten(1, (self.count, self.length)).permute(1, 0, 3, 2, 4)

    def heads(self, value: torch.Tensor) -> torch.Tensor:
        """`[B, T, H, P]` to `[n, B, G, R, L, P]`, a view."""
        value = value[:, self.tokens].unflatten(2, (self.groups, -1)).unflatten(1, (self.count, self.length))
        return value.permute(1, 0, 3, 4, 2, 5)

    def blocks(
        self,
        x: torch.Tensor,
        dt: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        C: torch.Tensor,
        backward: bool = False,
    ) -> Iterator[Block]:
        """Return the blocks, first to last; last to first if `backward`. x `[B, T, H, P]` and so on, as `ssm_ops` has
        them."""
        x, dt, B, C = self.heads(x), self.heads(dt[..., None]), self.keys(B), self.keys(C)
        # Base 2, because exp2 has no slow path for large exponents. Small tensors: decays of the whole run at once.
        rate = A.to(wide(x)).view(self.groups, -1, 1) / math.log(2)
        log = torch.cumsum(dt[..., 0].to(wide(x)) * rate, dim=-1)
        start, end = torch.exp2(log).to(x.dtype)[..., None], torch.exp2(log[..., -1:] - log).to(x.dtype)[..., None]
        whole = start[..., -1, :].unsqueeze(3)
        size = _chunks_per_block(x, B.shape[-1], backward)
        firsts = range(0, self.count, size)
        for first in reversed(firsts) if backward else firsts:
            k = slice(first, min(first + size, self.count))
            writes, reads = (keys[k].reshape(-1, *keys.shape[-2:]) for keys in (B, C))
            yield Block(k, x[k], dt[k], writes, reads, log[k], start[k], end[k], whole[k])


def runs(tokens: int, chunk_size: int, groups: int) -> list[Run]:
    """Return the whole chunks, and the rest if there is one."""
    count, rest = divmod(tokens, chunk_size)
    whole = [Run(0, 0, count, chunk_size, groups)] if count else []
    return whole + ([Run(count * chunk_size, count, 1, rest, groups)] if rest else [])


def segment_decay(block: Block, own: bool, take: Scratch) -> torch.Tensor:
    """exp of the log decays in (s, t] for s <= t (s < t without `own`), else 0: `[k, B, G, R, L, L]`.

    Summed logs would lose digits in their difference: it is formed in their wide dtype and rounded once. Above the
    diagonal it is positive and may overflow: that is why those entries are overwritten, not multiplied by 0.
    """
    log = block.log
    out = torch.sub(log[..., :, None], log[..., None, :], out=take("decay", *log.shape, log.shape[-1]))
    return out.exp2_().tril_(0 if own else -1)


def scores(block: Block, take: Scratch) -> torch.Tensor:
    """C_t . B_s, shared by the heads of a group: `[k, B, G, 1, L, L]`."""
    length = block.C.shape[1]
    out = take("scores", *block.log.shape[:3], 1, length, length)
    torch.bmm(block.C, block.B.mT, out=out.view(-1, length, length))
    return out


def wide(x: torch.Tensor) -> torch.dtype:
    """Return the dtype that log decays are summed in: float64, which Apple's GPUs do not have."""
    return x.dtype if x.device.type == "mps" else torch.float64


def _chunks_per_block(x: torch.Tensor, width: int, backward: bool) -> int:
    """How many chunks of x `[n, B, G, R, L, P]` fit the working set, by the buffers of each size that are in use."""
    *_, length, channels = x.shape
    squares, lines, states = (2, 6, 3) if backward else (1, 3, 1)
    size = squares * length * length + lines * length * channels + states * width * channels
    size *= math.prod(x.shape[1:4]) * x.element_size()
    return max(1, WORKING_SET.get(x.device.type, WORKING_SET_ELSEWHERE) // size)
