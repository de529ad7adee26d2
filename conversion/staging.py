"""Output folders that appear complete or not at all.

`check_output` decides before the work whether a folder may be written; `staged_folder` hands out a sibling temporary
folder and renames it into place at the end. Whatever goes wrong, the temporary folder goes and the old output stays.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .report import REPORT_FILE


def check_output(output: Path, overwrite: bool, sources: tuple[Path, ...] = ()) -> None:
    """Refuses an output that would destroy something.

    Raises:
        ValueError: the output is a file, holds a source, is not empty and not ours, or is ours without `overwrite`.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"output={str(output)!r}: is a file; give the name of a folder.")
    for source in sources:
        if source.resolve().is_relative_to(output.resolve()):
            raise ValueError(f"output={str(output)!r}: holds the source {source.name}; give another folder.")
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / REPORT_FILE).is_file():
        raise ValueError(
            f"output={str(output)!r}: exists, is not empty and is not a graft of ours (it has no {REPORT_FILE}); "
            "give another folder or empty this one yourself."
        )
    if not overwrite:
        raise ValueError(f"output={str(output)!r}: already holds a graft; pass --overwrite to replace it.")


def check_space(output: Path, needed: int) -> None:
    """Refuses to start where the disk of `output` has less than `needed` bytes free (ValueError)."""
    parent = output.absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(
            f"output={str(output)!r}: needs about {needed / 1e6:,.0f} MB, but its disk has {free / 1e6:,.0f} MB free; "
            "free some space or write elsewhere."
        )


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """A fresh sibling folder that becomes `output` when the block ends well and vanishes when it does not."""
    output = output.absolute()
    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    replaced = output.with_name(f"{output.name}.replaced-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if output.exists():
            output.rename(replaced)
        try:
            partial.rename(output)
        except BaseException:
            if replaced.exists():
                replaced.rename(output)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
