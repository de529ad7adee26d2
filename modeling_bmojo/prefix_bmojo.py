"""Texts that were read once and are gone on with from then on: a folder of caches, by the tokens that they have read.

    prefixes.json                   whose they are: the configuration's facts, the dtype, weights and adapters
    prefix-<T>-<hash>.safetensors   the cache after T tokens (`BMojoCache.save`); hash: of those tokens

A cache of constant size makes this cheap: what a file holds does not depend on how long the text is, unless every token
is stored. Any number of processes may use a folder at once: files are written whole, and one that has been removed
meanwhile is not there.

Shapes: T tokens.
"""

import contextlib
import hashlib
import json
import os
import re
from typing import Any

import torch
from transformers.utils import logging

from .cache_bmojo import BMojoCache
from .cache_facts_bmojo import facts_of
from .compat_bmojo import CACHE_NAME
from .fields_bmojo import is_int
from .files_bmojo import write_whole
from .system_bmojo import remove
from .weights_bmojo import weights_fingerprint


logger = logging.get_logger(__name__)

MANIFEST = "prefixes.json"
FORMAT = "bmojo-prefixes-2"  # 1: weights were told apart by samples alone
NAME = re.compile(r"prefix-([1-9][0-9]*)-([0-9a-f]{32})\.safetensors")
PIECE = 2048  # tokens that are read at a time


