"""The directory of a storage: what the last sync left is what is found, whatever ended the process or spoiled the disk.

Every entry is a function of its row's name and its position, so that no test has to remember what it wrote.
"""

import contextlib
import copy
import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch

from modeling_bmojo import files_bmojo, store_bmojo, store_files_bmojo
from modeling_bmojo.pages_bmojo import Field, Pages
from modeling_bmojo.store_bmojo import Directory
from modeling_bmojo.store_manifest_bmojo import read_manifest, write_manifest


ROOT = Path(__file__).resolve().parents[2]
P, G, D = 8, 2, 16  # an entry of keys has as many bytes as 32 numbers
FIELDS = [{"keys": Field((G, D), None), "values": Field((G, D), None)}, {}, {"keys": Field((G, D), None)}]


def content(layer: int, field: str, row: int, first: int, count: int) -> torch.Tensor:
    """Entries `[1, count, G, D]` of a row, by position."""
    position = torch.arange(first, first + count, dtype=torch.int64)
    mixed = (position * 7919 + row * 104729 + layer * 31 + (field == "keys") * 17) % 100003
    return (mixed.float()[:, None, None] + torch.arange(G * D).view(G, D) / 64)[None]


def feed(directory: Directory, count: int, rows=(0,), firsts=None) -> None:
    """Give every row `count` entries more."""
    for i, pages in enumerate(directory.layers):
        if pages is not None:
            begin = pages.lengths if firsts is None else firsts
            new = {f: torch.cat([content(i, f, r, n, count) for r, n in zip(rows, begin)]) for f in pages.fields}
            pages.write(torch.tensor(begin), **new)


