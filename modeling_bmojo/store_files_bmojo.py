"""Pages in files: a pool whose memory is mapped, and the thread that brings full pages to disk.

    layer-003.keys    entry after entry of one field, page n at n times the bytes of a page

Writing an entry is a copy into the mapping, reading is a look into it, and neither waits for the thread; what a file
holds is what memory holds, whenever. The thread takes pages that are full, sums them (crc32), asks the disk to have
them, and lets go of the memory that they are mapped to. What it could not do is raised by the next write or sync.

A page that the last manifest names is not taken again before the next manifest, so that a process may die at any time.
"""

import contextlib
import errno
import mmap
import os
import queue
import sys
import threading
import weakref
import zlib
from collections.abc import Mapping

import torch

from .pools_bmojo import LEAST, Field, Overlay, Pool
from .system_bmojo import OPEN, sync_data, write_at


CHUNK = 1 << 26  # bytes by which a layer's files grow at most, all of them together
EVERY = 16  # full pages of a layer that are brought to disk at a time
WITHOUT_ROOM_AHEAD = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)  # file systems that cannot make room


class Closed(dict):
    """What a closed pool has in the place of its entries."""

    def __missing__(self, name: str):
        raise ValueError(
            f"{name}: the storage that holds these entries was closed, and with it the copies that read them; open it "
            "again, and keep it open for as long as a cache or a copy of it is used."
        )


class Writer:
    """The thread. It ends when `stop` is called or nobody refers to this object any more."""

    def __init__(self):
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = threading.Thread(target=_work, args=(self.jobs,), name="bmojo-storage", daemon=True)
        self.thread.start()
        self.stop = weakref.finalize(self, _stop, self.jobs, self.thread)

    def drain(self) -> None:
        """Wait until everything handed over has been done."""
        done = threading.Event()
        self.jobs.put(done.set)
        while not done.wait(1.0):
            if not self.thread.is_alive():  # the process was forked, or is ending
                raise OSError(errno.EIO, "the thread that writes the storage has ended; open the storage again")


def _work(jobs: queue.SimpleQueue) -> None:
    while True:
        job = jobs.get()
        if job is None:
            return
        job()
        del job  # refers to a pool, which may be waiting to end


def _stop(jobs: queue.SimpleQueue, thread: threading.Thread) -> None:
    jobs.put(None)
    if thread is not threading.current_thread():
        thread.join()


