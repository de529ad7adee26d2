"""One writer per directory: the folder, its lock, and what lives as long as anyone uses it."""

import contextlib
import os
import re
import weakref

from .store_files_bmojo import Writer
from .store_manifest_bmojo import MANIFEST
from .system_bmojo import OPEN, WINDOWS, can_lock, lock, unlock


LOCK = "store.lock"
BEFORE_THE_FIRST = re.compile(rf"{re.escape(LOCK)}|{re.escape(MANIFEST)}\.partial-.*")  # what a killed opener leaves


class Keeper:
    """The lock and the thread, which live as long as any page of the directory is used.

    made: whether the lock's file is new.
    """

    def __init__(self, path: str):
        if not can_lock():
            raise ValueError(f"storage={path!r}: this system cannot lock a directory; keep the entries in host memory.")
        name = os.path.join(path, LOCK)
        while True:
            self.made = not os.path.exists(name)
            file = os.open(name, os.O_RDWR | os.O_CREAT | OPEN, 0o666)
            if not lock(file):
                os.close(file)
                raise ValueError(
                    f"storage={path!r}: in use by another cache, of this process or another; a directory has one "
                    "writer: close that one, or give another directory."
                )
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(name)):
                    break
            os.close(file)  # whoever was refused has removed it meanwhile
        self.release = weakref.finalize(self, unlock, file)
        self.release.atexit = False  # the thread may be at work until then, and a lock ends with its process
        self.name, self.writer = name, Writer()

    def close(self) -> None:
        """Stop the thread and let another have the lock."""
        self.writer.stop()
        self.release()

    def undo(self) -> None:
        """Close, and leave no lock where there was none."""
        if WINDOWS:  # nothing that is open can be removed
            self.close()
        if self.made:
            with contextlib.suppress(OSError):
                os.remove(self.name)
        self.close()


def make_folder(path: str) -> bool:
    """Make a new storage's directory if there is none; raise ValueError if it is not one of ours."""
    if not os.path.lexists(path):
        if not os.path.isdir(os.path.dirname(path)):
            raise ValueError(f"storage={path!r}: there is no folder {os.path.dirname(path)!r}; make it first.")
        os.mkdir(path)
        return True
    if not os.path.isdir(path):
        raise ValueError(f"storage={path!r}: must be a directory, this is a file; give an empty or a new directory.")
    names = os.listdir(path)
    if MANIFEST not in names:
        others = sorted(name for name in names if not BEFORE_THE_FIRST.fullmatch(name))
        if others:
            raise ValueError(
                f"storage={path!r}: has {others[0]!r} and no {MANIFEST}, so it is no storage; give an empty or a new "
                "directory."
            )
    return False


__all__ = ["Keeper", "make_folder"]
