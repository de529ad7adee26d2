"""Weights on disk, read a few rows at a time and written one shard at a time: memory never holds a whole checkpoint.

`SafetensorsFiles` and `PickledFiles` know names, shapes and dtypes of a folder's tensors from the files' headers and
read rows of one tensor at a time; between two calls no file is mapped. `write_shards` builds and saves one shard after
another. Every defect is a `ValueError` that names the file.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from .files import read_json, write_json


WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
PICKLE_FILE, PICKLE_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"
SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SKETCH = ".self_attn.sketch."  # in the name of every tensor of a sketch of keys
BLOCK_BYTES = 32 * 2**20  # rows that are copied, cast and looked at together


class Weights(Protocol):
    """Tensors by name: their shapes and dtypes (`"float32"`), and rows of one of them."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor: ...


class LazyTensors(Mapping[str, torch.Tensor]):
    """A mapping that makes each value when it is asked for, and keeps none."""

    def __init__(self, names: Iterator[str], make: Callable[[str], torch.Tensor]):
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def in_float32(name: str) -> bool:
    """Whether a tensor of ours is float32 whatever the model's dtype: SSM scalars, sketches of keys."""
    return ".scalars." in name or SKETCH in name


def most_common_dtype(dtypes: Mapping[str, str]) -> str:
    """Return the dtype of most of the tensors."""
    return Counter(dtypes.values()).most_common(1)[0][0] if dtypes else "float32"


