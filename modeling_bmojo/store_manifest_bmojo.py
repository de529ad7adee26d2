"""What a storage's directory says of itself, written whole and checked before it is believed.

    store.json    {"sha256": of what follows, "store": {...}}, the fields of `Manifest`
    index-<n>     one record per full page of a row, in the row's order: layer, row, page, crc32; append-only, the
                  manifest says how much of it counts and what that sums up to
    states-<n>    whatever the caller keeps beside, small

A full page is summed in the index, the open page of a row, as far as the row has entries in it, in the manifest.
"""

import dataclasses
import hashlib
import json
import os
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .files_bmojo import write_whole
from .pools_bmojo import Field
from .system_bmojo import OPEN, read_at


MANIFEST = "store.json"
FORMAT = "bmojo-store-1"
RECORD = struct.Struct("<IIQI")  # layer, row, page, crc32
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int8)
}
OURS = re.compile(r"(states|index)-[1-9][0-9]{0,17}")
LARGEST = 1 << 26  # bytes of a manifest
LARGEST_PAGE = 1 << 20  # entries


@dataclasses.dataclass
class Manifest:
    """One state of a store.

    facts, fingerprint: the caller's. page: P. dtype: the cache's. fields: of each layer, name to (shape, dtype); None
    of them before the first sync. ends: of each layer, entries of each row. open: of each layer, for each row (page,
    crc32) of its open page, or None. index: (name, bytes, crc32). states: (name, sha256).
    """

    facts: str
    fingerprint: str
    page: int
    serial: int = 0
    dtype: str | None = None
    fields: list[dict[str, Any]] | None = None
    ends: list[list[int]] = dataclasses.field(default_factory=list)
    open: list[list[Any]] = dataclasses.field(default_factory=list)
    index: tuple[str, int, int] | None = None
    states: tuple[str, str] | None = None

    def layer_fields(self) -> list[dict[str, Field]]:
        """Return what an entry of each layer holds."""
        return [
            {name: Field(tuple(shape), DTYPES[dtype]) for name, (shape, dtype) in layer.items()}
            for layer in self.fields
        ]


def described_fields(layers: Sequence[Mapping[str, Field]]) -> list[dict[str, Any]]:
    """Return the fields of layers as a manifest has them."""
    return [
        {name: [list(field.shape), str(field.dtype).removeprefix("torch.")] for name, field in layer.items()}
        for layer in layers
    ]


def write_manifest(folder: str, manifest: Manifest) -> None:
    """Replace the manifest of a directory.

    Raises:
        OSError: if it cannot be written; the last one is unchanged then.
    """
    store = {"format": FORMAT, **dataclasses.asdict(manifest)}
    text = json.dumps({"sha256": _digest(store), "store": store}, indent=0)

    def write(partial: str) -> None:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)

    write_whole(os.path.join(folder, MANIFEST), write)


def read_manifest(folder: str) -> Manifest:
    """Return a directory's manifest.

    Raises:
        ValueError: without the directory's name, if it is damaged or of another format.
    """
    path = os.path.join(folder, MANIFEST)
    if os.path.getsize(path) > LARGEST:
        raise ValueError(f"{MANIFEST} has more than {LARGEST:,} bytes: not written here")
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        store, stated = found["store"], found["sha256"]
        written = store.pop("format")
        if written != FORMAT:
            raise ValueError(f"{MANIFEST} is of format {str(written)[:40]!r}, which must be {FORMAT!r}")
        if stated != _digest({"format": written, **store}):
            raise ValueError(f"{MANIFEST} was damaged or changed after it was written: its sha256 differs")
        manifest = Manifest(**store)
        manifest.index, manifest.states = (part and tuple(part) for part in (manifest.index, manifest.states))
        _check(manifest)
    except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{MANIFEST} is damaged ({error!r})") from error
    return manifest


def _digest(store: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(store, sort_keys=True).encode()).hexdigest()


