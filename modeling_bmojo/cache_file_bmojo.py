"""A cache's file: one safetensors file of all states, with a checksum, checked before it is trusted.

    metadata   format, columns, facts (the configuration), sha256
    tensors    "<layer>.<state>", as in the table of `cache_layer_bmojo`

sha256 is of the whole file with its own 64 digits as zeros. Reading goes from what is cheap to what is large: the
header and whose cache it is, the names, shapes and dtypes, the checksum; then the states are loaded, on the CPU, and
compared with what reading text can leave (`cache_checks_bmojo`).

Older formats are read:

    5    sizes of every layer (`specs`), which the facts say as well
    4    the same without a checksum, with fewer facts, no fingerprint of the pads, and keys as `[B, S, G, D]`
"""

import errno
import hashlib
import json
import os
import re
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .cache_checks_bmojo import check_tables, check_values
from .cache_facts_bmojo import check_written, described, undescribed
from .cache_layer_bmojo import BMojoCacheLayer
from .configuration_bmojo import BMojoConfig
from .files_bmojo import write_whole


FORMAT = "bmojo-cache-6"
FORMAT_5, FORMAT_4 = "bmojo-cache-5", "bmojo-cache-4"
NOT_IN_FORMAT_4 = ("delay", "has_ssm", "blocks", "stored")
DIGITS = 64
READ_AT_ONCE = 1 << 20
LARGEST_HEADER = 100_000_000  # safetensors' own limit
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I8": torch.int8,
}
# States that a file may lack, by format: of these no text leaves any, or the format had none.
OPTIONAL = {
    FORMAT: frozenset({"pads"}),
    FORMAT_5: frozenset({"pads"}),
    FORMAT_4: frozenset({"pads", "last_hidden"}),
}


class Contents(NamedTuple):
    """columns: read. layers: the states of each."""

    columns: int
    layers: list[dict[str, torch.Tensor]]


