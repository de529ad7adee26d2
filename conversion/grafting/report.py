"""The account of a graft: where every source tensor went and where every target tensor came from.

`plan_copy` makes the account from names and shapes alone, before any tensor is read, and refuses whatever is not
accounted for. `write_report` stores it, with the settings and versions, as `graft_report.json`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..common.files import read_json, write_text
from ..common.staging import REPORT_FILE
from ..common.weights import Weights, digest
from .families import targets_of


CURRENT = "current-sha256"  # of a tensor after training; "sha256" stays that of the graft
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class SourceRows:
    """Where a copied target tensor comes from: rows `[start, stop)` of a source tensor; `whole`: it has no others."""

    source: str
    start: int
    stop: int
    whole: bool


def plan_copy(config: Any, source: Shapes, target: Shapes, initialised: set[str]) -> dict[str, dict[str, Any]]:
    """Every source tensor with its shape and `"copied-to"`: a name, `"split-into"`: names in the order of their rows,
    or `"dropped-because"`: a reason.

    Args:
        config: of the source. source, target: names and shapes of all tensors. initialised: target tensors that the
        graft fills itself.

    Raises:
        ValueError: listing the tensors that are missing, of a wrong shape, or without a place.
    """
    plan, problems, met = {}, [], set(initialised)
    for name, shape in source.items():
        goals, reason = targets_of(config, name)
        met.update(goals)
        absent = [goal for goal in goals if goal not in target]
        if not goals:
            plan[name] = {"dropped-because": reason, "shape": list(shape)}
        elif absent:
            problems.append(f"{name} {list(shape)} has no place in the target and no reason to be dropped")
        elif (implied := joined_shape([target[goal] for goal in goals])) != shape:
            problems.append(f"{name} has shape {list(shape)}, but its config implies {list(implied)}")
        else:
            place = {"copied-to": goals[0]} if len(goals) == 1 else {"split-into": list(goals)}
            plan[name] = {**place, "shape": list(shape)}
    problems += [f"{name} {list(target[name])} is missing" for name in target if name not in met]
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"the source's tensors do not fit its config: {shown}. Check that the files belong together.")
    return plan


def joined_shape(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of tensors whose rows are put one after the other."""
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def goals_of(entry: Mapping[str, Any]) -> list[str]:
    """Return the targets of a source tensor's entry in the account, in the order of their rows; none if it is left
    behind."""
    return [entry["copied-to"]] if "copied-to" in entry else entry.get("split-into", [])


def pieces_of(plan: Mapping[str, Mapping[str, Any]], target: Shapes) -> dict[str, SourceRows]:
    """Where each copied target tensor comes from, by its name."""
    pieces = {}
    for name, entry in plan.items():
        goals, start = goals_of(entry), 0
        for goal in goals:
            pieces[goal] = SourceRows(name, start, start + target[goal][0], whole=len(goals) == 1)
            start += target[goal][0]
    return pieces


def target_account(
    pieces: Mapping[str, SourceRows],
    initialised: Mapping[str, str],
    shapes: Shapes,
    dtypes: Mapping[str, torch.dtype],
    digests: Mapping[str, str],
) -> dict[str, dict[str, Any]]:
    """Every target tensor: `"copied-from"` (and `"rows"` of it) or `"initialised-by"`, its shape, dtype and SHA-256."""
    origin: dict[str, dict[str, Any]] = {name: {"initialised-by": rule} for name, rule in initialised.items()}
    for name, piece in pieces.items():
        origin[name] = {"copied-from": piece.source}
        if not piece.whole:
            origin[name]["rows"] = [piece.start, piece.stop]
    return {
        name: {**origin[name], "shape": list(shape), "dtype": dtype_name(dtypes[name]), "sha256": digests[name]}
        for name, shape in shapes.items()
    }


def dtype_name(dtype: torch.dtype) -> str:
    """`"float32"` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Store the report in the folder; its presence marks the folder as ours and complete."""
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    on_one_line = r"\[\s+((?:\d+,\s+)*\d+)\s+\]"  # shapes
    text = re.sub(on_one_line, lambda match: f"[{' '.join(match[1].split())}]", text)
    write_text(folder / REPORT_FILE, text)


def read_report(folder: Path) -> dict[str, Any] | None:
    """Return the report of a completed graft, or None where the folder has none that can be read."""
    try:
        report = read_json(folder / REPORT_FILE, str(folder))
    except ValueError:
        return None
    accounts = [report.get(name, {}) for name in ("source", "settings", "source_tensors", "target_tensors")]
    whole = all(isinstance(account, dict) for account in accounts)
    return report if whole and all(isinstance(entry, dict) for entry in accounts[3].values()) else None


def require_report(folder: Path, what: str) -> dict[str, Any]:
    """Return the folder's report, {} where it has none.

    Raises:
        ValueError: there is one that cannot be read: going on without it would say less of the result than is known.
    """
    report = read_report(folder)
    if report is None and (folder / REPORT_FILE).exists():
        raise ValueError(
            f"{what}: its {REPORT_FILE} is damaged; put it back from a copy or graft anew. Without the file, the "
            "folder is taken as a model of which nothing is known."
        )
    return report or {}


def changed_tensors(report: Mapping[str, Any], weights: Weights) -> list[str]:
    """Return tensors of a folder that are not what its report says (SHA-256); all of its weights are read.

    A result of training says of every tensor what it is now; older ones do not, and of them nothing is compared.
    """
    known = {
        name: entry.get(CURRENT, None if report.get("training") else entry.get("sha256"))
        for name, entry in report.get("target_tensors", {}).items()
    }
    return [
        name
        for name, stated in known.items()
        if stated is not None and (name not in weights.shapes or digest(weights.rows(name).contiguous()) != stated)
    ]
