"""Output folders that appear complete or not at all.

`check_output` decides before the work whether a folder may be written; `staged_folder` hands out a sibling temporary
folder and renames it into place at the end. Whatever goes wrong, the temporary folder goes and the old output stays.
What a killed process (kill -9, a power cut) could not clear away itself, the next one does.
"""

import glob
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

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


def clear_leftovers(output: Path) -> None:
    """Removes what killed processes left beside `output`, and puts back an old output that one had just moved aside.

    A process locks a file beside its temporary folder while it lives, so running work is left alone.
    """
    output = output.absolute()
    for lock_file in output.parent.glob(f"{glob.escape(output.name)}.partial-*.lock"):
        try:
            with FileLock(lock_file, timeout=0):
                _clear(output, lock_file.with_suffix(""))
        except Timeout:
            continue


def _clear(output: Path, partial: Path) -> None:
    """Ends a staging, wherever it stopped: one of the two outputs stays, the temporary folder and the lock go."""
    replaced = _replaced(partial)
    if replaced.exists() and not output.exists():
        replaced.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)
    _lock_file(partial).unlink(missing_ok=True)


def _replaced(partial: Path) -> Path:
    """Where the old output waits while the folder `partial` is renamed."""
    return partial.with_name(partial.name.replace(".partial-", ".replaced-"))


def _lock_file(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.lock")


def _open_to_others(folder: Path) -> None:
    """Gives files the mode that the folder got from the user's umask: safetensors makes its own private (0600)."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | mode)


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """A fresh sibling folder that becomes `output` when the block ends well and vanishes when it does not.

    A killed process leaves it behind; whoever writes the same output next clears it away (`clear_leftovers`).
    """
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(output)
    partial = output.with_name(f"{output.name}.partial-{uuid.uuid4().hex[:12]}")
    with FileLock(_lock_file(partial)):
        try:
            partial.mkdir()
            yield partial
            _open_to_others(partial)
            if output.exists():
                output.rename(_replaced(partial))
            partial.rename(output)
        finally:
            _clear(output, partial)
