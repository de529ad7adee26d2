"""Files: written whole or not at all, read with errors that name them, told apart by SHA-256.

Writing beside the final name and renaming is the package's own (`files_bmojo.write_whole`), which any number may use at
once. An output here has one writer (`staging.sole_writer`), who may therefore remove whatever others left beside it.
`writing` turns what full, read-only or failing disks raise through Python, safetensors and torch into one error that
names the file. Folders that appear whole are staging.py's business.
"""

import errno
import glob
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modeling_bmojo import system_bmojo
from modeling_bmojo.files_bmojo import write_whole


READ = 2**20  # bytes that are read at a time
# What `partial_name` adds to a name, and what `write_whole` does.
PARTIAL = re.compile(r"\.partial-([0-9a-f]{12}|[0-9a-f]{8}-[1-9]\d*-[0-9a-f]{8})")
# What a disk says that takes no more, or nothing at all; of a library's error only the number may be left, or a phrase.
DISK_ERRORS = (
    {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
    | {getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quotas
)
NUMBERED = re.compile(r"os error (\d+)|[Ee]rrno (\d+)")
TORCH_WRITER = re.compile(r"PytorchStreamWriter failed|unexpected pos \d+")


class WriteError(OSError):
    """A file or folder that cannot be written; the text is the whole message."""


def disk_error(error: BaseException | None, folder: Path | None = None) -> str | None:
    """Return what the disk said, in the error or in one that led to it; None where it is about something else.

    Args:
        folder: where was being written. A missing permission counts only there: elsewhere it is about reading.
    """
    while error is not None:
        number = error.errno if isinstance(error, OSError) else _number_in(str(error))
        if number in DISK_ERRORS and not (number in (errno.EACCES, errno.EPERM) and _elsewhere(error, folder)):
            return os.strerror(number)
        if isinstance(error, RuntimeError) and TORCH_WRITER.search(str(error)):
            return "torch could not write all of it, as on a full disk"
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _number_in(text: str) -> int | None:
    found = NUMBERED.search(text)
    return None if found is None else int(found[1] or found[2])


def _elsewhere(error: BaseException, folder: Path | None) -> bool:
    name = getattr(error, "filename", None)
    if folder is None or not isinstance(name, str):
        return folder is None
    return not Path(name).absolute().is_relative_to(folder.absolute().parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """While `path`, a file or a folder, is written.

    Raises:
        WriteError: the disk takes it not, in one message with the name; other errors pass as they are.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:  # safetensors, torch, pyarrow and the system raise types of their own
        reason = disk_error(error, path)
        if reason is None:
            raise
        raise WriteError(
            f"{str(path)!r} cannot be written: {reason}; free some space, see to the permissions or write elsewhere, "
            "and run it again."
        ) from error


def partial_name(path: Path) -> Path:
    """Return a name beside `path` that nothing has yet."""
    return path.with_name(f"{path.name}.partial-{uuid.uuid4().hex[:12]}")


def leftovers(path: Path) -> list[Path]:
    """Return what earlier writers of `path` left beside it under such names."""
    found = path.parent.glob(f"{glob.escape(path.name)}.partial-*")
    return sorted(item for item in found if PARTIAL.fullmatch(item.name[len(path.name) :]))


def write_file(path: Path, write: Callable[[str], None]) -> None:
    """Let `write(partial)` fill a file beside `path`, which then becomes `path`; whole or not at all.

    Raises:
        WriteError: see `writing`.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in leftovers(path):
            left.unlink()
        write_whole(path, write)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_file(path, lambda partial: Path(partial).write_text(text, encoding="utf-8"))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file as people read it, whole or not at all."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the object in a JSON file (ValueError where it holds none). what: the file's folder in messages."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: {path.name} is not valid JSON ({error}).") from error
    except OSError as error:
        raise ValueError(f"{what}: {path.name} cannot be read ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"{what}: {path.name} must hold a JSON object.")
    return values


def rename(path: Path, name: Path) -> None:
    """Give a file or a folder another name; Windows is asked until nobody holds it open."""
    system_bmojo.replace(path, name)


def sync(path: Path) -> None:
    """Wait until a file's contents are on the disk: a rename may otherwise outlive them in a power cut."""
    with path.open("rb+") as opened:
        system_bmojo.sync(opened.fileno())


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while part := opened.read(READ):
            digest.update(part)
    return digest.hexdigest()
