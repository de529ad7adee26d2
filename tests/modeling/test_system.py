"""Files as Windows and macOS have them, simulated here: what those systems refuse is refused, and everything works.

The simulated Windows has no fcntl, no pread, pwrite and posix_fallocate, and msvcrt's locks in the place of flock. It
opens no folder, syncs only what is open for writing, and neither replaces, moves nor removes what this process holds
open or mapped, nor cuts a file that is mapped: the open files and mappings are those that Linux lists.
"""

import errno
import fcntl
import os
import shutil
import types
from pathlib import Path

import pytest
import torch

from conversion.common import staging
from modeling_bmojo import (
    BMojoCache,
    PrefixMemory,
    files_bmojo,
    store_files_bmojo,
    store_lock_bmojo,
    system_bmojo,
)
from modeling_bmojo.store_lock_bmojo import LOCK
from tests.modeling.test_rollback import build
from tests.modeling.test_store import P, feed, holds, note, opened


MODULES = (system_bmojo, files_bmojo, store_lock_bmojo, staging)


def held(path) -> bool:
    """Whether this process has a file open or mapped, or one inside a folder."""
    path = os.path.realpath(path)
    names = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            names.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:
            continue  # the listing's own
    names |= mapped()
    return any(name == path or name.startswith(f"{path}/") for name in names)


def mapped() -> set[str]:
    with open("/proc/self/maps", encoding="utf-8") as lines:
        return {line.split(None, 5)[5].strip() for line in lines if len(line.split(None, 5)) == 6}


class Msvcrt:
    """Locks of the first byte: of a handle, not of a process, and gone with `LK_UNLCK` alone."""

    LK_NBLCK, LK_UNLCK = 2, 0

    def __init__(self):
        self.holders: dict[tuple[int, int], int] = {}

    def locking(self, file: int, mode: int, count: int) -> None:
        stat = os.fstat(file)
        place = (stat.st_dev, stat.st_ino)
        assert count == 1 and os.lseek(file, 0, os.SEEK_CUR) == 0, "another byte than the first would be locked"
        if mode == self.LK_UNLCK:
            if self.holders.get(place) != file:
                raise PermissionError(errno.EACCES, "Permission denied")
            del self.holders[place]
        elif place in self.holders:
            raise PermissionError(errno.EACCES, "Permission denied")
        else:
            self.holders[place] = file


@pytest.fixture
def windows(monkeypatch):
    """The system's calls as Windows has them, and the number of waits for a file that was held."""
    real = types.SimpleNamespace(
        open=os.open, fsync=os.fsync, replace=os.replace, remove=os.remove, ftruncate=os.ftruncate, rename=os.rename
    )
    waits = []

    def sharing(path) -> None:
        if held(path):
            raise PermissionError(
                errno.EACCES, "The process cannot access the file because it is being used", str(path)
            )

    def open_file(path, flags, mode=0o777, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real.open(path, flags, mode, **options)

    def fsync(file):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        real.fsync(file)

    def replace(source, target):
        sharing(source)
        if os.path.exists(target):
            sharing(target)
            if os.path.isdir(target):
                raise PermissionError(errno.EACCES, "Access is denied", str(target))
        real.replace(source, target)

    def remove(path):
        sharing(path)
        real.remove(path)

    def ftruncate(file, size):
        if size < os.fstat(file).st_size and os.readlink(f"/proc/self/fd/{file}") in mapped():
            raise PermissionError(errno.EACCES, "The requested operation cannot be performed on a file with a mapping")
        real.ftruncate(file, size)

    for name, value in dict(
        open=open_file, fsync=fsync, replace=replace, rename=replace, remove=remove, unlink=remove, ftruncate=ftruncate
    ).items():
        monkeypatch.setattr(os, name, value)
    for name in ("pread", "pwrite", "posix_fallocate", "fdatasync"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("on Windows, os.kill ends the process that it asks about"))
    monkeypatch.setattr(system_bmojo, "fcntl", None)
    monkeypatch.setattr(system_bmojo, "msvcrt", Msvcrt(), raising=False)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # as there: by names
    for module in MODULES:
        monkeypatch.setattr(module, "WINDOWS", True)
    monkeypatch.setattr(system_bmojo.time, "sleep", waits.append)
    return waits


# Windows -------------------------------------------------------------------------------------------------------------
def test_a_storage_is_written_found_and_written_on(tmp_path, windows):
    with opened(tmp_path / "s") as directory:
        directory.start(1, torch.float32)
        feed(directory, 3 * P + 5)
        directory.sync(note("first"))
        feed(directory, 30 * P)  # the files grow while they are mapped
        directory.sync(note("second"))
    with opened(tmp_path / "s") as directory:
        holds(directory.layers, [33 * P + 5])
        feed(directory, P)
        directory.sync(note("third"))
        holds(directory.layers, [34 * P + 5])


def test_a_second_writer_is_refused_and_the_next_is_not(tmp_path, windows):
    first = opened(tmp_path / "s")
    with pytest.raises(ValueError, match="in use by another cache"):
        opened(tmp_path / "s")
    first.close()
    opened(tmp_path / "s").close()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "store.json").write_text("damaged", encoding="utf-8")
    with pytest.raises(ValueError, match="storage="):
        opened(tmp_path / "other")
    assert not (tmp_path / "other" / LOCK).exists(), "a directory that was refused has a lock now"
    with pytest.raises(ValueError, match="storage="):
        opened(tmp_path / "other")


