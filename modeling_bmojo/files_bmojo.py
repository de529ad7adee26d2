"""Writing a file whole or not at all, whatever ends the process and however many write it at once.

A file is written under a name of its own beside its target, synced, and renamed over it. That name says which process
wrote it, so that what a killed process left behind is found and removed by whoever writes the same target next.
"""

import contextlib
import hashlib
import os
import re
import secrets
import socket
from collections.abc import Callable

from .system_bmojo import WINDOWS, replace, sync, sync_path


def write_whole(path: str | os.PathLike, write: Callable[[str], None]) -> None:
    """Let `write(partial)` fill the file `partial`, then renames it to `path`; its mode is as the umask has it.

    Leftovers of dead processes that wrote `path` are removed first; another writer's file, also in another thread, is
    left alone, and the last to finish wins.

    Raises:
        ValueError: if the folder of `path` does not exist.
        OSError: if the file cannot be written; what stood under `path` is unchanged then, and nothing new is left.
    """
    target = os.fspath(path)
    folder, name = os.path.split(target)
    folder = folder or "."
    if not os.path.isdir(folder):
        raise ValueError(f"path={target!r}: there is no folder {folder!r}; make it first.")
    partial = os.path.join(folder, f"{name}.partial-{_here()}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        _remove_leftovers(folder, name)
        with open(partial, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        write(partial)  # may put another file in its place, as safetensors does: a private one
        os.chmod(partial, mode & 0o777)
        with open(partial, "rb+") as file:
            sync(file.fileno())
        replace(partial, target)
    except OSError as error:
        failed = OSError(
            f"path={target!r}: could not be written ({error}); what stood there before is unchanged. Make room or give "
            "another folder, and write it again."
        )
        failed.errno = error.errno
        raise failed from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
    with contextlib.suppress(OSError):  # so that the name lasts through a power cut; the file itself is whole by now
        sync_path(folder)


def _here() -> str:
    """Return the set of processes among which a number means one process: this machine, or this container on it."""
    space = ""
    with contextlib.suppress(OSError):  # not Linux: one machine has one set
        space = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def _remove_leftovers(folder: str, name: str) -> None:
    """Remove the partial files of `name` whose writers no longer run."""
    if WINDOWS or os.name != "posix":
        return  # there asking whether a process lives may end it
    ours = re.compile(rf"{re.escape(name)}\.partial-{_here()}-([1-9][0-9]{{0,8}})-[0-9a-f]{{8}}")
    with os.scandir(folder) as entries:
        found = [(entry.path, match) for entry in entries if (match := ours.fullmatch(entry.name))]
    for leftover, match in found:
        if not _lives(int(match[1])):
            with contextlib.suppress(FileNotFoundError):  # another writer was faster
                os.remove(leftover)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True
