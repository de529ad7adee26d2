"""What a program does to the files of one folder, one event at a time, and what may happen to it there.

An event is a file that is opened for writing or written by a library, a rename, a removal, a folder made or removed, a
change of mode, or an fsync. Python's own come from an audit hook; safetensors and torch write by themselves and are
wrapped. The hook stays for the rest of the process: only for processes that end with the run.

    kill    the process is killed (SIGKILL) before the event
    torn    the same, with the file half written
    full    from this event on nothing can be written: the errors are those that full disks cause in each library
"""

import errno
import os
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit events to the places of the path and, where there is one, of the folder that it counts from.
AUDITED = {
    "os.rename": (0, 2),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.mkdir": (0, 2),
    "os.chmod": (0, 2),
    "os.truncate": (0, None),
}
TAKES_SPACE = {"open", "os.mkdir", "os.fsync", "safetensors", "torch.save"}
FILLED = {"open", "safetensors", "torch.save"}  # events that can leave half a file
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Watch:
    """Counts the events inside `folder`; at event number `at` (from 0) does what `mode` says."""

    def __init__(self, folder: Path, at: int | None = None, mode: str = "kill"):
        self.folder, self.at, self.mode = os.path.realpath(folder), at, mode
        self.events: list[tuple[str, str]] = []
        self._inside = False

    def start(self) -> None:
        sys.addaudithook(self._audit)
        self._wrap_libraries()

    def _audit(self, name: str, arguments: tuple) -> None:
        if name == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes | os.PathLike) and flags & WRITES:
                self._meet("open", os.fsdecode(path))
        elif name in AUDITED:
            place, base = AUDITED[name]
            path = os.fsdecode(arguments[place]) if not isinstance(arguments[place], int) else ""
            descriptor = -1 if base is None else arguments[base]
            if isinstance(descriptor, int) and descriptor >= 0:
                path = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), path)
            self._meet(name, path)

    def _wrap_libraries(self) -> None:
        serialize, save = safetensors.torch.serialize_file, torch.save

        def serialize_watched(tensors, path, *arguments, **options):
            full = SafetensorError(f"Error while serializing: I/O error: {FULL.strerror} (os error {FULL.errno})")
            self._meet("safetensors", str(path), lambda: serialize(tensors, path, *arguments, **options), full)
            return serialize(tensors, path, *arguments, **options)

        def save_watched(value, path, *arguments, **options):
            full = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
            self._meet("torch.save", str(path), lambda: save(value, path, *arguments, **options), full)
            return save(value, path, *arguments, **options)

        safetensors.torch.serialize_file, torch.save = serialize_watched, save_watched
        # Nothing is waited for: what a power cut leaves cannot be tried out here.
        os.fsync = lambda descriptor: self._meet("os.fsync", os.readlink(f"/proc/self/fd/{descriptor}"))

    def _meet(self, name: str, path: str, write=None, full: Exception = FULL) -> None:
        path = os.path.abspath(path)
        if self._inside or not path.startswith(self.folder + os.sep):
            return
        number = len(self.events)
        self.events.append((name, path[len(self.folder) + 1 :]))
        if self.at is None or number < self.at:
            return
        if self.mode == "full":
            if name in TAKES_SPACE:
                self._leave_half(name, path, write)
                raise full
        elif number == self.at:
            if self.mode == "torn":
                self._leave_half(name, path, write)
            os.kill(os.getpid(), signal.SIGKILL)

    def _leave_half(self, name: str, path: str, write) -> None:
        """Half of the file that a library would have written; of a Python file, its first bytes."""
        if name not in FILLED or not os.path.isdir(os.path.dirname(path)):
            return
        self._inside = True
        if write is not None:
            write()
            os.truncate(path, os.path.getsize(path) // 2)
        elif name == "open" and not os.path.exists(path):
            with open(path, "wb") as opened:
                opened.write(b'{"ha')
        self._inside = False
