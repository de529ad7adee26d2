"""Whether states can be what some text left in a layer: names, sizes and dtypes first, values then.

Checked when a file is read, because a checksum only says that it is as somebody wrote it, and when one is written, so
that what is saved can be loaded. What a layer's states are is declared by its memories, and what they may hold is
theirs to check (`MemoryPart.check`).

Shapes: B rows.
"""

import torch

from .cache_layer_bmojo import BMojoCacheLayer


Table = dict[str, tuple[list[int], torch.dtype]]  # state -> shape and dtype
KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tables(layers: list[BMojoCacheLayer], tables: list[Table], columns: int, optional: frozenset[str]) -> None:
    """Raise ValueError unless these are the states of `layers` after `columns` columns, by their description.

    Args:
        optional: states that may be missing where another layer of this kind would hold them.
    """
    if "seen" not in tables[0] or len(tables[0]["seen"][0]) != 1 or tables[0]["seen"][0][0] == 0:
        raise ValueError("layer 0: the state 'seen' is missing or is not one number for each of at least one row")
    batch = tables[0]["seen"][0][0]
    for index, (layer, table) in enumerate(zip(layers, tables)):
        try:
            expected = _expected(layer, table, batch, index == 0, index == len(layers) - 1)
            _check_table(layer, table, expected, optional)
            _check_grown(layer, table, columns)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error


def _expected(layer: BMojoCacheLayer, table: Table, batch: int, first: bool, last: bool) -> Table:
    """Return names, shapes and dtypes. Allocates nothing: the states are made on the meta device."""
    kind = layer.memory.dtype({name: dtype for name, (_, dtype) in table.items()})
    if kind not in KINDS:
        raise ValueError(f"states of dtype {kind}: must be one of {[str(kind) for kind in KINDS]}")
    expected = {"seen": ([batch], torch.int64)}
    for name, state in layer.memory.declared.items():
        if state.saved:
            new = state.new(batch, kind, torch.device("meta"))
            expected[name] = (list(new.shape), new.dtype)
    if first:
        expected["pads"] = ([batch], torch.int64)
    if last:
        expected["last_hidden"] = ([batch, layer.memory.hidden], table.get("last_hidden", (None, kind))[1])
    return expected


def _check_table(layer: BMojoCacheLayer, table: Table, expected: Table, optional: frozenset[str]) -> None:
    unknown, missing = set(table) - set(expected), set(expected) - set(table) - optional
    if unknown or missing:
        raise ValueError(f"states {sorted(unknown | missing)} are {'unknown' if unknown else 'missing'}")
    for name, (shape, dtype) in table.items():
        state, (wanted, kind) = layer.memory.declared.get(name), expected[name]
        if state is not None and state.grows is not None and len(shape) == len(wanted):
            wanted = [own if axis == state.grows + 1 else size for axis, (own, size) in enumerate(zip(shape, wanted))]
        if shape != wanted:
            raise ValueError(f"the state {name!r} has shape {shape} instead of {wanted}")
        kinds = KINDS if name == "last_hidden" else (kind,)
        if state is not None and state.kind == "widest":
            kinds = (torch.float64, torch.float32)
        if dtype not in kinds:
            raise ValueError(f"the state {name!r} is of dtype {dtype} instead of {' or '.join(map(str, kinds))}")


def _check_grown(layer: BMojoCacheLayer, table: Table, columns: int) -> None:
    declared = layer.memory.declared.items()
    growing = {name: state for name, state in declared if state.grows is not None and name in table}
    for by_token in (True, False):
        found = {n: table[n][0][s.grows + 1] for n, s in growing.items() if (s.needs is None) == by_token}
        short = [name for name, size in found.items() if size < growing[name].entries(columns)]
        if short or len(set(found.values())) > 1:
            names, room = " and ".join(map(repr, found)), sorted(set(found.values()))
            what = "tokens" if by_token else "entries"
            raise ValueError(f"{names} have room for {room} {what} but {columns} columns were read")


@torch.no_grad()
def check_values(
    layers: list[BMojoCacheLayer], states: list[dict[str, torch.Tensor]], columns: int, pads_known: bool
) -> None:
    """Raise ValueError unless the states of all layers, whose tables were checked, fit together.

    Args:
        states: by layer. pads_known: whether the writer kept a fingerprint of the pads, so that none means that there
            were none.
    """
    seen = states[0]["seen"]
    _check_rows(seen, states[0].get("pads"), columns, pads_known)
    for index, (layer, found) in enumerate(zip(layers, states)):
        try:
            if not torch.equal(found["seen"], seen):
                raise ValueError(f"'seen' is {found['seen'].tolist()} but {seen.tolist()} in layer 0")
            for name, value in found.items():
                if value.is_floating_point() and not bool(value.isfinite().all()):
                    raise ValueError(f"the state {name!r} holds NaN or infinity")
            layer.memory.check(found, seen)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error


def _check_rows(seen: torch.Tensor, pads: torch.Tensor | None, columns: int, pads_known: bool) -> None:
    wrong = (seen < 0) | (seen > columns)
    if bool(wrong.any()):
        raise ValueError(f"layer 0: 'seen' is {seen.tolist()}: must lie between 0 and columns={columns}")
    padded = seen != columns
    if pads is None:
        if pads_known and bool(padded.any()):
            raise ValueError(
                f"layer 0: 'seen' is {seen.tolist()} and columns={columns}: the other columns were pads, but the state "
                "'pads' is missing"
            )
        return
    if bool(((pads != 0) != padded).any()):
        raise ValueError(
            f"layer 0: 'pads' is {pads.tolist()} but 'seen' is {seen.tolist()} and columns={columns}: it must be 0 in "
            "rows without pads, and in no other"
        )


__all__ = ["check_tables", "check_values"]