class PrefixMemory:
    """What a model has read, kept in a folder, so that a prompt that begins with it is not read again.

    Args:
        model: a B'MOJO model, with or without a PEFT adapter. folder: a new one, or one that this model wrote.
        max_bytes: of all files; those that were not used for the longest time go first. None: no limit.

    Raises:
        ValueError: if the model is of another kind, max_bytes is no number of bytes, or the folder holds something else
            or what another model, other weights, another adapter or dtype has read. OSError: if it cannot be written.

    Example:

    ```python
    >>> prefixes = PrefixMemory(model, "prefixes")
    >>> prefixes.read(document_ids)                                       # once; other processes find it
    >>> model.generate(document_and_question_ids, prefix_memory=prefixes)   # reads the question alone
    ```
    """

    def __init__(self, model: torch.nn.Module, folder: str | os.PathLike, max_bytes: int | None = None):
        if max_bytes is not None and (not is_int(max_bytes) or max_bytes < 1):
            raise ValueError(f"max_bytes={max_bytes!r}: must be an integer >= 1, or None for no limit.")
        # By name, not by class: code loaded with trust_remote_code has classes of its own.
        self.reader = next((m for m in model.modules() if type(m).__name__ == "BMojoModel"), None)
        if self.reader is None:
            raise ValueError(f"model is a {type(model).__name__}: must be a B'MOJO model; graft one, or load one.")
        self.folder, self.max_bytes = os.path.abspath(os.fspath(folder)), max_bytes
        self._open()

    # Asking ----------------------------------------------------------------------------------------------------------
    def longest(self, input_ids: torch.Tensor) -> BMojoCache | None:
        """Return a cache that has read the longest known beginning of a text, but not all of it; None if none is known.

        Args:
            input_ids: `[1, T]`.

        Raises:
            ValueError: for another shape, a model that has changed, or a damaged file. OSError: if the folder is gone.
        """
        self._require_same()
        return self._longest(_one_row(input_ids), input_ids.shape[1] - 1)

    def read(self, input_ids: torch.Tensor, every: int | None = None) -> BMojoCache:
        """Read a text, from its longest known beginning on, keep what was read, and return it.

        Args:
            input_ids: `[1, T]`. every: keep it after so many tokens too, and twice as many and so on, for texts that
                share a beginning; None: at the end alone.

        Raises:
            ValueError: for another shape, a model that has changed or is in training mode, or a damaged file. OSError:
                if the folder is gone or a file cannot be written.
        """
        if every is not None and (not is_int(every) or every < 1):
            raise ValueError(f"every={every!r}: must be an integer >= 1, tokens, or None for the end alone.")
        self._require_same()
        if self.reader.training:
            raise ValueError("the model is in training mode, whose dropout would be kept; call model.eval() first.")
        ids, total = _one_row(input_ids), input_ids.shape[1]
        cache = self._longest(ids, total) or BMojoCache(self.reader.config)
        while (here := cache.get_seq_length()) < total:
            upto = min(here + PIECE, total, total if every is None else (here // every + 1) * every)
            with torch.no_grad(), torch.autocast(self.reader.device.type, enabled=False):
                self.reader(input_ids[:, here:upto].to(self.reader.device), **{CACHE_NAME: cache})
            if upto == total or (every is not None and upto % every == 0):
                self._keep(cache, ids[:upto])
        return cache

    @property
    def lengths(self) -> list[int]:
        """Return how many tokens each file has read, from few to many."""
        return sorted(length for length, _, _ in self._files())

    @property
    def nbytes(self) -> int:
        """Return the bytes of all files."""
        return sum(entry.st_size for _, _, entry in self._files())

    # Files -----------------------------------------------------------------------------------------------------------
    def _longest(self, ids: torch.Tensor, most: int) -> BMojoCache | None:
        for length in sorted({length for length, _, _ in self._files() if length <= most}, reverse=True):
            path = self._path(ids[:length])
            if not os.path.exists(path):
                continue
            try:
                cache = BMojoCache.load(path, self.reader.config, self.reader.device)
            except ValueError as error:
                if not os.path.exists(path):
                    continue  # somebody needed its room
                name = os.path.basename(path)
                raise ValueError(
                    f"folder={self.folder!r}: remove {name} to have that text read again: {error}"
                ) from error
            with contextlib.suppress(OSError):
                os.utime(path)
            return cache
        return None

    def _keep(self, cache: BMojoCache, ids: torch.Tensor) -> None:
        path = self._path(ids)
        cache.save(path)
        if self.max_bytes is None:
            return
        files = {os.path.join(self.folder, name): stat for _, name, stat in self._files()}
        size = files[path].st_size if path in files else 0
        if size > self.max_bytes:
            logger.warning_once(f"max_bytes={self.max_bytes}: one text alone takes more, so nothing is kept.")
            self._remove(path)
            return
        excess = sum(stat.st_size for stat in files.values()) - self.max_bytes
        for old in sorted(files.keys() - {path}, key=lambda old: files[old].st_mtime_ns):
            if excess <= 0:
                break
            self._remove(old)
            excess -= files[old].st_size

    @staticmethod
    def _remove(path: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            remove(path)  # or leave it, where another process is reading it

    def _files(self) -> list[tuple[int, str, os.stat_result]]:
        """Return tokens, name and stat of each."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if match := NAME.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        found.append((int(match[1]), entry.name, entry.stat()))
        return found

    def _path(self, ids: torch.Tensor) -> str:
        digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:32]
        return os.path.join(self.folder, f"prefix-{len(ids)}-{digest}.safetensors")

    # Whose they are --------------------------------------------------------------------------------------------------
    def _model(self) -> dict[str, Any]:
        facts = facts_of(self.reader.config)
        return {
            "format": FORMAT,
            "dtype": str(self.reader.dtype).removeprefix("torch."),
            "weights": weights_fingerprint(self.reader),
            "facts": json.loads(json.dumps(facts)),
        }

    def _open(self) -> None:
        self.model, name = self._model(), os.path.join(self.folder, MANIFEST)
        if not os.path.exists(name):
            if os.path.exists(self.folder) and not os.path.isdir(self.folder):
                raise ValueError(f"folder={self.folder!r}: is a file; give the name of a folder, new or of this model.")
            others = os.listdir(self.folder) if os.path.isdir(self.folder) else []
            if [other for other in others if not other.startswith(MANIFEST)]:  # another process may be writing it
                raise ValueError(f"folder={self.folder!r}: is not empty and has no {MANIFEST}; give a new folder.")
            os.makedirs(self.folder, exist_ok=True)
            write_whole(name, self._write_manifest)
        try:  # what was written too: another model may have been faster
            with open(name, encoding="utf-8") as file:
                written = json.load(file)
            different = _difference(written, self.model)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"folder={self.folder!r}: {MANIFEST} is damaged ({error}); give a new folder.") from error
        if different:
            raise ValueError(
                f"folder={self.folder!r}: what it holds was read with {different}; give the folder that this model "
                "wrote, or a new one."
            )

    def _write_manifest(self, path: str) -> None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.model, file, indent=1)

    def _require_same(self) -> None:
        different = _difference(self.model, self._model())
        if different:
            raise ValueError(
                f"folder={self.folder!r}: the model was opened with {different}, and has changed since; make another "
                "PrefixMemory of it, with another folder."
            )


def _difference(written: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Say in what a model differs from the one that wrote; None: in nothing."""
    if written["format"] != now["format"]:
        return f"format {written['format']!r}, and this is {now['format']!r}"
    for name in sorted(written["facts"].keys() | now["facts"].keys()):
        theirs, ours = (each["facts"].get(name) for each in (written, now))
        if theirs != ours:
            return f"{name}={theirs!r}, and the model has {ours!r}"
    if written["dtype"] != now["dtype"]:
        return f"dtype {written['dtype']}, and the model has {now['dtype']}"
    return None if written["weights"] == now["weights"] else "other weights, or another adapter"


def _one_row(input_ids: torch.Tensor) -> torch.Tensor:
    """Return the tokens `[T]` int64 on the CPU."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2 or len(input_ids) != 1 or not input_ids.numel():
        shape = list(input_ids.shape) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids of shape {shape}: must be [1, tokens], one text without pads; read row by row.")
    return input_ids[0].to("cpu", torch.int64).contiguous()


__all__ = ["PrefixMemory"]
