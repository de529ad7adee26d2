"""Whether states can be what some text left in a layer: names, sizes and dtypes first, values then.

Checked when a file is read, because a checksum only says that it is as somebody wrote it, and when one is written, so
that what is saved can be loaded. What a layer's states are is in `cache_layer_bmojo`; a check here is the rule there.

Shapes: B rows, F fading slots, M eidetic slots, W window.
"""

import torch

from .cache_layer_bmojo import BMojoCacheLayer
from .configuration_bmojo import LayerSpec


Table = dict[str, tuple[list[int], torch.dtype]]  # state -> shape and dtype
KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LARGEST_INNOVATION = 2.01  # 2 by its definition; the rest is rounding


def check_tables(specs: list[LayerSpec], tables: list[Table], columns: int, optional: frozenset[str]) -> None:
    """Raises ValueError unless these are the states of layers of `specs` after `columns` columns, by their description.

    Args:
        optional: states that may be missing where another layer of this kind would hold them.
    """
    if "seen" not in tables[0] or len(tables[0]["seen"][0]) != 1 or tables[0]["seen"][0][0] == 0:
        raise ValueError("layer 0: the state 'seen' is missing or is not one number for each of at least one row")
    batch = tables[0]["seen"][0][0]
    for index, (spec, table) in enumerate(zip(specs, tables)):
        try:
            _check_table(spec, table, _expected(spec, table, batch, index == 0, index == len(specs) - 1), optional)
            if spec.has_attention and spec.window is None:
                _check_grown(table, columns)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error


def _expected(spec: LayerSpec, table: Table, batch: int, first: bool, last: bool) -> Table:
    """Allocates nothing: the layer is made on the meta device."""
    kind = table.get("keys", table.get("conv", (None, None)))[1]
    if kind not in KINDS:
        raise ValueError(f"states of dtype {kind}: must be one of {[str(kind) for kind in KINDS]}")
    model = BMojoCacheLayer(spec)
    model.lazy_initialization(torch.empty(batch, dtype=kind, device="meta"))
    expected = {name: (list(value.shape), value.dtype) for name, value in model.states().items()}
    if first:
        expected["pads"] = ([batch], torch.int64)
    if last:
        expected["last_hidden"] = ([batch, spec.hidden], table.get("last_hidden", (None, kind))[1])
    return expected


def _check_table(spec: LayerSpec, table: Table, expected: Table, optional: frozenset[str]) -> None:
    unknown, missing = set(table) - set(expected), set(expected) - set(table) - optional
    if unknown or missing:
        raise ValueError(f"states {sorted(unknown | missing)} are {'unknown' if unknown else 'missing'}")
    for name, (shape, dtype) in table.items():
        wanted, kind = expected[name]
        if spec.window is None and name in ("keys", "values") and len(shape) == 4:
            wanted = [*wanted[:2], shape[2], wanted[3]]
        if shape != wanted:
            raise ValueError(f"the state {name!r} has shape {shape} instead of {wanted}")
        kinds = {"last_hidden": KINDS, "key_sum": (torch.float64, torch.float32)}.get(name, (kind,))
        if dtype not in kinds:
            raise ValueError(f"the state {name!r} is of dtype {dtype} instead of {' or '.join(map(str, kinds))}")


def _check_grown(table: Table, columns: int) -> None:
    sizes = {table[name][0][2] for name in ("keys", "values")}
    if len(sizes) > 1 or min(sizes) < columns:
        raise ValueError(f"'keys' and 'values' have room for {sorted(sizes)} tokens but {columns} columns were read")


@torch.no_grad()
def check_values(specs: list[LayerSpec], layers: list[dict[str, torch.Tensor]], columns: int, pads_known: bool) -> None:
    """Raises ValueError unless the states of all layers, whose tables were checked, fit together.

    Args:
        pads_known: whether the writer kept a fingerprint of the pads, so that none means that there were none.
    """
    seen = layers[0]["seen"]
    _check_rows(seen, layers[0].get("pads"), columns, pads_known)
    for index, (spec, states) in enumerate(zip(specs, layers)):
        try:
            if not torch.equal(states["seen"], seen):
                raise ValueError(f"'seen' is {states['seen'].tolist()} but {seen.tolist()} in layer 0")
            for name, value in states.items():
                if value.is_floating_point() and not bool(value.isfinite().all()):
                    raise ValueError(f"the state {name!r} holds NaN or infinity")
            if spec.has_attention and spec.window is not None:
                _check_pool(spec, states["positions"][:, spec.fading :], seen)
                _check_fading(spec, states["positions"][:, : spec.fading], seen)
                _check_innovations(spec, states["innovations"])
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


def _check_pool(spec: LayerSpec, positions: torch.Tensor, seen: torch.Tensor) -> None:
    """The last W tokens are there, each once; behind them, older ones, as many as have room."""
    size, seen = spec.slots + spec.window, seen[:, None]
    newest = positions.sort(dim=1, descending=True).values
    rank = torch.arange(size, device=positions.device)
    filled, recent = rank < seen, rank < seen.clamp(max=spec.window)
    rules = {
        "hold a position below -1": newest < -1,
        "hold a position beyond the tokens read": newest >= seen,
        "do not hold as many tokens as there is room for": (newest >= 0) != filled,
        "do not hold the last tokens, each once": recent & (newest != seen - 1 - rank),
        "hold a token twice": filled[:, 1:] & (newest[:, 1:] == newest[:, :-1]),
    }
    _apply(rules, "'positions' of window and memory")


def _check_fading(spec: LayerSpec, positions: torch.Tensor, seen: torch.Tensor) -> None:
    """Slot r holds the newest fading token beyond the window whose number is r mod F, at (number + 1) s - 1."""
    if not spec.fading:
        return
    newest = (seen // spec.stride - spec.delayed - 1)[:, None]
    slot = torch.arange(spec.fading, device=positions.device)
    number = newest - (newest - slot) % spec.fading
    expected = torch.where(number >= 0, (number + 1) * spec.stride - 1, -1)
    _apply({"do not follow from the tokens read": positions != expected}, "'positions' of fading tokens")


def _check_innovations(spec: LayerSpec, innovations: torch.Tensor) -> None:
    rules = {
        "are negative": innovations < 0,
        "are larger than an innovation can be, 2": innovations > LARGEST_INNOVATION,
        "are not 0 for fading tokens": innovations[:, : spec.fading] != 0,
    }
    _apply(rules, "'innovations'")


def _apply(rules: dict[str, torch.Tensor], what: str) -> None:
    """rules: by what is wrong, where it is, `[B, ...]` bool."""
    for wrong, where in rules.items():
        if bool(where.any()):
            row = int(where.flatten(1).any(dim=1).to(torch.int8).argmax())
            raise ValueError(f"row {row}: {what} {wrong}")
