"""Which columns a cache has read as pads, in constant memory: a fingerprint per row.

    pads[b] = sum over the pad columns c of row b of code(c)   (mod 2^64)

code is a fixed mixing of 64 bits (splitmix64), so two sets of columns with equal sums do not occur by accident.
Together with the number of columns it tells whether a mask is the one that was read. A row without pads has 0,
so text without pads costs nothing.

Shapes: B batch, T new columns, P columns read before.
"""

import torch


# splitmix64's constants, as the signed numbers that torch's int64 holds.
STEP, FIRST, SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def column_codes(columns: torch.Tensor) -> torch.Tensor:
    """Return codes of column numbers, int64 to int64 of the same shape."""
    mixed = columns * STEP + STEP
    mixed = (mixed ^ _shifted(mixed, 30)) * FIRST
    mixed = (mixed ^ _shifted(mixed, 27)) * SECOND
    return mixed ^ _shifted(mixed, 31)


def _shifted(value: torch.Tensor, by: int) -> torch.Tensor:
    """Return a shift to the right that fills in zeros; torch's own fills in the sign."""
    return (value >> by) & ((1 << (64 - by)) - 1)


def pads_in(mask: torch.Tensor, start: int | torch.Tensor) -> torch.Tensor:
    """Fingerprint `[B]` int64 of the pads in mask `[B, T]` bool, True = real, whose first column is number `start`, or
    `[1]`.

    No step depends on values, so that it can be compiled.
    """
    columns = start + torch.arange(mask.shape[1], device=mask.device)
    return (column_codes(columns) * ~mask).sum(dim=1)


def check_past_mask(
    mask: torch.Tensor, columns: int, seen: torch.Tensor, pads: torch.Tensor | None, known: bool
) -> None:
    """Raise ValueError unless a mask tells of the past what a cache has read.

    Args:
        mask: `[B, P]`, nonzero = real token. columns: read by the cache. seen: `[B]` real tokens of each row.
        pads: `[B]` fingerprint, None if there is none: `known` says that no pad was read, else nothing is known and
            the number of tokens alone is compared.
    """
    if mask.dim() != 2 or mask.shape != (seen.shape[0], columns):
        raise ValueError(
            f"attention_mask: the part for what the cache has read is of shape {list(mask.shape)} but must be "
            f"[{seen.shape[0]}, {columns}]; pass the mask of everything, or of the new columns alone."
        )
    real = mask.to(torch.bool)
    if pads is None and known and bool(real.all()):
        return
    counts = real.sum(dim=1)
    wrong = counts != seen.to(counts.device)
    if pads is not None:
        # Pads are fewer than columns: their codes alone, where `pads_in` would form every column's.
        rows, where = (~real).nonzero(as_tuple=True)
        stated = torch.zeros_like(counts).index_add(0, rows, column_codes(where))
        wrong = wrong | (stated != pads.to(counts.device))
    if not bool(wrong.any()):
        return
    row = int(wrong.to(torch.int8).argmax())
    said, read = int(counts[row]), int(seen[row])
    found = f"has read {read}" if said != read else f"has read {read} in other columns"
    raise ValueError(
        f"attention_mask[{row}] calls {said} of the {columns} columns before the new ones real tokens, but the cache "
        f"{found}; what was read cannot be taken back. Pass the mask that it was read with (a row that ended in "
        "generate() has read the token that ended it, and no pads behind it), or a mask of the new columns alone, or "
        "read the text anew."
    )