def _check(manifest: Manifest) -> None:
    """Raise ValueError unless every field is what `write_manifest` may have written."""

    def number(value: Any, most: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most

    def need(holds: bool, name: str) -> None:
        if not holds:
            raise ValueError(f"{MANIFEST}: {name}={str(getattr(manifest, name))[:80]!r} cannot be")

    need(isinstance(manifest.facts, str), "facts")
    need(isinstance(manifest.fingerprint, str), "fingerprint")
    need(number(manifest.page, LARGEST_PAGE) and manifest.page > 0, "page")
    need(number(manifest.serial, 1 << 60), "serial")
    if manifest.fields is None:
        return
    need(manifest.dtype in DTYPES, "dtype")
    for layer in manifest.fields:
        for name, (shape, dtype) in layer.items():
            need(re.fullmatch(r"[a-z][a-z_]{0,40}", name) is not None and dtype in DTYPES, "fields")
            need(isinstance(shape, list) and all(number(size, 1 << 20) and size for size in shape), "fields")
    need(len(manifest.ends) == len(manifest.open) == len(manifest.fields), "ends")
    for ends, pages in zip(manifest.ends, manifest.open):
        need(isinstance(ends, list) and all(number(end, 1 << 40) for end in ends), "ends")
        need(len(pages) == len(ends), "open")
        for end, page in zip(ends, pages):
            need((page is None) == (end % manifest.page == 0), "open")
            need(page is None or (number(page[0], 1 << 40) and number(page[1], (1 << 32) - 1)), "open")
    name, size, total = manifest.index
    need(OURS.fullmatch(name) is not None and number(size, 1 << 40) and number(total, (1 << 32) - 1), "index")
    name, digest = manifest.states
    need(OURS.fullmatch(name) is not None and isinstance(digest, str), "states")


def read_index(folder: str, manifest: Manifest) -> tuple[list[list[list[int]]], list[dict[int, int]]]:
    """Return the tables of all layers, open pages included, and the crc32 of each full page, `{page: crc32}`.

    Raises:
        ValueError: without the directory's name, if the index is damaged or does not fit the manifest.
    """
    name, size, total = manifest.index
    try:
        with open(os.path.join(folder, name), "rb") as file:
            data = file.read(size)
    except FileNotFoundError as error:
        raise ValueError(f"{name}, which {MANIFEST} names, is not there") from error
    if len(data) != size or zlib.crc32(data) != total or size % RECORD.size:
        raise ValueError(f"{name} was damaged or cut: its first {size} bytes do not sum up to what {MANIFEST} says")
    tables = [[[] for _ in ends] for ends in manifest.ends]
    sums: list[dict[int, int]] = [{} for _ in tables]
    for layer, row, page, crc in RECORD.iter_unpack(data):
        if layer >= len(tables) or row >= len(tables[layer]) or sums[layer].setdefault(page, crc) != crc:
            raise ValueError(f"{name} speaks of row {row} of layer {layer}, which {MANIFEST} does not have")
        tables[layer][row].append(page)
    for i, (ends, pages) in enumerate(zip(manifest.ends, manifest.open)):
        for row, end, page in zip(tables[i], ends, pages):
            if len(row) != end // manifest.page:
                raise ValueError(f"{name} has {len(row)} pages of a row of layer {i} with {end} entries")
            if page is not None:
                row.append(page[0])
    return tables, sums


def check_pages(folder: str, manifest: Manifest, tables: list[list[list[int]]], sums: list[dict[int, int]]) -> None:
    """Read every page that counts and compare it with its crc32.

    Raises:
        ValueError: without the directory's name, naming the first file and page that differ.
    """
    for i, fields in enumerate(manifest.layer_fields()):
        wanted = {(page, manifest.page): crc for page, crc in sums[i].items()}
        for end, page in zip(manifest.ends[i], manifest.open[i]):
            if page is not None and wanted.setdefault((page[0], end % manifest.page), page[1]) != page[1]:
                raise ValueError(f"{MANIFEST} gives one page of layer {i} two sums")
        count = max((page for row in tables[i] for page in row), default=-1) + 1
        files = {}
        try:
            for name in sorted(fields):
                files[name] = _opened(folder, file_prefix(i) + name, count * manifest.page * fields[name].nbytes)
            for (page, entries), crc in sorted(wanted.items()):
                found = 0
                for name, file in files.items():
                    begin = page * manifest.page * fields[name].nbytes
                    found = zlib.crc32(read_at(file, entries * fields[name].nbytes, begin), found)
                if found != crc:
                    names = ", ".join(file_prefix(i) + name for name in files)
                    raise ValueError(f"page {page} of {names} is damaged: its crc32 is {found:08x} but was {crc:08x}")
        finally:
            for file in files.values():
                os.close(file)


def _opened(folder: str, name: str, least: int) -> int:
    try:
        file = os.open(os.path.join(folder, name), os.O_RDONLY | OPEN)
    except FileNotFoundError as error:
        raise ValueError(f"{name} is not there") from error
    size = os.fstat(file).st_size
    if size < least:
        os.close(file)
        raise ValueError(f"{name} was cut: it has {size} bytes and must have {least} at least")
    return file


def check_origin(manifest: Manifest, fields, facts: str, fingerprint: str | None, dtype: torch.dtype | None) -> None:
    """Raise ValueError unless entries of a manifest are those of this cache; fingerprint None: of any weights."""
    _same(manifest.facts, facts, "facts")
    if fingerprint is not None:
        check_fingerprint(manifest, fingerprint)
    kind = getattr(torch, manifest.dtype)
    if dtype is not None and kind != dtype:
        raise ValueError(f"it holds entries of dtype {kind}, which must be {dtype}, the cache's")
    if manifest.layer_fields() != typed(fields, kind):
        raise ValueError(f"its layers hold {manifest.layer_fields()}, which must be {typed(fields, kind)}")


def check_fingerprint(manifest: Manifest, fingerprint: str) -> None:
    _same(manifest.fingerprint, fingerprint, "weights (check_weights=False takes them), fingerprint")


def check_states(path: str, name: str, digest: str) -> None:
    if not os.path.isfile(os.path.join(path, name)):
        raise ValueError(f"{name}, which {MANIFEST} names, is not there")
    if sha256_of(os.path.join(path, name)) != digest:
        raise ValueError(f"{name} was damaged or changed after it was written: its sha256 differs")


def typed(fields: Sequence[Mapping[str, Field]], dtype: torch.dtype) -> list[dict[str, Field]]:
    """Return fields with `dtype` where they have none."""
    return [{name: Field(tuple(shape), kind or dtype) for name, (shape, kind) in each.items()} for each in fields]


def _same(theirs: str, ours: str, name: str) -> None:
    if theirs != ours:
        at = next((i for i, (a, b) in enumerate(zip(theirs, ours)) if a != b), min(len(theirs), len(ours)))
        near = slice(max(at - 40, 0), at + 40)
        raise ValueError(f"it was written with other {name}: ...{theirs[near]!r}, which must be ...{ours[near]!r}")


def sha256_of(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def file_prefix(layer: int) -> str:
    """Return what the names of a layer's files begin with."""
    return f"layer-{layer:03d}."


__all__ = [
    "MANIFEST",
    "OURS",
    "RECORD",
    "Manifest",
    "check_origin",
    "check_pages",
    "check_states",
    "described_fields",
    "file_prefix",
    "read_index",
    "read_manifest",
    "sha256_of",
    "typed",
    "write_manifest",
]
