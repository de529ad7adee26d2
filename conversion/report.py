"""The account of a graft: where every source tensor went and where every target tensor came from.

`plan_copy` makes the account from names and shapes alone, before any tensor is read, and refuses whatever is not
accounted for. `write_report` stores it, with the settings and versions, as `graft_report.json`.
"""

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import modeling_bmojo

from .families import target_of


REPORT_FILE = "graft_report.json"
Shapes = Mapping[str, tuple[int, ...]]


def plan_copy(config: Any, source: Shapes, target: Shapes, initialised: set[str]) -> dict[str, dict[str, Any]]:
    """Every source tensor: `{"copied-to": name}` or `{"dropped-because": reason}`, with its shape.

    Args:
        config: of the source. source, target: names and shapes of all tensors. initialised: target tensors that the
        graft fills itself.

    Raises:
        ValueError: listing the tensors that are missing, of a wrong shape, or without a place.
    """
    plan, problems, filled = {}, [], set(initialised)
    for name, shape in source.items():
        goal, reason = target_of(config, name)
        if goal is None:
            plan[name] = {"dropped-because": reason, "shape": list(shape)}
        elif goal not in target:
            problems.append(f"{name} {list(shape)} has no place in the target and no reason to be dropped")
        elif target[goal] != shape:
            problems.append(f"{name} has shape {list(shape)}, but its config implies {list(target[goal])}")
        else:
            plan[name] = {"copied-to": goal, "shape": list(shape)}
            filled.add(goal)
    wrong = {target_of(config, name)[0] for name in source}
    problems += [f"{name} {list(target[name])} is missing" for name in target if name not in filled | wrong]
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ValueError(f"the source's tensors do not fit its config: {shown}. Check that the files belong together.")
    return plan


def target_account(
    plan: Mapping[str, Mapping[str, Any]], initialised: Mapping[str, str], tensors: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, Any]]:
    """Every target tensor: `{"copied-from": name}` or `{"initialised-by": rule}`, with its shape and dtype."""
    origin = {entry["copied-to"]: {"copied-from": name} for name, entry in plan.items() if "copied-to" in entry}
    origin |= {name: {"initialised-by": rule} for name, rule in initialised.items()}
    return {
        name: {**origin[name], "shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype)}
        for name, tensor in tensors.items()
    }


def dtype_name(dtype: torch.dtype) -> str:
    """`"float32"` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def versions() -> dict[str, str]:
    """Versions that a graft depends on."""
    return {
        "modeling_bmojo": modeling_bmojo.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def code_fingerprint() -> str:
    """SHA-256 over the modules of the package and of `conversion/`: a graft by other code is not reused."""
    digest = hashlib.sha256()
    for folder in (Path(modeling_bmojo.__file__).parent, Path(__file__).parent):
        for file in sorted(folder.glob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Stores the report in the folder; its presence marks the folder as ours and complete."""
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    on_one_line = r"\[\s+((?:\d+,\s+)*\d+)\s+\]"  # shapes
    text = re.sub(on_one_line, lambda match: f"[{' '.join(match[1].split())}]", text)
    (folder / REPORT_FILE).write_text(text, encoding="utf-8")


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of a completed graft, or None where the folder has none that can be read."""
    try:
        return json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
