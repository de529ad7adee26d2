"""Looking at adapters: which modules of every layer are adapted, and whether a saved adapter belongs to a model.

Reads names, shapes and flags only; works on models with and without adapters, and does not import PEFT.
"""

import json
import os
import re
import warnings
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import nn


OUTSIDE = "outside"  # of the layers: embeddings, the final norm, heads
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in an adapter's file
ADAPTER_PART = re.compile(r"\.(lora_[A-Za-z_]+?)(?:\.weight)?$")


class LayerCoverage(NamedTuple):
    """What trains in one layer.

    layer: its index, or "outside". kind: its layer type. adapted: module to rank (None where an adapter has none).
    in_full: modules that train in full. frozen: modules with parameters of which none trains.
    trains, parameters: numbers of values, adapters included.
    """

    layer: int | str
    kind: str
    adapted: dict[str, int | None]
    in_full: tuple[str, ...]
    frozen: tuple[str, ...]
    trains: int
    parameters: int


def lora_coverage(model: nn.Module) -> list[LayerCoverage]:
    """Return what is adapted, trained in full or frozen, one row per layer and one for what is outside of them.

    Adapters count if they are active, whether or not they are being trained.

    Raises:
        ValueError: if `model` is no B'MOJO model.
    """
    kinds = _layer_types(model)
    rows = {index: _empty(index, kind) for index, kind in enumerate(kinds)}
    rows[OUTSIDE] = _empty(OUTSIDE, "")
    counted = set()  # tied tensors count once
    for name, module, state in _owners(model):
        match = LAYER.search(name)
        row = rows[int(match[1]) if match else OUTSIDE]
        short = (match[2] if match else name).rpartition(".")[2] or type(module).__name__
        if state == "adapted":
            row["adapted"][short] = _rank(module)
        else:
            row[state].append(short)
        own = [p for p in module.parameters(recurse=_is_wrapper(module)) if id(p) not in counted]
        counted.update(map(id, own))
        row["parameters"] += sum(parameter.numel() for parameter in own)
        row["trains"] += sum(parameter.numel() for parameter in own if parameter.requires_grad)
    return [
        LayerCoverage(**{**row, "in_full": tuple(row["in_full"]), "frozen": tuple(row["frozen"])})
        for row in rows.values()
    ]


def _empty(layer: int | str, kind: str) -> dict[str, Any]:
    return dict(layer=layer, kind=kind, adapted={}, in_full=[], frozen=[], trains=0, parameters=0)


def _layer_types(model: nn.Module) -> list[str]:
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or getattr(config, "model_type", None) != "bmojo":
        raise ValueError(f"model={type(model).__name__}: must be a B'MOJO model, with or without adapters.")
    return config.layer_types


def _owners(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, "adapted" | "in_full" | "frozen") of every module that owns parameters; PEFT's wrappers whole."""
    if _is_wrapper(model):
        state = "adapted" if hasattr(model, "base_layer") else "in_full"
        yield name, model, state if _active(model) else "frozen"
        return
    own = list(model.parameters(recurse=False))
    if own:
        yield name, model, "in_full" if any(parameter.requires_grad for parameter in own) else "frozen"
    for child_name, child in model.named_children():
        yield from _owners(child, f"{name}.{child_name}" if name else child_name)


def _is_wrapper(module: nn.Module) -> bool:
    """PEFT's wrapper around a projection has a `base_layer`, around a module trained in full an `original_module`."""
    return hasattr(module, "adapter_layer_names") and (
        hasattr(module, "base_layer") or hasattr(module, "original_module")
    )


def _active(module: nn.Module) -> list[str]:
    """Return the active adapters that a PEFT wrapper has weights for; empty for other modules and when switched off."""
    if getattr(module, "disable_adapters", False):
        return []
    wanted, held = getattr(module, "active_adapters", None), set()
    for name in getattr(module, "adapter_layer_names", ()):
        held.update(getattr(module, name, None) or ())
    return [name for name in wanted if name in held] if isinstance(wanted, list) else []


def _rank(module: nn.Module) -> int | None:
    ranks = getattr(module, "r", None)
    return max((ranks[name] for name in _active(module) if name in ranks), default=None) if ranks else None


