"""Padding and packing: from the columns of a batch to rows of consecutive real tokens, and back.

What mixes a sequence (convolution, scan, window, eidetic memory) sees nothing but rows whose real tokens come first,
with a count per row. So left, right and inner padding are one case, a packed batch is just more rows, and every row
equals itself alone by construction; pads cannot enter a state because they are not there.

Everything that treats each token by itself (projections, gates, norms) runs on the columns as the user gave them, pads
included: what others hook onto these modules finds each token where the user put it.

Shapes: B rows and T columns of the input, R and T' those of a group of mixer rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


class RowGroup(NamedTuple):
    """Mixer rows of similar length.

    index: `[R, T']`, which of the B T columns (flattened) stands where; B T for a place that holds no token.
    lengths: `[R]`, real tokens per row; they come first.
    """

    index: torch.Tensor
    lengths: torch.Tensor


class RowLayout(NamedTuple):
    """How an input `[B, T]` is cut into mixer rows.

    place: `[B, T]`, where each column stands among the flattened places of all groups; their number for a pad.
    packed: the rows are sequences inside the input's rows.
    """

    groups: list[RowGroup]
    place: torch.Tensor
    packed: bool

    @property
    def columns(self) -> int:
        return self.place.shape[1]

    @property
    def longest(self) -> int:
        """Return tokens of the widest group."""
        return max(group.index.shape[1] for group in self.groups)

    def split(self, value: torch.Tensor) -> list[torch.Tensor]:
        """`[B, T, ...]` to one `[R, T', ...]` per group; places without a token are zero."""
        flat = _with_zero([value.flatten(0, 1)])
        return [_taken(flat, group.index) for group in self.groups]

    def merge(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Return the inverse of `split`: one `[R, T', ...]` per group to `[B, T, ...]`; pads are zero."""
        return _taken(_with_zero([part.flatten(0, 1) for part in parts]), self.place)

    def merge_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """Attention weights `[R, H, T', S]` of the only group to `[B, H, T, S]`: queries in the input's order, and keys
        too unless a cache holds some."""
        by_query = self.merge([weights.transpose(1, 2)])
        if weights.shape[-1] == self.columns:
            by_query = self.merge([by_query.transpose(1, 3)]).transpose(1, 3)
        return by_query.transpose(1, 2)


class Turns(NamedTuple):
    """RoPE at distances that are not the tokens' own.

    turn: from positions to cos and sin `[..., R]` without scaling, the first half of sin negated. at_window, at_limit:
    the tables `[R]` of the distances W and D_max, with the scaling of the tokens' own; None where nobody asks.
    """

    turn: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    at_window: tuple[torch.Tensor, torch.Tensor] | None
    at_limit: tuple[torch.Tensor, torch.Tensor] | None


class Rows(NamedTuple):
    """The mixer rows of a forward call.

    layout: None if the input's rows are the mixer's rows as they stand.
    lengths: per group, `[R]` real tokens, or None if all are. rotary: per group, cos and sin `[R, T', 1, D]`, or None
        without positions.
    columns: columns of the attention weights, None if they are not wanted. turns: what storage and far distances need,
    or None.
    """

    layout: RowLayout | None
    lengths: list[torch.Tensor | None]
    rotary: list[tuple[torch.Tensor, torch.Tensor] | None]
    columns: int | None
    turns: Turns | None = None


def _with_zero(parts: list[torch.Tensor]) -> torch.Tensor:
    """`[n, ...]` each to one, with an entry of zeros at the end."""
    return torch.cat([*parts, parts[0].new_zeros(1, *parts[0].shape[1:])])