def row_blocks(rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    """Return ranges that cover `rows` rows, of about BLOCK_BYTES each."""
    step = max(1, BLOCK_BYTES // max(row_bytes, 1))
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a contiguous CPU tensor's bytes."""
    return hashlib.sha256(tensor.flatten().view(torch.uint8).numpy()).hexdigest()


def open_weights(path: Path, what: str, allow_pickle: bool = False) -> Weights:
    """Return the weights in a folder: safetensors, or pickles where there are none and `allow_pickle` says so.

    Args:
        what: the folder's name in messages.

    Raises:
        ValueError: no weights, pickles that are not allowed, or files that are missing or damaged.
    """
    if (path / INDEX_FILE).is_file() or (path / WEIGHTS_FILE).is_file():
        return SafetensorsFiles(path, what)
    pickled = sorted(file.name for file in path.glob("*.bin"))
    if (path / PICKLE_INDEX_FILE).is_file() or (path / PICKLE_FILE).is_file():
        if allow_pickle:
            return PickledFiles(path, what)
        raise ValueError(
            f"{what} needs {WEIGHTS_FILE}, or shards with {INDEX_FILE}; found {', '.join(pickled)}: pickles can run "
            "code when they are loaded. Load and save the model once with save_pretrained, or set allow_pickle=true."
        )
    raise ValueError(
        f"{what} needs {WEIGHTS_FILE}, or shards with {INDEX_FILE}; "
        + (f"found {', '.join(pickled)}: load and save it once with save_pretrained." if pickled else "none found.")
    )


class SafetensorsFiles:
    """The tensors of a folder's `model.safetensors`, or else of the shards that its index names."""

    def __init__(self, path: Path, what: str):
        self._what, self._file_of = what, {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file in shard_files(path, WEIGHTS_FILE, INDEX_FILE, what):
            with self._naming(file):
                self._read_header(file)
        check_index(path, WEIGHTS_FILE, INDEX_FILE, self._file_of, what)

    @contextmanager
    def _naming(self, file: Path) -> Iterator[None]:
        """Errors of safetensors name no file."""
        try:
            yield
        except SafetensorError as error:
            raise ValueError(
                f"{self._what}: {file.name} is damaged or truncated ({error}); fetch or write it again."
            ) from error

    def _read_header(self, file: Path) -> None:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is not iterable)
                header = tensors.get_slice(name)
                self._file_of[name], self.shapes[name] = file, tuple(header.get_shape())
                self.dtypes[name] = SAFETENSORS_DTYPES.get(header.get_dtype(), header.get_dtype())

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows `[start, stop)` of a tensor, all of them by default."""
        file = self._file_of[name]
        with self._naming(file), safe_open(file, framework="pt") as tensors:
            if start == 0 and stop in (None, *self.shapes[name][:1]):
                return tensors.get_tensor(name)
            return tensors.get_slice(name)[start:stop]


class PickledFiles:
    """The tensors of a folder's `pytorch_model.bin` files, mapped into memory, by torch's restricted unpickler."""

    def __init__(self, path: Path, what: str):
        self._what, self._file_of = what, {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for file in shard_files(path, PICKLE_FILE, PICKLE_INDEX_FILE, what):
            for name, tensor in self._load(file).items():
                if not isinstance(tensor, torch.Tensor):
                    raise ValueError(f"{what}: {file.name} holds {name!r}, which is no tensor; give a state dict.")
                self._file_of[name], self.shapes[name] = file, tuple(tensor.shape)
                self.dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        check_index(path, PICKLE_FILE, PICKLE_INDEX_FILE, self._file_of, what)

    def _load(self, file: Path) -> dict[str, Any]:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # the unpickler raises whatever damaged bytes lead it to
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{self._what}: {file.name} does not load as weights only, mapped into memory ({reason}); load and "
                "save the model once with save_pretrained where you trust it."
            ) from error
        if not isinstance(found, dict):
            raise ValueError(f"{self._what}: {file.name} holds a {type(found).__name__}; it must be a state dict.")
        return found

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows `[start, stop)` of a tensor, all of them by default."""
        return self._load(self._file_of[name])[name][start:stop]


def shard_files(path: Path, single: str, index: str, what: str) -> list[Path]:
    """Return the files that hold a folder's weights: the single one, or those that its index names.

    Where a folder has both, transformers reads the single one and never looks at the index; so do we.

    Raises:
        ValueError: the index is damaged, or names a file that is not there.
    """
    if (path / single).is_file():
        return [path / single]
    files = [path / name for name in sorted(set(read_weight_map(path / index, what).values()))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{what}: shard {file.name} is missing, though {index} names it.")
    return files


def read_weight_map(index: Path, what: str) -> dict[str, str]:
    """Tensor to file, as an index states it; every file by a name inside the index's folder.

    A file may be a link that leads elsewhere, as in the hub's cache: that is the work of who made the folder. A name is
    the work of who wrote the index, and might read any file of this machine.

    Raises:
        ValueError: the index is damaged, has no map of names to names, or names a file outside its folder.
    """
    weight_map = read_json(index, what).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{what}: {index.name} has no weight_map; the file is damaged.")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"{what}: {index.name} gives {name!r} as the file of {tensor}; it must be a file's name.")
        named = PureWindowsPath(name)  # which knows both separators, and drives
        if named.anchor or ".." in named.parts:
            raise ValueError(
                f"{what}: {index.name} gives {name!r} as the file of {tensor}, which leads out of its folder; only "
                "names inside it are read. Put the file into the folder and name it so."
            )
    return weight_map


def check_index(path: Path, single: str, index: str, found: Mapping[str, Path], what: str) -> None:
    """Refuse an index that names tensors which no shard holds (ValueError); beside a single file it is not read."""
    if (path / single).is_file():
        return
    absent = sorted(set(read_weight_map(path / index, what)) - set(found))
    if absent:
        raise ValueError(f"{what}: {index} names tensors that no shard holds: {absent}.")


def write_shards(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    make: Callable[[str], torch.Tensor],
    max_shard_size: str,
) -> None:
    """Write `model.safetensors`, or shards with an index, as `save_pretrained` would; holds one shard at a time.

    Args:
        shapes, dtypes: of every tensor, in the order in which they are wanted.
        make: the tensor of a name, contiguous and on the CPU; called once for each.
        max_shard_size: bytes of a shard at most ("2GB"); a larger tensor has one for itself.
    """
    empty = {name: torch.empty(shape, dtype=dtypes[name], device="meta") for name, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(
        empty, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    with tqdm(total=len(empty), desc="Writing tensors", unit="tensor") as bar:
        for file, names in split.filename_to_tensors.items():
            shard = {}
            for name in names:
                shard[name] = make(name)
                bar.update()
            save_file(shard, folder / file, metadata={"format": "pt"})
            del shard  # before the next one is begun
    if split.is_sharded:
        parameters = sum(tensor.numel() for tensor in empty.values())
        metadata = {"total_parameters": parameters, **split.metadata}
        weight_map = dict(sorted(split.tensor_to_filename.items()))
        write_json(folder / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})