def print_lora_coverage(model: nn.Module) -> list[LayerCoverage]:
    """Print what is adapted per layer, equal neighbours on one line, and return the rows of `lora_coverage`.

    Warns (`UserWarning`) of layers in which nothing is adapted or trained.

    Raises:
        ValueError: if `model` is no B'MOJO model.
    """
    rows = lora_coverage(model)
    trains, total = sum(row.trains for row in rows), sum(row.parameters for row in rows)
    print(f"{trains:,} of {total:,} parameters train ({trains / max(total, 1):.2%})\n")
    lines = [("layers", "type", "adapted (rank)", "in full", "untouched (norms aside)", "train per layer")]
    for _, equal in groupby(rows, key=lambda row: row[1:]):
        equal = list(equal)
        lines.append((_span([row.layer for row in equal]), *_cells(equal[0])))
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    for line in lines:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line[:5], widths)) + f"  {line[5]}")
    untouched = [row.layer for row in rows if row.layer != OUTSIDE and not row.adapted and not row.in_full]
    if untouched:
        warnings.warn(
            f"nothing is adapted in layers {', '.join(map(str, untouched))}: their memories stay as they are; "
            "bmojo_lora_config(model) names every projection.",
            UserWarning,
            stacklevel=2,
        )
    return rows


def _span(layers: list[int | str]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def _cells(row: LayerCoverage) -> tuple[str, ...]:
    """Adapted modules by rank, and the rest as words."""
    by_rank: dict[int | None, list[str]] = {}
    for name, rank in row.adapted.items():
        by_rank.setdefault(rank, []).append(name)
    adapted = ", ".join(" ".join(names) + (f" ({rank})" if rank else "") for rank, names in by_rank.items())
    frozen = " ".join(name for name in row.frozen if not name.endswith("norm"))  # norms hardly ever train
    return row.kind or "-", adapted or "-", " ".join(row.in_full) or "-", frozen or "-", f"{row.trains:,}"


def check_adapter(model: nn.Module, folder: str | os.PathLike) -> None:
    """Compare a saved LoRA adapter with a model before it is loaded; PEFT drops what has no place without a word.

    Args:
        model: the B'MOJO model it is meant for. folder: what `save_pretrained` wrote.

    Raises:
        ValueError: if files are missing or damaged, tensors have no place in the model or another shape, or the
            configuration names projections of the model that the file has no weights for.
    """
    _layer_types(model)
    settings, shapes = _read_adapter(os.fspath(folder))
    modules = {_plain(name): module for name, module in model.named_modules()}
    tensors = {_plain(name): tensor for name, tensor in model.named_parameters()}
    faults = (_fault(name.removeprefix(PREFIX), shape, modules, tensors) for name, shape in shapes.items())
    wrong = [fault for fault in faults if fault]
    found = {ADAPTER_PART.sub("", name.removeprefix(PREFIX)) for name in shapes}
    missing = [name for name in modules if _is_target(name, settings) and name not in found]
    if missing:
        wrong.append(f"it has nothing for {len(missing)} of the model's projections, e.g. {missing[0]}")
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(
            f"folder={os.fspath(folder)!r}: the adapter belongs to another base, "
            f"{settings.get('base_model_name_or_path')!r}: {'; '.join(wrong[:3])}{more}. Load the model that it was "
            "trained on, or train it for this one."
        )


def _plain(name: str) -> str:
    """Return a module's or tensor's name without the levels that PEFT puts in between."""
    return name.removeprefix(PREFIX).replace(".base_layer", "").replace(".original_module", "")


def _is_target(name: str, settings: dict[str, Any]) -> bool:
    """Whether the adapter's settings certainly name this module: no pattern, no selection of layers."""
    targets = settings.get("target_modules")
    if not isinstance(targets, list) or settings.get("layers_to_transform") or settings.get("exclude_modules"):
        return False
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _read_adapter(folder: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Return settings of an adapter and the shapes of its tensors."""
    try:
        with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as file:
            settings = json.load(file)
        with safe_open(os.path.join(folder, WEIGHTS), framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no dict)
    except FileNotFoundError as error:
        raise ValueError(
            f"folder={folder!r}: is no saved adapter ({error}); give the folder that save_pretrained wrote."
        ) from error
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"folder={folder!r}: the adapter is damaged ({error}); save it again.") from error
    return settings, shapes


def _fault(name: str, shape: tuple[int, ...], modules: dict, tensors: dict) -> str | None:
    """Return what is wrong with a tensor of an adapter, or None."""
    part = ADAPTER_PART.search(name)
    if part is None:
        if name not in tensors:
            return f"the model has no {name}"
        own = tuple(tensors[name].shape)
        return None if own == shape else f"{name} has shape {list(shape)} and the model's {list(own)}"
    module = modules.get(name[: part.start()])
    if module is None:
        return f"the model has no {name[: part.start()]}"
    sizes = {"lora_A": (shape[-1], "in_features"), "lora_B": (shape[0], "out_features")}
    size, side = sizes.get(part[1], (None, None))
    own = getattr(module, side, size) if side else size
    return None if own == size else f"{name} is for {size} features and the model's projection has {own}"


__all__ = ["LayerCoverage", "check_adapter", "lora_coverage", "print_lora_coverage"]