def _taken(flat: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """flat[index], `[n, ...]` to `[*index.shape, ...]`; twice as fast as that, and in the backward pass too."""
    return flat.index_select(0, index.flatten()).unflatten(0, index.shape)


def _layout(groups: list[RowGroup], mask: torch.Tensor, packed: bool) -> RowLayout:
    """Return the layout of these groups, whose `place` is the inverse of their indices."""
    index = torch.cat([group.index.flatten() for group in groups])
    place = index.new_full((mask.numel() + 1,), len(index))
    place[index] = torch.arange(len(index), device=index.device)
    return RowLayout(groups, place[:-1].view(mask.shape), packed)


def to_rows(layout: RowLayout | None, value: torch.Tensor) -> list[torch.Tensor]:
    """Return columns `[B, T, ...]` to one `[R, T', ...]` per group of mixer rows; without a layout they are the only
    group."""
    return [value] if layout is None else layout.split(value)


def to_columns(layout: RowLayout | None, parts: list[torch.Tensor]) -> torch.Tensor:
    """Return the inverse of `to_rows`."""
    return parts[0] if layout is None else layout.merge(parts)


def padded_layout(mask: torch.Tensor) -> RowLayout:
    """Layout of a padded batch: every row's real tokens first, in their order.

    Args:
        mask: `[B, T]` bool, True for real tokens, in any pattern.
    """
    batch, columns = mask.shape
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    lengths = mask.sum(dim=1)
    rows = torch.arange(batch, device=mask.device)[:, None]
    real = torch.arange(columns, device=mask.device) < lengths[:, None]
    index = torch.where(real, rows * columns + order, batch * columns)
    return _layout([RowGroup(index, lengths)], mask, packed=False)


def packed_layout(starts: torch.Tensor, mask: torch.Tensor) -> RowLayout:
    """Layout of packed sequences: each becomes a row of its own; rows are grouped by length to waste little.

    Args:
        starts: `[B, T]` bool, True at the first token of every sequence. mask: `[B, T]` bool, True for real tokens.
    """
    batch, columns = mask.shape
    sequences: list[list[int]] = []
    for row, (row_starts, row_mask) in enumerate(zip(starts.tolist(), mask.tolist())):
        for column, (start, real) in enumerate(zip(row_starts, row_mask)):
            if not real:
                continue
            if start:
                sequences.append([])
            sequences[-1].append(row * columns + column)
    # Lengths within a factor of two share a group: at most half of its places are empty.
    by_size: dict[int, list[list[int]]] = {}
    for sequence in sequences:
        by_size.setdefault(len(sequence).bit_length(), []).append(sequence)
    groups = []
    for _, members in sorted(by_size.items()):
        width = max(map(len, members))
        padded = [member + [batch * columns] * (width - len(member)) for member in members]
        index = torch.tensor(padded, device=mask.device)
        groups.append(RowGroup(index, torch.tensor([len(member) for member in members], device=mask.device)))
    return _layout(groups, mask, packed=True)


def sequence_starts(
    batch: int,
    columns: int,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
) -> torch.Tensor | None:
    """Where packed sequences begin, `[B, T]` bool, or None if every row is one sequence.

    Read from `seq_idx` `[B, T]` (a change of value), `cu_seq_lens` (cumulated lengths over the flattened batch) or
    `position_ids` `[B, T]` (a real token whose position is not beyond that of the real token before it: trainers that
    pack send only these. Positions may skip ahead within a sequence).

    Raises:
        ValueError: if `cu_seq_lens` does not run from 0 to B T in steps of at least 1.
    """
    if seq_idx is not None:
        change = seq_idx[:, 1:] != seq_idx[:, :-1]
    elif cu_seq_lens is not None:
        bounds = cu_seq_lens.flatten().tolist()
        if bounds[0] != 0 or bounds[-1] != batch * columns or bounds != sorted(set(bounds)):
            raise ValueError(
                f"cu_seq_lens_q={bounds}: must rise from 0 to the number of tokens, {batch * columns}; give the "
                "cumulated lengths of the packed sequences."
            )
        starts = torch.zeros(batch * columns, dtype=torch.bool, device=cu_seq_lens.device)
        starts[torch.tensor(bounds[:-1], device=starts.device)] = True
        change = starts.view(batch, columns)[:, 1:]
    elif position_ids is not None and position_ids.shape[-1] > 1:
        change = _goes_back(position_ids.expand(batch, -1), mask)
    else:
        return None
    real = torch.ones(batch, columns, dtype=torch.bool, device=change.device) if mask is None else mask
    # The first real token of a row always starts a sequence; a pad never does.
    seen_before = (real.cumsum(1) - real.to(torch.int64))[:, 1:] > 0
    inner = change & real[:, 1:] & seen_before
    if not bool(inner.any()):
        return None
    return torch.cat([real[:, :1], inner | (real[:, 1:] & ~seen_before)], dim=1)


def _goes_back(position_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Whether the position of column t + 1 is at most that of the last real token up to column t, `[B, T - 1]` bool."""
    before = position_ids[:, :-1]
    if mask is not None:
        columns = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, columns, 0).cummax(dim=1).values[:, :-1]
        before = position_ids.gather(1, last.to(position_ids.device))
    return position_ids[:, 1:] <= before