def holds(layers: list[Pages | None], lengths: list[int], rows=(0,)) -> None:
    """Layers hold what `feed` gave these rows, read in every way."""
    for i, pages in enumerate(layers):
        if pages is None:
            continue
        assert list(pages.lengths) == list(lengths)
        for field in pages.fields:
            for b, (row, end) in enumerate(zip(rows, lengths)):
                if end:
                    wanted = content(i, field, row, 0, end)[0].transpose(0, 1)
                    assert torch.equal(pages.dense(field, end)[b], wanted)
                    place = torch.tensor([0, end - 1, end // 2, (end - 1) // P * P])
                    found = pages.read(field, place.expand(len(rows), G, -1))[b]
                    assert torch.equal(found, wanted[:, place])


def note(text: str):
    """What writes the small states."""

    def write(path: str) -> None:
        Path(path).write_text(text)

    return write


def opened(path, **changed) -> Directory:
    arguments = {"fields": FIELDS, "facts": "facts of a model", "fingerprint": "weights", "page": P} | changed
    return Directory.open(path, **arguments)


@pytest.fixture
def store(tmp_path):
    """A path where 3 P + 5 entries were synced and 2 P more were not."""
    path = tmp_path / "store"
    with opened(path) as directory:
        directory.start(1, torch.float32)
        feed(directory, 3 * P + 5)
        directory.sync(note("first"))
        feed(directory, 2 * P)
    return path


def say(*words) -> None:
    """Tell the parent, in one piece: whoever is killed has said a line or not."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


RUNNER = """
import json, os, sys, traceback
import tests.modeling.test_store as names
for line in sys.stdin:
    code, path = json.loads(line)
    child = os.fork()
    if child == 0:
        names.say("child", os.getpid())
        try:
            sys.argv = ["", path]
            exec(code, dict(vars(names)))
        except BaseException:
            names.say(traceback.format_exc().replace(chr(10), " "))
            os._exit(1)
        os._exit(0)
    names.say("dead", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def children():
    """Runs code in a new process and yields what it says, (word, number); imports cost their time once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", RUNNER],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    ) as parent:

        def run(code: str, path):
            parent.stdin.write(json.dumps([code, str(path)]) + "\n")
            parent.stdin.flush()
            for line in parent.stdout:
                word, _, rest = line.strip().partition(" ")
                yield (word, int(rest)) if word in ("child", "ready", "try", "done", "dead") else ("says", line)
                if word == "dead":
                    return

        yield run
        os.killpg(parent.pid, signal.SIGKILL)  # what a failed test has left running as well


def snapshot(path) -> dict[str, bytes]:
    return {name: (Path(path) / name).read_bytes() for name in sorted(os.listdir(path))}


# What is found -------------------------------------------------------------------------------------------------------
def test_what_was_synced_is_found_and_what_came_later_is_not(store):
    with opened(store) as directory:
        holds(directory.layers, [3 * P + 5])
        assert Path(directory.states).read_text() == "first" and directory.dtype == torch.float32
        assert directory.layers[1] is None
        assert os.path.getsize(store / "layer-000.keys") == 4 * P * G * D * 4
        feed(directory, P)
        directory.sync(note("second"))
    with opened(store) as directory:
        holds(directory.layers, [4 * P + 5])
        assert Path(directory.states).read_text() == "second"
    assert sorted(p.name for p in store.iterdir()) == [
        "index-1",
        "layer-000.keys",
        "layer-000.values",
        "layer-002.keys",
        "states-2",
        "store.json",
        "store.lock",
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_is_kept_bit_by_bit(tmp_path, dtype):
    new = torch.randn(2, 2 * P + 3, G, D, dtype=dtype)
    with opened(tmp_path / "s", fields=[{"keys": Field((G, D), None), "codes": Field((3,), torch.int8)}]) as directory:
        (pages,) = directory.start(2, dtype)
        pages.write(0, keys=new, codes=torch.ones(2, 2 * P + 3, 3))
        directory.sync(note(""))
    with opened(tmp_path / "s", fields=[{"codes": Field((3,), torch.int8), "keys": Field((G, D), None)}]) as directory:
        (pages,) = directory.layers
        assert torch.equal(pages.dense("keys", 2 * P + 3).transpose(1, 2), new)
        assert pages.dense("codes", 5).dtype == torch.int8 and bool((pages.dense("codes", 5) == 1).all())


@pytest.mark.parametrize("seed", range(6))
def test_random_histories_with_syncs_and_openings(tmp_path, seed):
    """Writes, forks, cuts, resets and copies between syncs; reopened now and then, it is always the last sync."""
    chance = random.Random(seed)
    directory, rows, lengths = opened(tmp_path / "s"), [0, 1], [0, 0]
    directory.start(2, torch.float32)
    last, copies = None, []
    for step in range(60):
        action = chance.choice(["feed"] * 6 + ["select", "cut", "sync", "sync", "copy", "reopen", "start"])
        if action == "feed":
            count, back = chance.choice([1, 1, 2, P - 1, P, P + 1, 5 * P]), chance.choice([0, 0, 3])
            firsts = [max(n - back, 0) for n in lengths]
            feed(directory, count, rows, firsts)
            lengths = [max(n, first + count) for n, first in zip(lengths, firsts)]
        elif action == "select":
            index = [chance.randrange(len(rows)) for _ in range(chance.randint(1, 3))]
            for pages in directory.layers:
                if pages is not None:
                    pages.select(torch.tensor(index))
            rows, lengths = [rows[b] for b in index], [lengths[b] for b in index]
        elif action == "cut":
            lengths = [max(n - chance.randint(0, P), 0) for n in lengths]
            for pages in directory.layers:
                if pages is not None:
                    pages.cut(lengths)
        elif action == "sync":
            directory.sync(note(str(step)))
            last = (list(rows), list(lengths), str(step))
        elif action == "copy":
            copies = [*copies[-1:], (copy.deepcopy(directory.layers[0]), list(rows), list(lengths))]
        elif action == "reopen" and last is not None:
            directory.close()
            copies = []
            directory = opened(tmp_path / "s")
            rows, lengths, text = list(last[0]), list(last[1]), last[2]
            assert Path(directory.states).read_text() == text
        elif action == "start":
            rows, lengths = list(range(chance.randint(1, 2))), [0] * len(rows)
            lengths = [0] * len(rows)
            directory.start(len(rows), torch.float32)
        holds(directory.layers, lengths, rows)
        for pages, theirs, ends in copies:
            holds([pages], ends, theirs)
    directory.close()


SYNCING = """
directory = opened(sys.argv[1])
n = directory.layers[0].lengths[0] if directory.layers else 0
if directory.layers is None:
    directory.start(1, torch.float32)
say("ready", n)
while True:
    feed(directory, 1 + n % (3 * P))
    n = directory.layers[0].lengths[0]
    if n % 5 == 0:
        directory.layers[0].select([0, 0])
        directory.layers[0].select([1])
    if n > 3000:
        directory.start(1, torch.float32)
        n = 0
    say("try", n)
    directory.sync(note(str(n)))
    say("done", n)
"""


def test_killed_at_random_moments_it_holds_the_last_sync(tmp_path, children):
    """A process writes and syncs in a loop and says, after each sync, what it synced; 20 times it is killed."""
    chance, path, synced, moments = random.Random(0), tmp_path / "s", {0}, set()
    for _ in range(20):
        timer = None
        for word, number in children(SYNCING, path):
            if word == "child":
                child = number
            elif word == "ready":
                assert number in synced, "what was found when it was opened is no sync"
                done = tried = number
                timer = threading.Timer(chance.uniform(0.0, 0.1), os.kill, (child, signal.SIGKILL))
                timer.start()
            elif word == "try":
                tried = number
            elif word == "done":
                done = number
            elif word == "dead":
                assert number == -signal.SIGKILL
        synced = {done, tried}
        moments.add((done, tried))
        if read_manifest(str(path)).fields is not None:
            with opened(path) as directory:
                (length,) = directory.layers[0].lengths
                assert length in synced and Path(directory.states).read_text() == str(length)
                holds(directory.layers, [length])
            synced = {length}
    assert len(moments) > 10


def test_pads_written_over_after_a_sync_are_what_they_were(store):
    """What the manifest sums stays as it is on disk, in full pages and in the open one, until the next sync."""
    directory = opened(store)
    length = 3 * P + 5
    pads = {f: torch.full((1, 20 * P + 6, G, D), -1.0) for f in ("keys", "values")}
    for pages in (directory.layers[0], directory.layers[2]):
        pages.write(length, **{f: pads[f] for f in pages.fields})
    directory.sync(note("pads"))
    feed(directory, 20 * P + 6, firsts=[length])
    twin = store.parent / "twin"
    shutil.copytree(store, twin)
    with opened(twin) as other:
        assert other.layers[0].lengths == (length + 20 * P + 6,)
        keys = other.layers[0].dense("keys", length + 20 * P + 6)
        assert bool((keys[:, :, length:] == -1).all())
        other.layers[0].cut([length]), other.layers[2].cut([length])
        holds(other.layers, [length])
    holds(directory.layers, [length + 20 * P + 6])
    directory.sync(note("real"))
    directory.close()
    with opened(store) as directory:
        holds(directory.layers, [length + 20 * P + 6])


def test_what_came_after_the_last_sync_is_gone(store):
    """The rest of the open page is zeros, and files of a sync that did not come to its end are removed."""
    for name in ("states-7", "index-9"):
        (store / name).write_text("stray")
    with opened(store) as directory:
        assert bool((directory.layers[0].dense("keys", 4 * P)[:, :, 3 * P + 5 :] == 0).all())
        assert {"states-7", "index-9"}.isdisjoint(os.listdir(store))
    new = store.parent / "new"
    opened(new).close()
    (new / "states-1").write_text("stray")
    opened(new).close()
    assert sorted(os.listdir(new)) == ["store.json", "store.lock"]


def test_free_pages_of_a_directory_are_found_when_it_is_opened(store):
    """Ten texts one after the other, each in an opening of its own, need no more room than two."""
    sizes = []
    for n in range(10):
        with opened(store) as directory:
            directory.start(1, torch.float32)
            feed(directory, 30 * P, rows=(n,))
            directory.sync(note(""))
            holds(directory.layers, [30 * P], rows=(n,))
        sizes.append(os.path.getsize(store / "layer-000.keys"))
    assert max(sizes) <= 2 * sizes[0]


# What is refused -----------------------------------------------------------------------------------------------------
def test_one_flipped_bit_is_refused_wherever_it_counts(store):
    """Every file but the lock, 25 places each; behind what was synced nothing counts."""
    good = snapshot(store)
    chance = random.Random(0)
    for name in [n for n in good if n != "store.lock"]:
        size = len(good[name])
        if name.startswith("layer"):
            size = (3 * P + 5) * G * D * 4
        for place in {0, size - 1, *(chance.randrange(size) for _ in range(25))}:
            data = bytearray(good[name])
            data[place] ^= 1 << chance.randrange(8)
            (store / name).write_bytes(data)
            before = snapshot(store)
            with pytest.raises(ValueError, match=r"storage='.*store': .*(damaged|format|speaks)"):
                opened(store)
            assert snapshot(store) == before
        (store / name).write_bytes(good[name])
    with opened(store) as directory:
        holds(directory.layers, [3 * P + 5])


@pytest.mark.parametrize(
    "change, what",
    [
        ({"facts": "facts of another"}, "written with other facts: .*'facts of a model', which must be .*another'"),
        ({"fingerprint": "other"}, r"other weights \(check_weights=False takes them\), fingerprint"),
        ({"dtype": torch.bfloat16}, "entries of dtype torch.float32, which must be torch.bfloat16"),
        ({"fields": FIELDS[:2]}, "its layers hold"),
        ({"fields": [FIELDS[0], {}, {"keys": Field((G, D + 1), None)}]}, "its layers hold"),
        ({"fields": [FIELDS[0], FIELDS[2], FIELDS[2]]}, "its layers hold"),
    ],
)
def test_what_another_model_wrote_is_refused(store, change, what):
    (store / "store.lock").unlink()  # as in a copy of a directory
    before = snapshot(store)
    with pytest.raises(ValueError, match=what):
        opened(store, **change)
    assert snapshot(store) == before


def test_other_weights_are_taken_where_that_is_asked_for(store):
    with opened(store, fingerprint="other", check_weights=False) as directory:
        holds(directory.layers, [3 * P + 5])
        directory.sync(note("again"))
    with pytest.raises(ValueError, match="other weights"):
        opened(store)
    opened(store, fingerprint="other").close()


@pytest.mark.parametrize("name", ["index-1", "states-1", "layer-000.keys", "layer-002.keys"])
def test_a_missing_or_shorter_file_is_refused(store, name):
    data = (store / name).read_bytes()
    wanted = (3 * P + 5) * G * D * 4 if name.startswith("layer") else len(data)
    for change in (lambda: (store / name).write_bytes(data[: wanted - 1]), (store / name).unlink):
        change()
        before = snapshot(store)
        with pytest.raises(ValueError, match=f"storage=.*{name}.*(is not there|was cut|or cut|was damaged)"):
            opened(store)
        assert snapshot(store) == before


def test_planted_manifests_are_refused(store):
    """With a right checksum, but saying what no sync says."""
    plants = [
        ("page", 0),
        ("page", P + 1),
        ("page", "8"),
        ("ends", [[10**9], [], [3 * P + 5]]),
        ("ends", [[-1], [], [3 * P + 5]]),
        ("ends", [[3 * P + 5, 0], [], [3 * P + 5]]),
        ("ends", [[3 * P + 5]]),
        ("ends", None),
        ("open", [[(1 << 39, 0)], [], [(3, 0)]]),
        ("open", [[None], [], [None]]),
        ("open", [[], [], []]),
        ("index", ("../index-1", 80, 0)),
        ("index", None),
        ("states", ("store.json", "")),
        ("states", ("states-2", "")),
        ("dtype", "float8"),
        ("fields", [{"../keys": [[G, D], "float32"]}, {}, {}]),
        ("fields", [{"keys": [[G, -D], "float32"]}, {}, {}]),
        ("fields", 3),
    ]
    manifest = read_manifest(str(store))
    for name, value in plants:
        planted = copy.deepcopy(manifest)
        setattr(planted, name, value)
        write_manifest(str(store), planted)
        before = snapshot(store)
        with pytest.raises(ValueError, match="storage="):
            opened(store)
        assert snapshot(store) == before
    for text in ("", "[]", "{}", "null", "[" * 100_000, '{"store": 3, "sha256": ""}', "\xff"):
        (store / "store.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=r"storage=.*store.json"):
            opened(store)
    write_manifest(str(store), manifest)
    opened(store).close()


def test_what_is_no_storage_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("x")
    lost = tmp_path / "lost"
    lost.mkdir()
    (lost / "layer-000.keys").write_text("entries whose manifest was lost")
    for name, what in {
        "file": "must be a directory",
        "folder": "has 'thesis.txt' and no store.json",
        "lost": "has 'layer-000.keys' and no",
        "none/deeper": "there is no folder",
    }.items():
        with pytest.raises(ValueError, match=what):
            opened(tmp_path / name)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    opened(tmp_path / "empty").close()
    opened(tmp_path / "empty").close()  # nothing was synced: new again, whoever asks
    opened(tmp_path / "empty", facts="of another").close()


# One writer ----------------------------------------------------------------------------------------------------------
def test_one_writer_in_this_process_and_in_others(store, children):
    first = opened(store)
    before = snapshot(store)
    with pytest.raises(ValueError, match="in use by another cache"):
        opened(store)
    *said, (_, status) = children("opened(sys.argv[1])", store)
    assert status == 1 and "in use by another cache" in str(said)
    assert snapshot(store) == before
    holds(first.layers, [3 * P + 5])
    del first  # as `close` does
    opened(store).close()


def test_the_lock_lives_as_long_as_a_copy_is_read(store):
    directory = opened(store)
    fork = copy.deepcopy(directory.layers[0])
    del directory
    holds([fork], [3 * P + 5])
    with pytest.raises(ValueError, match="in use"):
        opened(store)
    del fork
    opened(store).close()


def test_a_closed_directory_says_so(store):
    directory = opened(store)
    fork, pages = copy.deepcopy(directory.layers[0]), directory.layers[0]
    view = pages.dense("keys", P)
    wanted = view.clone()
    directory.close()
    directory.close()
    for wrong in (
        lambda: pages.dense("keys", 1),
        lambda: pages.read("keys", torch.zeros(1, G, 1, dtype=torch.int64)),
        lambda: fork.read("keys", torch.zeros(1, G, 1, dtype=torch.int64)),
        lambda: feed(directory, 1),
        lambda: feed(directory, 20 * P),
        lambda: directory.sync(note("")),
        lambda: directory.start(1, torch.float32),
    ):
        with pytest.raises(ValueError, match="closed"):
            wrong()
    assert torch.equal(view, wanted), "what was handed out stays"
    assert directory.closed


def test_a_directory_is_not_copied_but_its_pages_are(store):
    directory = opened(store)
    for wrong in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(ValueError, match="a directory has one writer"):
            wrong(directory)
    pickled = pickle.loads(pickle.dumps(directory.layers[0]))
    joined = Pages.joined([directory.layers[0], copy.deepcopy(directory.layers[0])])
    directory.close()
    holds([pickled], [3 * P + 5])
    holds([joined], [3 * P + 5] * 2, [0, 0])


def test_a_copy_reads_what_is_shared_and_keeps_its_own(store):
    """Neither sees what the other writes, and the files hold nothing of the copy."""
    directory = opened(store)
    pages = directory.layers[0]
    fork = copy.deepcopy(pages)
    n = 3 * P + 5
    fork.write(n, **{f: content(9, f, 9, n, 4 * P) for f in pages.fields})
    feed(directory, 2 * P)
    holds(directory.layers, [n + 2 * P])
    assert torch.equal(fork.dense("keys", n)[0], content(0, "keys", 0, 0, n)[0].transpose(0, 1))
    assert torch.equal(fork.dense("keys", n + 4 * P)[0, :, n:], content(9, "keys", 9, n, 4 * P)[0].transpose(0, 1))
    deeper = copy.deepcopy(fork)
    directory.start(1, torch.float32)
    feed(directory, 30 * P, rows=(3,))
    assert torch.equal(deeper.dense("values", n)[0], content(0, "values", 0, 0, n)[0].transpose(0, 1))
    directory.close()


# Disks ---------------------------------------------------------------------------------------------------------------
def test_a_full_disk_at_growth_is_an_error_and_nothing_is_lost(store, monkeypatch):
    directory = opened(store)

    def full(file, begin, count):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        for _ in range(2):
            with pytest.raises(OSError, match=r"the storage cannot grow \(No space left on device\)") as raised:
                feed(directory, 50 * P)
            assert raised.value.errno == errno.ENOSPC
        holds(directory.layers, [3 * P + 5])
    feed(directory, 50 * P)
    holds(directory.layers, [53 * P + 5])
    directory.sync(note("after"))
    directory.close()
    with opened(store) as directory:
        holds(directory.layers, [53 * P + 5])


FILLING = """
directory = opened(sys.argv[1])
directory.start(1, torch.float32)
feed(directory, 100)
directory.sync(note("100"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
try:
    while True:
        feed(directory, P)
except OSError as error:
    assert error.errno == errno.EFBIG
say("done", directory.layers[0].lengths[0])
holds(directory.layers[:1], list(directory.layers[0].lengths))
directory.sync(note("more"))
"""


def test_files_that_may_not_grow(tmp_path, children):
    """The system itself refuses: the mapping is never written where the disk gave no room."""
    said = list(children(FILLING, tmp_path / "s"))
    assert said[-1] == ("dead", 0), said
    length = dict(said)["done"]
    assert length > 100
    with opened(tmp_path / "s") as directory:
        holds(directory.layers[:1], [length])


def test_a_system_that_cannot_make_room_ahead_gets_zeros(tmp_path, monkeypatch):
    def cannot(file, begin, count):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    with opened(tmp_path / "s") as directory:
        directory.start(1, torch.float32)
        feed(directory, 30 * P)
        size = os.stat(tmp_path / "s" / "layer-000.keys")
        assert size.st_blocks * 512 >= size.st_size
        holds(directory.layers, [30 * P])


@pytest.mark.parametrize("where", ["data", "states", "index", "manifest", "caller"])
def test_a_sync_that_fails_leaves_the_last_one(store, monkeypatch, where):
    """Whatever step fails, a process that ends then has lost nothing; the next sync succeeds."""
    directory = opened(store)
    feed(directory, 3 * P)
    before = read_manifest(str(store))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "data":
            patch.setattr(store_files_bmojo, "sync_data", full)
        elif where == "states":
            patch.setattr(Directory, "_to_disk", full)
        elif where == "index":
            patch.setattr(os, "pwrite", full)
        elif where == "manifest":
            patch.setattr(files_bmojo.os, "replace", full)
        with pytest.raises(OSError, match=r"the storage could not be synced .*No space left on device"):
            directory.sync(full if where == "caller" else note("lost"))
    assert read_manifest(str(store)) == before
    twin = store.parent / "twin"
    shutil.copytree(store, twin)
    with opened(twin) as other:
        holds(other.layers, [3 * P + 5])
        assert Path(other.states).read_text() == "first"
        assert sorted(n for n in os.listdir(twin) if "-" in n and "layer" not in n) == ["index-1", "states-1"]
    holds(directory.layers, [6 * P + 5])
    feed(directory, P)
    directory.sync(note("second"))
    directory.close()
    with opened(store) as directory:
        holds(directory.layers, [7 * P + 5])


def test_an_interrupt_right_behind_the_manifest_is_no_failure(store, monkeypatch):
    """Ctrl-C when the new manifest is on disk: what it names is not removed, and the next sync goes on from it."""
    directory = opened(store)
    feed(directory, P)

    def interrupted(folder, manifest):
        write_manifest(folder, manifest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_bmojo, "write_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            directory.sync(note("second"))
    shutil.copytree(store, store.parent / "twin")
    with opened(store.parent / "twin") as other:
        holds(other.layers, [4 * P + 5])
        assert Path(other.states).read_text() == "second"
    feed(directory, P)
    directory.sync(note("third"))
    directory.close()
    with opened(store) as directory:
        holds(directory.layers, [5 * P + 5])


@pytest.mark.parametrize("by", ["write", "sync"])
def test_what_the_thread_could_not_do_is_raised_once(store, monkeypatch, by):
    directory = opened(store)

    def broken(file):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(store_files_bmojo, "sync_data", broken)
        feed(directory, 20 * P)
        feed(directory, P)
        directory.keeper.writer.drain()
    length = 24 * P + 5
    holds(directory.layers, [length])
    for pages in (directory.layers[0], directory.layers[2]):
        with pytest.raises(OSError, match=r"full pages could not be brought to disk .*Input/output error"):
            pages.write(length, **{f: content(0, f, 0, length, 1) for f in pages.fields}) if by == "write" else (
                directory.sync(note(""))
            )
    holds(directory.layers, [length])
    feed(directory, P)
    directory.sync(note("mended"))
    directory.close()
    with opened(store) as directory:
        holds(directory.layers, [length + P])


def test_a_directory_that_vanishes_can_be_read_on(store):
    directory = opened(store)
    shutil.rmtree(store)
    feed(directory, 40 * P)
    holds(directory.layers, [43 * P + 5])
    with pytest.raises(OSError, match=r"the storage could not be synced .*was removed or replaced while in use"):
        directory.sync(note("nowhere"))
    store.mkdir()
    with pytest.raises(OSError, match="removed or replaced"):
        directory.sync(note("nowhere"))
    holds(directory.layers, [43 * P + 5])
    directory.close()


# The thread and what a sync costs ------------------------------------------------------------------------------------
def test_what_is_read_does_not_wait_for_the_thread(store, monkeypatch):
    """With a disk that never answers, everything is written and read at once."""
    answer = threading.Event()
    directory = opened(store)
    monkeypatch.setattr(store_files_bmojo, "sync_data", lambda file: answer.wait(30))
    begun = time.monotonic()
    feed(directory, 60 * P)
    feed(directory, P)
    holds(directory.layers, [64 * P + 5])
    assert time.monotonic() - begun < 10 and directory.layers[0].pool.pending
    answer.set()
    directory.keeper.writer.drain()
    assert not directory.layers[0].pool.pending
    directory.close()


def test_pages_given_back_while_the_thread_sums_them(store, monkeypatch):
    """A page that is taken again before the thread is done has the sum of what it holds now."""
    answer = threading.Event()
    directory = opened(store)
    with monkeypatch.context() as patch:
        patch.setattr(store_files_bmojo, "sync_data", lambda file: answer.wait(30))
        for _ in range(3):
            feed(directory, 40 * P)
            feed(directory, P)
            directory.start(1, torch.float32)
        feed(directory, 45 * P, rows=(7,))
        answer.set()
        directory.sync(note("seven"))
    directory.close()
    with opened(store) as directory:
        holds(directory.layers, [45 * P], rows=(7,))


def test_a_sync_sums_what_is_new_and_nothing_else(store, monkeypatch):
    """Of 200 pages that the thread has summed, a sync reads none but the open one, and appends to the index."""
    directory = opened(store)
    feed(directory, 200 * P)
    directory.sync(note(""))
    size, summed = (store / "index-1").stat().st_size, []
    monkeypatch.setattr(store_files_bmojo.zlib, "crc32", lambda d, s=0, f=zlib.crc32: summed.append(len(d)) or f(d, s))
    feed(directory, 1)
    directory.sync(note(""))
    assert (store / "index-1").stat().st_size == size
    assert sum(summed) <= 3 * P * G * D * 4
    feed(directory, 2 * P)
    directory.sync(note(""))
    assert (store / "index-1").stat().st_size == size + 4 * 20
    assert len((store / "store.json").read_bytes()) < 4000
    directory.close()


def test_entries_given_back_are_written_over_only_after_the_next_sync(store):
    """Until then the last sync counts: a reset and a new text do not touch what it names."""
    directory = opened(store)
    directory.start(1, torch.float32)
    feed(directory, 10 * P, rows=(5,))
    twin = store.parent / "twin"
    shutil.copytree(store, twin)
    with opened(twin) as other:
        holds(other.layers, [3 * P + 5])
    directory.sync(note("new"))
    size = os.path.getsize(store / "layer-000.keys")
    for n in range(12):
        directory.start(1, torch.float32)
        feed(directory, 10 * P, rows=(n,))
        directory.sync(note("new"))
    assert os.path.getsize(store / "layer-000.keys") <= 2 * size
    directory.close()


def test_memory_does_not_follow_the_text(tmp_path):
    """64 MB of entries are written and synced; the process keeps a quarter of them at most."""
    fields, page = [{"keys": Field((4, 64), None)}], 256
    with opened(tmp_path / "s", fields=fields, page=page) as directory:
        (pages,) = directory.start(1, torch.float32)
        new = torch.randn(1, 2048, 4, 64)
        pages.write(0, keys=new)
        before = resident()
        for n in range(1, 32):
            pages.write(n * 2048, keys=new)
        directory.sync(note(""))
        assert resident() - before < 16 << 20
        assert torch.equal(pages.dense("keys", 2048)[0].transpose(0, 1), new[0])
        assert pages.nbytes == 32 * 2048 * 1024


def resident() -> int:
    """Bytes of this process that are in memory."""
    if not os.path.exists("/proc/self/statm"):
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_fork_does_not_write_its_parent_s_directory(store):
    with opened(store) as directory, contextlib.ExitStack() as stack:
        stack.callback(setattr, directory, "process", directory.process)
        directory.process += 1  # as a child sees it
        with pytest.raises(ValueError, match="which forked this one"):
            directory.sync(note(""))


def test_start_again_needs_the_dtype_of_the_entries(store):
    with opened(store) as directory:
        with pytest.raises(ValueError, match=r"dtype=torch.bfloat16: must be torch.float32"):
            directory.start(1, torch.bfloat16)
        holds(directory.layers, [3 * P + 5])
    with opened(store.parent / "new") as directory, pytest.raises(ValueError, match="nothing was started"):
        directory.sync(note(""))


def test_the_manifest_is_a_text_that_anyone_can_read(store):
    found = json.loads((store / "store.json").read_text())["store"]
    assert found["format"] == "bmojo-store-1" and found["facts"] == "facts of a model"
    assert found["ends"] == [[3 * P + 5], [], [3 * P + 5]] and found["page"] == P and found["dtype"] == "float32"