class FilePool(Pool):
    """Pages in the files of one layer.

    Args:
        prefix: path of the files up to the fields' names. fields, page: see `Pool`. keeper: what must live as long as
            the files are used; has the `writer`. pages: how many the files hold already, 0: none, they are made anew.
    """

    def __init__(self, prefix: str, fields: Mapping[str, Field], page: int, keeper, pages: int = 0):
        super().__init__({name: fields[name] for name in sorted(fields)}, page)
        self.prefix, self.keeper = prefix, keeper
        self.lock = threading.Lock()  # around the next two, which the thread writes
        self.sums: dict[int, int] = {}  # crc32 of a full page, one field after the other
        self.pending: dict[int, object] = {}  # pages handed to the thread, each with a mark of its own
        self.waiting: list[int] = []  # full ones that are not handed over yet
        self.durable: set[int] = set()  # pages that the last manifest may name
        self.limbo: list[int] = []  # those of them that nobody refers to
        self.maps: dict[str, mmap.mmap] = {}
        self.around: dict[str, bool] = {}  # whether the system reads ahead in a mapping
        flags = os.O_RDWR | OPEN | (0 if pages else os.O_CREAT | os.O_TRUNC)
        self.files: dict[str, int] = {}
        self.shut = weakref.finalize(self, _close_all, self.files)
        self.shut.atexit = False  # the thread may be at work until then
        for name in self.fields:
            self.files[name] = os.open(f"{prefix}{name}", flags, 0o666)
        if pages:
            for name, file in self.files.items():
                os.ftruncate(file, pages * self.bytes_of(name))
            self._map(pages)

    def bytes_of(self, name: str) -> int:
        """Bytes of a page of one field."""
        return self.page * self.fields[name].nbytes

    # Memory ----------------------------------------------------------------------------------------------------------
    def grow(self, least):
        if not self.shut.alive:
            Closed()[", ".join(self.fields)]
        more = min(self.capacity // 2, CHUNK // self.page_bytes)
        capacity = max(least, self.capacity + max(more, LEAST))
        try:
            for name, file in self.files.items():
                _make_room(file, self.capacity * self.bytes_of(name), capacity * self.bytes_of(name))
            self._map(capacity)
        except OSError as error:
            for name, file in self.files.items():
                with contextlib.suppress(OSError):
                    os.ftruncate(file, self.capacity * self.bytes_of(name))
            raise OSError(
                error.errno,
                f"the storage cannot grow ({os.strerror(error.errno or errno.EIO)}); what was written before is "
                "unchanged and can be read. Make room and read the text on",
                self.prefix,
            ) from error

    def _map(self, capacity: int) -> None:
        """Map the files anew; whoever holds a view of the old mapping keeps it, and it stays right."""
        maps, data = {}, {}
        with torch.inference_mode(False):
            for name, field in self.fields.items():
                maps[name] = mmap.mmap(self.files[name], capacity * self.bytes_of(name))
                flat = torch.frombuffer(maps[name], dtype=field.dtype)
                data[name] = flat.view(capacity, self.page, *field.shape)
        self.maps, self.around = maps, dict.fromkeys(maps, True)
        self.place(data, capacity)

    def close(self) -> None:
        """Give the files up; the entries cannot be read any more, but for views that were handed out."""
        self.data, self.flat, self.views, self.maps = Closed(), Closed(), {}, {}
        self.around = {}
        self.shut()

    def forked(self):
        return Overlay(self)

    # Reading ---------------------------------------------------------------------------------------------------------
    def contents(self, name, page, pages=1):
        if pages > 1:
            self.read_around(name, True)
        return super().contents(name, page, pages)

    def gather(self, name, index, units):
        self.read_around(name, units == 1)
        return super().gather(name, index, units)

    def read_around(self, name: str, around: bool) -> None:
        """Say whether what is read from disk is followed by what stands behind it, or is the few entries of a query.

        Megabytes around each of these would be read otherwise.
        """
        if self.around.get(name, around) != around:
            _advise(self.maps[name], "MADV_NORMAL" if around else "MADV_RANDOM", 0, len(self.maps[name]))
            self.around[name] = around

    # Pages -----------------------------------------------------------------------------------------------------------
    def adopt(self, table: list[list[int]], ends: list[int], sums: dict[int, int]) -> None:
        """Take over the pages of a manifest: every one that `table` does not name is free."""
        used = set().union(*table)
        self.references = [0] * self.capacity
        self.fixed = [self.page if page in sums else 0 for page in range(self.capacity)]
        for row, end in zip(table, ends):
            self.share(row)
            inside = end % self.page
            if inside:
                self.fixed[row[-1]] = max(self.fixed[row[-1]], inside)
        for page in used - sums.keys():  # what was written behind the last sync
            for name in self.fields:
                self.contents(name, page)[self.fixed[page] :] = 0
        self.free = [page for page in range(self.capacity - 1, -1, -1) if page not in used]
        self.sums, self.durable = dict(sums), used

    def freed(self, page):
        (self.limbo if page in self.durable else self.free).append(page)

    def renew(self, page):
        super().renew(page)
        with self.lock:
            self.sums.pop(page, None)
            self.pending.pop(page, None)

    def settle(self, pages):
        self.waiting += [page for page in pages if self.fixed[page] < self.page]
        for page in pages:
            self.fixed[page] = self.page
        if len(self.waiting) >= EVERY:
            batch, self.waiting = [(page, object()) for page in self.waiting], []
            with self.lock:
                self.pending.update(batch)
            self.keeper.writer.jobs.put(lambda: self.flush(batch))

    def flush(self, batch: list[tuple[int, object]]) -> None:
        """Bring full pages to disk; called by the thread."""
        try:
            found = {page: self.sum_of(page, self.page) for page, _ in batch}
            self.persist()
            with self.lock:
                for page, mark in batch:
                    if self.pending.get(page) is mark:  # otherwise it was given back, and maybe taken again
                        self.sums[page] = found[page]
                        del self.pending[page]
            self.let_go([page for page, _ in batch])
        except Exception as error:  # whatever it is, it is for whoever writes
            number = getattr(error, "errno", None) or errno.EIO
            self.failure = OSError(
                number,
                f"full pages could not be brought to disk ({error}); they are still in memory and can be read. Make "
                "room or mend the disk, and go on: the next sync tries again",
                self.prefix,
            )

    def sum_of(self, page: int, entries: int) -> int:
        """Return crc32 of the first `entries` entries of a page, one field after the other."""
        total = 0
        for name, mapped in self.maps.items():
            begin = page * self.bytes_of(name)
            total = zlib.crc32(memoryview(mapped)[begin : begin + entries * self.fields[name].nbytes], total)
        return total

    def fixed_sum(self, page: int) -> int:
        """Return crc32 of a full page, which will not be written in place from now on."""
        with self.lock:
            known = self.sums.get(page)
        if known is None:
            self.fixed[page] = self.page
            known = self.sum_of(page, self.page)
            with self.lock:
                self.sums[page] = known
                self.pending.pop(page, None)
        return known

    def persist(self) -> None:
        """Wait until the disk has what the files hold."""
        if sys.platform != "linux":  # there a mapping is not what a file's sync is about
            for mapped in self.maps.values():
                mapped.flush()
        for file in self.files.values():
            sync_data(file)

    def let_go(self, pages: list[int]) -> None:
        """Give back the memory that pages are mapped to; the files hold them, and reading maps them again."""
        for name, mapped in self.maps.items():
            for page in pages:
                _advise(mapped, "MADV_DONTNEED", page * self.bytes_of(name), (page + 1) * self.bytes_of(name))

    def let_limbo_go(self) -> None:
        """Note that a manifest is on disk that names no page which nobody refers to."""
        limbo, self.limbo = self.limbo, []
        self.durable.difference_update(limbo)
        self.free += limbo


def _advise(mapped: mmap.mmap, advice: str, begin: int, end: int) -> None:
    """Tell the system how bytes begin .. end - 1 of a mapping will be used, as far as they are whole units of it."""
    number, unit = getattr(mmap, advice, None), mmap.PAGESIZE
    begin, end = -(-begin // unit) * unit, end // unit * unit
    if number is not None and begin < end:
        mapped.madvise(number, begin, end - begin)


def _make_room(file: int, begin: int, end: int) -> None:
    """Give a file blocks of the disk for bytes begin .. end - 1, zeros, so that writing to its mapping cannot fail."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, begin, end - begin)
            return
        except OSError as error:
            if error.errno not in WITHOUT_ROOM_AHEAD:
                raise
    zeros = bytes(1 << 20)
    while begin < end:
        begin += write_at(file, zeros[: end - begin], begin)


def _close_all(files: dict[str, int]) -> None:
    for file in files.values():
        os.close(file)
    files.clear()


__all__ = ["FilePool", "Writer"]
