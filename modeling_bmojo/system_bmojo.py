"""What operating systems do differently about files: locks, what is on the disk, names, reading and writing at a place.

POSIX locks by fcntl, Windows by msvcrt. On Windows a file that anyone holds open or mapped can be neither replaced nor
removed, only a file that is open for writing can be synced, and a folder cannot be opened at all. On macOS fsync leaves
the bytes in a cache of the drive, which F_FULLFSYNC empties.
"""

import contextlib
import errno
import os
import time


try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None
try:
    import msvcrt
except ImportError:  # not Windows
    msvcrt = None


WINDOWS = os.name == "nt"
OPEN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)  # flags of every `os.open`; without the second, text
WAITS = tuple(0.01 * 2**i for i in range(8))  # seconds, 2.5 together: whoever looks at a file is done with it by then
TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)  # what a lock that another has is called
NO_FULL_SYNC = (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY, errno.ENODEV)  # file systems that have none


def can_lock() -> bool:
    """Whether this system has locks that end with their process."""
    return fcntl is not None or msvcrt is not None


def lock(file: int) -> bool:
    """Take the lock of an open file, without waiting; whether it is ours. It ends with the handle, or its process."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:  # of its first byte, which need not exist
            os.lseek(file, 0, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        return False
    return True


def unlock(file: int) -> None:
    """Give up the lock of a file, and close it; Windows says of no other way when the lock ends."""
    if fcntl is None:
        with contextlib.suppress(OSError):
            os.lseek(file, 0, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_UNLCK, 1)
    os.close(file)


def sync(file: int) -> None:
    """Wait until the disk has a file that is open for writing."""
    if not _full_sync(file):
        os.fsync(file)


def sync_data(file: int) -> None:
    """Wait until the disk has the bytes of a file that is open for writing; its times may come later."""
    if not _full_sync(file):
        getattr(os, "fdatasync", os.fsync)(file)


def _full_sync(file: int) -> bool:
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS
        try:
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return True
        except OSError as error:
            if error.errno not in NO_FULL_SYNC:
                raise
    return False


def sync_path(path: str) -> None:
    """Wait until the disk has a file's bytes, or a folder's names where folders can be synced."""
    folder = os.path.isdir(path)
    if folder and WINDOWS:
        return
    handle = os.open(path, (os.O_RDONLY if folder else os.O_RDWR) | OPEN)
    try:
        os.fsync(handle) if folder else sync(handle)
    finally:
        os.close(handle)


def replace(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Give a file or a folder another name, also that of a file; Windows is asked until nobody holds it open.

    Raises:
        OSError: if it cannot be; on Windows after `WAITS`.
    """
    for wait in WAITS if WINDOWS else ():
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(wait)
    os.replace(source, target)


def remove(path: str) -> bool:
    """Remove a file; whether it is gone. Only on Windows it may stay: as long as anybody holds it open.

    Raises:
        OSError: if it is not there, or cannot be removed.
    """
    try:
        os.remove(path)
    except PermissionError:
        if not WINDOWS:
            raise
        return False
    return True


def read_at(file: int, count: int, place: int) -> bytes:
    """Read `count` bytes from byte `place` on; fewer at the end. One thread at a time where there is no pread."""
    if hasattr(os, "pread"):
        return os.pread(file, count, place)
    os.lseek(file, place, os.SEEK_SET)
    return os.read(file, count)


def write_at(file: int, data: bytes, place: int) -> int:
    """Write from byte `place` on, and return how many bytes were taken. One thread at a time: see `read_at`."""
    if hasattr(os, "pwrite"):
        return os.pwrite(file, data, place)
    os.lseek(file, place, os.SEEK_SET)
    return os.write(file, data)


__all__ = [
    "OPEN",
    "WINDOWS",
    "can_lock",
    "lock",
    "read_at",
    "remove",
    "replace",
    "sync",
    "sync_data",
    "sync_path",
    "unlock",
    "write_at",
]