def write_cache(
    path: str | os.PathLike,
    contents: Contents,
    facts: dict[str, Any],
    layers: list[BMojoCacheLayer],
    still,
    elsewhere: frozenset[str] = frozenset(),
) -> None:
    """Write a cache's file.

    Args:
        contents: states on the CPU, contiguous. layers: what declares them. still: called at the end, raises if they
            have changed meanwhile. elsewhere: states that are kept in another place, not in this file.

    Raises:
        ValueError: if the states cannot be those of a cache, or the folder does not exist. OSError: see `write_whole`.
    """
    tables = [{name: (list(value.shape), value.dtype) for name, value in states.items()} for states in contents.layers]
    try:
        check_tables(layers, tables, contents.columns, OPTIONAL[FORMAT] | elsewhere)
        check_values(layers, contents.layers, contents.columns, pads_known=True)
    except ValueError as error:
        raise ValueError(f"the cache is not saved: {error}; reset() it and read the text again.") from error
    tensors = {f"{i}.{name}": value for i, states in enumerate(contents.layers) for name, value in states.items()}
    metadata = {"format": FORMAT, "columns": str(contents.columns), "facts": described(facts)}
    metadata["sha256"] = "0" * DIGITS

    def write(partial: str) -> None:
        try:
            save_file(tensors, partial, metadata=metadata)
        except SafetensorError as error:
            number = re.search(r"\(os error (\d+)\)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
        with open(partial, "rb+") as file:
            place = _place_of_digits(file)
            digits = _digest(file, place)
            file.seek(place)
            file.write(digits.encode())
        still()

    write_whole(path, write)


def read_cache(
    path: str | os.PathLike,
    config: BMojoConfig,
    layers: list[BMojoCacheLayer],
    elsewhere: frozenset[str] = frozenset(),
) -> Contents:
    """Read what `write_cache` wrote, for a model of `config` and its `layers`; on the CPU, nothing mapped to the file.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    where = f"path={os.fspath(path)!r}"
    while True:
        if not os.path.isfile(path):
            raise ValueError(f"{where}: there is no such file; give one that BMojoCache.save wrote.")
        before, failure = _identity(path), None
        try:
            contents = _read(path, config, layers, elsewhere)
        except (SafetensorError, ValueError, RuntimeError) as error:
            failure = error
        # Where another save replaced the file meanwhile, it was read partly from one and partly from the other (then
        # torch may find it too short to map, a RuntimeError).
        if _identity(path) == before:
            break
    if isinstance(failure, SafetensorError | RuntimeError):
        raise ValueError(f"{where}: damaged or truncated ({failure}); save it again.") from failure
    if failure is not None:
        text = str(failure).rstrip(".")
        raise ValueError(f"{where}: {text}; give a file that BMojoCache.save wrote for this model.") from failure
    return contents


def _identity(path: str | os.PathLike) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read(
    path: str | os.PathLike, config: BMojoConfig, layers: list[BMojoCacheLayer], elsewhere: frozenset[str]
) -> Contents:
    with safe_open(path, framework="pt", device="cpu") as file:
        metadata = file.metadata() or {}
        written = metadata.get("format")
        if written not in OPTIONAL:
            raise ValueError(f"format {written!r} is none of {list(OPTIONAL)}")
        if written != FORMAT_4:
            _check_digest(path, metadata.get("sha256"))
        elif "sha256" in metadata:
            raise ValueError(f"format {written!r} has no sha256, but the file has one: it was changed")
        columns = _columns(metadata.get("columns", ""))
        check_written(undescribed(metadata.get("facts")), config, complete=written != FORMAT_4)
        if written == FORMAT_4:
            _check_old_sizes(metadata.get("specs"), config)
        return _states(file, layers, columns, written, elsewhere)


def _check_old_sizes(text: str | None, config: BMojoConfig) -> None:
    """Raise ValueError unless a file of format 4 has the sizes that its facts do not tell."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"its description is damaged ({error!r})") from error
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ValueError("its description is damaged: specs must be a list of dicts")
    if len(found) != config.num_hidden_layers:
        raise ValueError(f"the cache has {len(found)} layers but the model has {config.num_hidden_layers}")
    names = {"kv_heads": "num_key_value_heads", "head_dim": "head_dim", "hidden": "hidden_size"}
    names |= {"ssm_heads": "ssm_num_heads", "ssm_head_dim": "ssm_head_dim", "ssm_state": "ssm_state_size"}
    names |= {"conv_kernel": "ssm_conv_kernel"}
    for index, sizes in enumerate(found):
        spec = config.layer_spec(index)
        wanted = {name: value for name, value in spec._asdict().items() if name not in NOT_IN_FORMAT_4}
        wanted |= {name: getattr(config, field) for name, field in names.items()}
        if spec.slots and config.innovation == "output":
            wanted["taps"] = config.innovation_taps
        for name, theirs in wanted.items():
            ours = sizes.get(name)
            if ours != theirs:
                raise ValueError(f"layer {index}: the cache has {name}={ours!r} but the model has {theirs!r}")


def _columns(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,17}", text):
        raise ValueError(f"columns={text[:40]!r}: must be the number of columns read, at least 1")
    return int(text)


def _states(file, declared: list[BMojoCacheLayer], columns: int, written: str, elsewhere: frozenset[str]) -> Contents:
    """Return the states of an open file, checked before and after they are loaded."""
    names: list[dict[str, str]] = [{} for _ in declared]
    for full in file.keys():  # noqa: SIM118 (not a dict)
        layer, _, name = full.partition(".")
        if not re.fullmatch(r"0|[1-9][0-9]{0,8}", layer) or int(layer) >= len(declared):
            raise ValueError(f"the tensor {full!r} belongs to no layer of {len(declared)}")
        names[int(layer)][name] = full
    heads_last = written == FORMAT_4
    tables = [{name: _entry(file, full, name, heads_last) for name, full in layer.items()} for layer in names]
    check_tables(declared, tables, columns, OPTIONAL[written] | elsewhere)
    # Copies: what safetensors gives is mapped to the file, and would follow whatever is written into it later.
    layers = [{name: file.get_tensor(full).clone() for name, full in layer.items()} for layer in names]
    if heads_last:
        for states in layers:
            states |= {name: _swapped(states[name]) for name in ("keys", "values") if name in states}
    check_values(declared, layers, columns, pads_known=written != FORMAT_4)
    return Contents(columns, layers)


def _entry(file, full: str, name: str, heads_last: bool) -> tuple[list[int], torch.dtype]:
    part = file.get_slice(full)
    shape, dtype = list(part.get_shape()), part.get_dtype()
    if dtype not in DTYPES:
        raise ValueError(f"the tensor {full!r} is of dtype {dtype}: no state is")
    if heads_last and name in ("keys", "values") and len(shape) == 4:
        shape[1], shape[2] = shape[2], shape[1]
    return shape, DTYPES[dtype]


def _swapped(value: torch.Tensor) -> torch.Tensor:
    """`[B, S, G, D]` to `[B, G, S, D]`, in memory too."""
    return value.transpose(1, 2).contiguous()


# --- the checksum ---------------------------------------------------------------------------------------------------


def _check_digest(path: str | os.PathLike, stated: str | None) -> None:
    with open(path, "rb") as file:
        found = _digest(file, _place_of_digits(file))
    if stated != found:
        raise ValueError(f"its sha256 is {found} but should be {stated}: it was damaged or changed after it was saved")


def _place_of_digits(file) -> int:
    """Where in the file its checksum stands; the header is read, bounded, and must hold it once."""
    file.seek(0)
    size = int.from_bytes(file.read(8), "little")
    header = file.read(min(size, LARGEST_HEADER))
    found = list(re.finditer(rb'"sha256":"[0-9a-f]{%d}"' % DIGITS, header))
    if len(found) != 1:
        raise ValueError("its header does not hold one sha256: damaged, or not written by BMojoCache.save")
    return 8 + found[0].start() + len(b'"sha256":"')


def _digest(file, place: int) -> str:
    """sha256 of an open file in which the digits at `place` count as zeros."""
    file.seek(0)
    digest = hashlib.sha256(file.read(place))
    digest.update(b"0" * DIGITS)
    file.seek(place + DIGITS)
    while part := file.read(READ_AT_ONCE):
        digest.update(part)
    return digest.hexdigest()


__all__ = ["Contents", "read_cache", "write_cache"]