def test_what_somebody_holds_open_stays_until_the_directory_is_opened_again(tmp_path, windows):
    with opened(tmp_path / "s") as directory:
        directory.start(1, torch.float32)
        feed(directory, P)
        directory.sync(note("first"))
        with open(directory.states, encoding="utf-8"):
            directory.sync(note("second"))
            assert (tmp_path / "s" / "states-1").exists()
            directory.close()
            with opened(tmp_path / "s") as again:
                holds(again.layers, [P])
            assert (tmp_path / "s" / "states-1").exists()
    opened(tmp_path / "s").close()
    assert not (tmp_path / "s" / "states-1").exists()


def test_a_file_is_replaced_when_its_reader_is_done(tmp_path, windows, monkeypatch):
    target = tmp_path / "file"
    target.write_text("old", encoding="utf-8")
    reader = target.open(encoding="utf-8")
    with pytest.raises(OSError, match=r"could not be written .*what stood there before is unchanged"):
        files_bmojo.write_whole(target, lambda partial: Path(partial).write_text("new", encoding="utf-8"))
    assert len(windows) == len(system_bmojo.WAITS) and 1 < sum(windows) < 5
    assert target.read_text(encoding="utf-8") == "old" and os.listdir(tmp_path) == ["file"]

    monkeypatch.setattr(system_bmojo.time, "sleep", lambda seconds: reader.close())
    files_bmojo.write_whole(target, lambda partial: Path(partial).write_text("new", encoding="utf-8"))
    assert target.read_text(encoding="utf-8") == "new" and os.listdir(tmp_path) == ["file"]


def test_memories_are_saved_loaded_and_saved_again(tmp_path, windows):
    model = build()
    ids = torch.arange(12)[None] % model.config.vocab_size
    prefixes = PrefixMemory(model, tmp_path / "prefixes")
    prefixes.read(ids)
    path = tmp_path / "cache"
    for length in (8, 12):
        cache = BMojoCache(model.config)
        with torch.no_grad():
            model(ids[:, :length], past_key_values=cache)
        cache.save(path)
        loaded = BMojoCache.load(path, model.config)
        assert loaded.get_seq_length() == length
    assert prefixes.longest(torch.cat([ids, ids], 1)).get_seq_length() == 12
    (name,) = (tmp_path / "prefixes").glob("*.safetensors")
    with open(name, "rb"):
        prefixes._remove(str(name))
        assert name.exists()
    prefixes._remove(str(name))
    prefixes._remove(str(name))
    assert not name.exists()


def test_an_output_appears_whole_has_one_writer_and_is_replaced(tmp_path, windows):
    output = tmp_path / "out"
    for text in ("one", "two"):
        with staging.sole_writer(output):
            with pytest.raises(ValueError, match="another process is writing it"), staging.sole_writer(output):
                pass
            with staging.staged_folder(output) as partial:
                (partial / "file").write_text(text, encoding="utf-8")
        assert (output / "file").read_text(encoding="utf-8") == text and os.listdir(tmp_path) == ["out"]
    refused = pytest.raises(OSError, match="cannot be written")
    with (output / "file").open("rb"), staging.sole_writer(output), refused, staging.staged_folder(output) as partial:
        (partial / "file").write_text("three", encoding="utf-8")
    assert (output / "file").read_text(encoding="utf-8") == "two" and os.listdir(tmp_path) == ["out"]


def test_a_system_without_locks_is_told_so(tmp_path, windows, monkeypatch):
    monkeypatch.setattr(system_bmojo, "msvcrt", None)
    with pytest.raises(ValueError, match="cannot lock a directory; keep the entries in host memory"):
        opened(tmp_path / "s")
    assert os.listdir(tmp_path) == []


# macOS ---------------------------------------------------------------------------------------------------------------
FULL = 51  # F_FULLFSYNC


@pytest.fixture
def macos(monkeypatch):
    """fcntl with the full sync, which notes what it is asked to sync; no fdatasync, no posix_fallocate."""
    said = types.SimpleNamespace(synced=[], fail=None)

    def full(file, command):
        assert command == FULL
        if said.fail:
            raise OSError(said.fail, os.strerror(said.fail))
        said.synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}")))

    names = {name: getattr(fcntl, name) for name in ("flock", "LOCK_EX", "LOCK_NB")}
    monkeypatch.setattr(system_bmojo, "fcntl", types.SimpleNamespace(**names, F_FULLFSYNC=FULL, fcntl=full))
    monkeypatch.setattr(store_files_bmojo.sys, "platform", "darwin")
    for name in ("posix_fallocate", "fdatasync"):
        monkeypatch.delattr(os, name)
    return said


def test_every_file_reaches_the_drive_before_what_names_it(tmp_path, macos):
    with opened(tmp_path / "s") as directory:
        directory.start(1, torch.float32)
        feed(directory, P + 3)
        macos.synced.clear()
        directory.sync(note("first"))
        data, after = macos.synced[:-3], macos.synced[-3:]
        assert {name.partition(".")[0] for name in data} == {"layer-000", "layer-002"}
        assert after[:2] == ["index-1", "states-1"] and after[2].startswith("store.json.partial-")
    with opened(tmp_path / "s") as directory:
        holds(directory.layers, [P + 3])


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOTTY])
def test_a_file_system_without_full_sync_gets_a_plain_one(tmp_path, macos, monkeypatch, number):
    synced, macos.fail = [], number
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}"))))
    files_bmojo.write_whole(tmp_path / "file", lambda partial: Path(partial).write_text("x", encoding="utf-8"))
    assert synced[0].startswith("file.partial-") and synced[1] == tmp_path.name


def test_a_disk_that_fails_is_not_taken_for_one_without_full_sync(tmp_path, macos):
    macos.fail = errno.EIO
    with pytest.raises(OSError, match="could not be written"):
        files_bmojo.write_whole(tmp_path / "file", lambda partial: Path(partial).write_text("x", encoding="utf-8"))
    assert os.listdir(tmp_path) == []
