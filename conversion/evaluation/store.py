"""The folder of an evaluation: every measurement is stored as soon as it is made, whole or not at all.

evaluation.json   settings, machine, and all measurements, each with the machine it was made on and the fingerprint
                  under which it counts
table.md          the table;   evaluation.png   the diagrams (both made from the JSON, at the end)
"""

import functools
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..common.commands import INSTALLED
from ..common.files import read_json, write_text
from ..common.provenance import versions


RESULT_FILE, TABLE_FILE, PLOT_FILE = "evaluation.json", "table.md", "evaluation.png"


def check_folder(folder: Path, overwrite: bool, reuse: bool, file: str = RESULT_FILE) -> None:
    """Refuse an output that would destroy something.

    Args:
        file: the JSON that marks a folder of the program that asks.

    Raises:
        ValueError: the output is a file, is not empty and not ours, or holds an evaluation that nobody said to replace.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output={str(folder)!r}: is a file; give the name of a folder.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / file).is_file():
        raise ValueError(
            f"output={str(folder)!r}: exists, is not empty and is no evaluation (no {file} in it); give another."
        )
    if not (overwrite or reuse):
        raise ValueError(
            f"output={str(folder)!r}: already holds an evaluation; pass --reuse to go on with it (measurements that "
            "are still valid are kept) or --overwrite to start anew."
        )


class Store:
    """Measurements by row and section, in memory and in `folder`.

    Args:
        settings: of this run. reuse: take over what the folder holds already. file: name of the JSON.

    Raises:
        ValueError: the folder's file cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        command: str,
        reuse: bool = False,
        file: str = RESULT_FILE,
    ):
        self.path = folder / file
        where = machine(settings.get("device", "cpu"))
        self.header = {"settings": dict(settings), "command": command, "machine": where}
        self.measurements: dict[str, dict[str, Any]] = {}
        if reuse and self.path.is_file():
            self.measurements = _measurements(self.path)

    def has(self, row: str, section: str, key: str) -> bool:
        return self.measurements.get(row, {}).get(section, {}).get("key") == key

    def get(self, row: str, section: str) -> dict[str, Any]:
        return self.measurements[row][section]

    def put(self, row: str, section: str, key: str, values: Mapping[str, Any]) -> None:
        """Take a measurement in, made on this machine, and write everything measured so far."""
        self.measurements.setdefault(row, {})[section] = {"key": key, "machine": self.header["machine"], **values}
        self.write(finished=False)

    def write(self, finished: bool, **more: Any) -> None:
        """Write the JSON; `more` goes in beside the measurements."""
        content = {**self.header, "finished": finished, **more, "measurements": self.measurements}
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        numbers = r"\[\s+((?:-?[\d.e+-]+,\s+)*-?[\d.e+-]+)\s+\]"
        text = re.sub(numbers, lambda match: f"[{' '.join(match[1].split())}]", text)
        write_text(self.path, text)


def _measurements(path: Path) -> dict[str, dict[str, Any]]:
    """Return what the file holds (ValueError: it is damaged)."""
    try:
        found = read_json(path, str(path.parent)).get("measurements")
    except ValueError as error:
        raise ValueError(f"{error} It is damaged; pass --overwrite.") from error
    rows = list(found.values()) if isinstance(found, dict) else [None]
    sections = [section for row in rows for section in (row.values() if isinstance(row, dict) else [None])]
    if not all(isinstance(section, dict) for section in sections):
        raise ValueError(f"{path}: is damaged (no measurements by row and section); pass --overwrite.")
    return found


def machine(device: str) -> dict[str, Any]:
    """On what the figures were measured, and by which commit."""
    return {"commit": _commit(), **hardware(device)}


def hardware(device: str) -> dict[str, Any]:
    """Return what speeds depend on beside our code: processor or GPU, cores and threads, system, versions."""
    cuda = device != "cpu" and torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": sys.platform,
        "versions": versions(),
    }


@functools.cache
def _processor() -> str:
    """Return the processor's name: Linux has it in a file, other systems where Python looks; may be empty."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    """Return the checkout's commit, with a + where it has changes; empty outside a checkout."""
    if INSTALLED:  # a checkout around it is somebody else's
        return ""
    root = Path(__file__).resolve().parents[1]
    said = []
    for arguments in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return ""
        if done.returncode:
            return ""
        said.append(done.stdout.strip())
    return said[0] + ("+" if said[1] else "")
