"""Rows as they lie in local files or in a data set of the hub, through `datasets`, and where each of them stands.

Local rows carry their number in all files: held-out rows are drawn at random, and a message about a row names its file.
Nothing is tokenised here.
"""

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset

from ..common.files import sha256
from ..common.recipes import own_data
from .settings import DataSettings


BUILDERS = {
    ".txt": "text",
    ".md": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
NUMBER = "number in all files"  # the column that holds it
AnyDataset = Dataset | IterableDataset


def read_files(patterns: str | list[str], text_column: str) -> tuple[Dataset, list[list[str]]]:
    """All rows of the files that match, in one data set with their numbers, and the files' names and fingerprints.

    Raises:
        ValueError: a pattern that matches nothing, a kind of file that cannot be read, or a damaged file.
    """
    found, parts = _matching(patterns), []
    for builder, names in found.items():
        part = _load_files(builder, names)
        if builder == "text" and text_column != "text":
            part = part.rename_column("text", text_column)
        parts.append(part)
    rows = _joined(parts)
    # A change in the middle of a file must not go unnoticed, and all of it was read for the rows anyway.
    files = [Path(name) for names in found.values() for name in names]
    return rows.add_column(NUMBER, np.arange(len(rows))), [[file.name, sha256(file)[:16]] for file in files]


def _matching(patterns: str | list[str]) -> dict[str, list[str]]:
    """Builder of `datasets` to the files that it reads, in the order of `read_files`."""
    found: dict[str, list[str]] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        places = glob.glob(str(Path(own_data(pattern)).expanduser()), recursive=True)
        names = [name for name in sorted(places) if Path(name).is_file()]
        if not names:
            raise ValueError(f"data.files: {pattern!r} matches no file; the path counts from {str(Path.cwd())!r}.")
        for name in names:
            suffix = Path(name).suffix.lower()
            if suffix not in BUILDERS:
                raise ValueError(f"data.files: {name!r} is of no kind that is read; known: {', '.join(BUILDERS)}.")
            found.setdefault(BUILDERS[suffix], []).append(name)
    return found


def _load_files(builder: str, names: list[str]) -> Dataset:
    options = {"sample_by": "document"} if builder == "text" else {}
    return _load(", ".join(names[:3]), builder, data_files=names, split="train", **options)


@dataclass(frozen=True)
class Place:
    """Where a row stands, for messages; its file is looked for only when one asks.

    patterns: of the files; None: the row is of a data set of the hub. number: of the row in all of them, from 0.
    """

    patterns: str | list[str] | None
    number: int

    def __str__(self) -> str:
        number = self.number
        for builder, names in (_matching(self.patterns) if self.patterns else {}).items():
            for name in names:
                rows = len(_load_files(builder, [name]))
                if number < rows:
                    return f"row {number + 1} of {name!r} (the first is 1)"
                number -= rows
        return f"data row {self.number + 1} (the first is 1)"


def _joined(parts: list[Dataset]) -> Dataset:
    """One data set of the columns that all parts have, in the types of the first."""
    if len(parts) == 1:
        return parts[0]
    shared = set(parts[0].column_names).intersection(*(part.column_names for part in parts))
    if not shared:
        columns = "; ".join(", ".join(part.column_names) for part in parts)
        raise ValueError(f"data.files: the files have no column in common ({columns}); set data.text_column.")
    parts = [part.select_columns(sorted(shared)) for part in parts]
    try:
        return concatenate_datasets([part.cast(parts[0].features) for part in parts])
    except Exception as error:  # datasets and pyarrow raise types of their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"data.files: columns {sorted(shared)} differ in type between files ({reason}).") from error


def read_hub(data: DataSettings) -> AnyDataset:
    """Return the split of a hub data set (ValueError: not there, not reachable)."""
    rows = _load(repr(data.hub), data.hub, data.config, split=data.split, streaming=data.streaming)
    return rows.add_column(NUMBER, np.arange(len(rows))) if isinstance(rows, Dataset) else rows


def _load(name: str, *arguments: Any, **options: Any) -> AnyDataset:
    try:
        return load_dataset(*arguments, **options)
    except Exception as error:  # datasets, pyarrow, fsspec and the hub raise types of their own
        reason = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        raise ValueError(f"data: {name} cannot be read, or is empty ({reason[0]}); check it.") from error
