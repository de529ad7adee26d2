"""The directory in which a cache keeps the keys and values of every token that it has read.

    store.lock             held by the one who writes
    store.json, index-<n>  what counts (`store_manifest_bmojo`)
    states-<n>             the caller's small states, as they were at the last sync
    layer-003.keys         the entries of a layer (`store_files_bmojo`)

What a directory holds after a process died, at whatever moment, is what its last sync left; opening it checks every
byte of that and forgets what came later. A copy of a layer's pages reads them and keeps its own in host memory, for as
long as the directory is open.
"""

import contextlib
import errno
import os
import zlib
from collections.abc import Callable, Mapping, Sequence

import torch

from .pages_bmojo import Pages
from .pools_bmojo import PAGE, Field
from .store_files_bmojo import FilePool
from .store_lock_bmojo import Keeper, make_folder
from .store_manifest_bmojo import (
    MANIFEST,
    OURS,
    RECORD,
    Manifest,
    check_fingerprint,
    check_origin,
    check_pages,
    check_states,
    described_fields,
    file_prefix,
    read_index,
    read_manifest,
    sha256_of,
    typed,
    write_manifest,
)
from .system_bmojo import OPEN, remove, sync, sync_path, write_at


class Directory:
    """A directory that this object alone writes. Made by `open`.

    layers: Pages of each layer, None where it has no fields; None before `start`. states: path of the small states of
    the last sync, None before the first.
    """

    def __init__(self, path: str, keeper: Keeper, manifest: Manifest, fields: list[dict[str, Field]]):
        self.path, self.keeper, self.manifest, self.fields = path, keeper, manifest, fields
        self.layers: list[Pages | None] | None = None
        self.process, self.folder = os.getpid(), os.stat(path)
        self._logged: tuple[int | None, list] = (None, [])  # sync, and what its index holds

    @classmethod
    def open(
        cls,
        path: str | os.PathLike,
        fields: Sequence[Mapping[str, Field]],
        facts: str,
        fingerprint: str | None = None,
        check_weights: bool = True,
        dtype: torch.dtype | None = None,
        page: int = PAGE,
    ) -> "Directory":
        """Open a directory, a new one if it is empty or not there; one that is refused stays as it was.

        Args:
            fields: what an entry of each layer holds, `{}`: the layer stores nothing; a dtype of None is the cache's.
            facts, fingerprint: what the entries depend on: the configuration; the weights. check_weights: whether the
            second must be as it was; None: it is not known yet (`claim` says it). dtype: the cache's, None: whatever it
            was. page: P of a new directory.

        Raises:
            ValueError: naming the directory and what is wrong: not a storage, another model's, damaged, in use.
            OSError: if it cannot be read or written.
        """
        path = os.path.abspath(os.fspath(path))
        made = make_folder(path)
        keeper = None
        try:
            keeper = Keeper(path)
            fields = [dict(layer) for layer in fields]
            if not os.path.exists(os.path.join(path, MANIFEST)):
                directory = cls(path, keeper, Manifest(facts, fingerprint or "", page), fields)
                write_manifest(path, directory.manifest)
                return directory
            manifest = read_manifest(path)
            if manifest.fields is None:  # nothing was ever synced
                directory = cls(path, keeper, Manifest(facts, fingerprint or "", page, manifest.serial), fields)
                directory._remove_strays()
                return directory
            check_origin(manifest, fields, facts, fingerprint if check_weights else None, dtype)
            tables, sums = read_index(path, manifest)
            check_pages(path, manifest, tables, sums)
            check_states(path, *manifest.states)
            manifest.fingerprint = manifest.fingerprint if fingerprint is None else fingerprint
            directory = cls(path, keeper, manifest, fields)
            directory._restore(tables, sums)
            return directory
        except BaseException as error:
            if keeper is not None:
                keeper.undo()
            if made:
                with contextlib.suppress(OSError):
                    os.rmdir(path)
            if isinstance(error, ValueError) and "storage=" not in str(error):
                text = str(error).rstrip(".")
                raise ValueError(
                    f"storage={path!r}: {text}; give the directory that this model wrote, or a new one."
                ) from error
            raise

    def _restore(self, tables: list[list[list[int]]], sums: list[dict[int, int]]) -> None:
        """Make the layers' pages of what was read and checked; from here on the disk changes."""
        self._remove_strays()
        self.layers = []
        for i, layer in enumerate(self.manifest.layer_fields()):
            if not layer:
                self.layers.append(None)
                continue
            count = max((page for row in tables[i] for page in row), default=-1) + 1
            pool = FilePool(self._prefix(i), layer, self.manifest.page, self.keeper, count)
            pool.adopt(tables[i], self.manifest.ends[i], sums[i])
            pages = Pages(layer, 0, pool=pool)
            pages.adopt(tables[i], list(self.manifest.ends[i]))
            self.layers.append(pages)
        self._log_is_complete()

    def _prefix(self, layer: int) -> str:
        return os.path.join(self.path, file_prefix(layer))

    def _remove_strays(self) -> None:
        """Remove what a sync that did not come to its end has left."""
        named = {part[0] for part in (self.manifest.index, self.manifest.states) if part}
        for name in os.listdir(self.path):
            if OURS.fullmatch(name) and name not in named:
                remove(os.path.join(self.path, name))

    # What there is ---------------------------------------------------------------------------------------------------
    @property
    def states(self) -> str | None:
        return os.path.join(self.path, self.manifest.states[0]) if self.manifest.states else None

    @property
    def dtype(self) -> torch.dtype | None:
        """The cache's dtype, None before `start`."""
        return getattr(torch, self.manifest.dtype) if self.manifest.dtype else None

    @property
    def closed(self) -> bool:
        return not self.keeper.release.alive

    def start(self, batch: int, dtype: torch.dtype) -> list[Pages | None]:
        """Begin anew with `batch` empty rows; what was synced stays on disk until the next sync.

        Raises:
            ValueError: if the directory is closed, or has entries of another dtype. OSError: see `open`.
        """
        self._check_open()
        if self.layers is not None:
            if dtype != self.dtype:
                raise ValueError(
                    f"storage={self.path!r}: dtype={dtype}: must be {self.dtype}, that of its entries; run the model "
                    "in that dtype, or give a new directory."
                )
            for pages in self.layers:
                if pages is not None:
                    pages.clear(batch)
            return self.layers
        made: list[Pages | None] = []
        for i, layer in enumerate(typed(self.fields, dtype)):
            pool = FilePool(self._prefix(i), layer, self.manifest.page, self.keeper) if layer else None
            made.append(Pages(layer, batch, pool=pool) if layer else None)
        self.manifest.dtype = str(dtype).removeprefix("torch.")
        self.layers = made
        return made

    def claim(self, fingerprint: str, check_weights: bool = True) -> None:
        """Say which weights what follows is of.

        Raises:
            ValueError: if the entries are of others and `check_weights` says that they may not be.
        """
        if check_weights and self.manifest.fingerprint:
            try:
                check_fingerprint(self.manifest, fingerprint)
            except ValueError as error:
                raise ValueError(
                    f"storage={self.path!r}: {error}; give the directory that this model wrote, or a new one."
                ) from error
        self.manifest.fingerprint = fingerprint

    # Syncing ---------------------------------------------------------------------------------------------------------
    def sync(self, write_states: Callable[[str], None]) -> None:
        """Make durable what the rows hold now, and the caller's states with it.

        Args:
            write_states: called with the path of a new file, writes it.

        Raises:
            ValueError: if the directory is closed, or was not started. OSError: if the disk does not take it; the last
                sync counts then, everything can still be read, and the next sync tries again.
        """
        self._check_open()
        if self.layers is None:
            raise ValueError(f"storage={self.path!r}: nothing was started, so nothing is synced; read a text first.")
        self.keeper.writer.drain()
        for pages in self.layers:
            if pages is not None:
                pages.pool.report()
        serial = self.manifest.serial + 1
        states = os.path.join(self.path, f"states-{serial}")
        fresh = [states]
        try:
            self._check_there()
            index, open_pages = self._sync_pages(serial, fresh)
            write_states(states)
            self._to_disk(states)
            manifest = Manifest(
                facts=self.manifest.facts,
                fingerprint=self.manifest.fingerprint,
                page=self.manifest.page,
                serial=serial,
                dtype=self.manifest.dtype,
                fields=described_fields([{} if each is None else each.fields for each in self.layers]),
                ends=[[] if each is None else list(each.ends) for each in self.layers],
                open=open_pages,
                index=index,
                states=(os.path.basename(states), sha256_of(states)),
            )
            self._to_disk(self.path)
            write_manifest(self.path, manifest)
        except BaseException as error:
            if self._names(serial):
                self._follow(manifest)  # interrupted when it was done
                raise
            for path in fresh:
                with contextlib.suppress(OSError):
                    os.remove(path)
            if isinstance(error, OSError):
                raise OSError(
                    error.errno or errno.EIO,
                    f"the storage could not be synced ({error}); its last sync counts, and everything read since is "
                    "still in memory. Make room, or give another directory, and sync again",
                    self.path,
                ) from error
            raise
        self._follow(manifest)

    def _names(self, serial: int) -> bool:
        """Whether the manifest on disk is that of sync number `serial`."""
        with contextlib.suppress(OSError, ValueError):
            return read_manifest(self.path).serial == serial
        return False

    def _sync_pages(self, serial: int, fresh: list[str]) -> tuple[tuple[str, int, int], list[list]]:
        """Bring entries and index to disk; returns what the manifest says of the index and of open pages."""
        last, logged = self._logged
        grown = last == self.manifest.serial and all(
            pages is None or (pages.epoch, pages.batch) == (epoch, len(counts))
            for pages, (epoch, counts) in zip(self.layers, logged)
        )
        records, found = [], []
        for i, pages in enumerate(self.layers):
            open_pages = []
            for b, (row, end) in enumerate(zip(pages.table, pages.ends) if pages is not None else ()):
                pool, (full, inside) = pages.pool, divmod(end, pages.page)
                new = row[logged[i][1][b] if grown else 0 : full]
                records += [RECORD.pack(i, b, page, pool.fixed_sum(page)) for page in new]
                pool.durable.update(new, row[full:])  # from before the manifest names them
                if inside:
                    pool.fixed[row[full]] = max(pool.fixed[row[full]], inside)
                open_pages.append((row[full], pool.sum_of(row[full], inside)) if inside else None)
            found.append(open_pages)
            if pages is not None:
                pages.pool.persist()
        more = b"".join(records)
        name, size, total = self.manifest.index if grown else (f"index-{serial}", 0, 0)
        path = os.path.join(self.path, name)
        if not grown:
            fresh.append(path)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | OPEN, 0o666)
        try:
            at = size
            while at < size + len(more):
                at += write_at(file, more[at - size :], at)
            sync(file)
        finally:
            os.close(file)
        return (name, size + len(more), zlib.crc32(more, total)), found

    def _follow(self, manifest: Manifest) -> None:
        """Take the manifest that is on disk now for the last, and let go of what only the one before needed."""
        old, self.manifest = self.manifest, manifest
        self._log_is_complete()
        for pages in self.layers:
            if pages is not None:
                pages.pool.let_limbo_go()
        for part in {old.states, old.index} - {manifest.states, manifest.index, None}:
            if part[0] != manifest.index[0]:
                with contextlib.suppress(OSError):  # what stays is removed when the directory is opened
                    os.remove(os.path.join(self.path, part[0]))

    def _log_is_complete(self) -> None:
        """Note what the index of the manifest holds: of each layer the epoch, and full pages of each row."""
        logged = [
            (0, []) if each is None else (each.epoch, [end // each.page for end in each.ends]) for each in self.layers
        ]
        self._logged = (self.manifest.serial, logged)

    def _to_disk(self, path: str) -> None:
        sync_path(path)

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(f"storage={self.path!r}: was closed; open it again.")
        if os.getpid() != self.process:
            raise ValueError(
                f"storage={self.path!r}: belongs to process {self.process}, which forked this one; a directory has one "
                "writer: open another one here."
            )

    def _check_there(self) -> None:
        if not os.path.isdir(self.path) or not os.path.samestat(os.stat(self.path), self.folder):
            raise FileNotFoundError(errno.ENOENT, "the directory was removed or replaced while in use", self.path)

    # The end ---------------------------------------------------------------------------------------------------------
    def close(self) -> None:
        """Let another open the directory. What was not synced is lost, and copies of the pages cannot be read."""
        self.keeper.close()
        for pages in self.layers or ():
            if pages is not None:
                pages.pool.close()

    def __enter__(self) -> "Directory":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def __reduce__(self):
        raise ValueError(
            f"storage={self.path!r}: a directory has one writer, so it is neither copied nor pickled; copy its pages."
        )


__all__ = ["Directory"]
