"""Output folders that have one writer, and appear complete or not at all.

`sole_writer` is held while a program works on an output: whoever comes second is refused. `check_output` decides before
the work whether a folder may be written; `staged_folder` hands out a sibling temporary folder and renames it into place
at the end. Whatever goes wrong, the temporary folder goes and the old output stays. What a killed process (kill -9, a
power cut) could not clear away itself, the next writer of the output does.
"""

import glob
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from modeling_bmojo.system_bmojo import WINDOWS, sync_path

from .files import leftovers, partial_name, rename, sync, writing


REPORT_FILE = "graft_report.json"  # marks a folder as a complete one of ours; grafting/report.py writes it
REPLACED = re.compile(r"\.replaced-[0-9a-f]{12}")  # an old output that waits while the new one is renamed
OLD_LOCK = re.compile(r"\.partial-[0-9a-f]{12}\.lock")  # of versions that locked each temporary folder by itself


@contextmanager
def sole_writer(output: Path) -> Iterator[None]:
    """Keep everyone else from writing `output`, its temporary folders and its work folder until the block ends.

    The lock is the system's, on the file `<output>.lock`: it ends with the process that holds it, however that ends.
    The file goes when the block ends; one that a killed process left behind locks nothing.

    Raises:
        ValueError: another process, or another thread, is writing it. WriteError: nothing can be written there.
    """
    output = output.absolute()
    made = [folder for folder in output.parents if not folder.exists()]
    file = output.with_name(f"{output.name}.lock")
    lock = FileLock(file, timeout=0)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as error:
            raise ValueError(
                f"output={str(output)!r}: another process is writing it (it holds {file.name}); wait until it is done, "
                "or give another output."
            ) from error
    try:
        clear_leftovers(output)
        yield
    finally:
        if not WINDOWS:
            file.unlink(missing_ok=True)  # while it is held: whoever opened it meanwhile sees that it is gone
        lock.release()
        if WINDOWS:  # where nothing that is open can go; who is locking it now keeps it
            with suppress(OSError):
                file.unlink()
        for folder in made:
            with suppress(OSError):  # it holds something now
                folder.rmdir()


def check_output(output: Path, overwrite: bool, sources: tuple[Path, ...] = ()) -> None:
    """Refuse an output that would destroy something.

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
            f"output={str(output)!r}: is not empty: it already holds files and is not a graft of ours (it has no "
            f"{REPORT_FILE}); give another folder or empty this one yourself."
        )
    if not overwrite:
        raise ValueError(f"output={str(output)!r}: already holds a graft; pass --overwrite to replace it.")


def check_space(output: Path, needed: int) -> None:
    """Refuse to start where the disk of `output` has less than `needed` bytes free (ValueError)."""
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
    """Remove what killed processes left beside `output`, and put back an old output that one had just moved aside.

    Only for the sole writer of `output`: nobody else's work can be among it then.
    """
    output = output.absolute()
    for replaced in _beside(output, REPLACED):
        if output.exists():
            shutil.rmtree(replaced)
        else:
            rename(replaced, output)
    for partial in leftovers(output):
        shutil.rmtree(partial)
    for lock in _beside(output, OLD_LOCK):
        lock.unlink()


def is_settled(output: Path) -> bool:
    """Whether nothing lies beside `output` that a writer is using, or a killed one has left."""
    output = output.absolute()
    lock = output.with_name(f"{output.name}.lock")
    return not (lock.exists() or leftovers(output) or _beside(output, REPLACED) or _beside(output, OLD_LOCK))


def _beside(output: Path, suffix: re.Pattern) -> list[Path]:
    """Return what lies beside `output` under its name and such a suffix."""
    found = output.parent.glob(f"{glob.escape(output.name)}.*")
    return sorted(path for path in found if suffix.fullmatch(path.name[len(output.name) :]))


def _finish(folder: Path) -> None:
    """Files get the mode that the folder got from the user's umask (safetensors makes its own private, 0600), and are
    on the disk before anything that they replace goes."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | mode)
            sync(path)


@contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """Yield a fresh sibling folder that becomes `output` when the block ends well and vanishes when it does not.

    Only for the sole writer of `output` (`sole_writer`), who clears away what a killed one left.

    Raises:
        WriteError: the disk is full, or refuses it otherwise.
    """
    output = output.absolute()
    partial = partial_name(output)
    replaced = partial.with_name(partial.name.replace(".partial-", ".replaced-"))
    with writing(output):
        try:
            partial.mkdir(parents=True)
            yield partial
            _finish(partial)
            if output.exists():
                rename(output, replaced)
            rename(partial, output)
            with suppress(OSError):  # the new name lasts through a power cut; the files are on the disk already
                sync_path(str(output.parent))
        finally:
            if replaced.exists() and not output.exists():
                rename(replaced, output)
            shutil.rmtree(replaced, ignore_errors=True)
            shutil.rmtree(partial, ignore_errors=True)
