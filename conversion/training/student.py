"""The model that a training program starts from: opened, checked, and told which of its tensors train."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from modeling_bmojo import BMojoConfig, BMojoForCausalLM

from ..common.commands import command
from ..common.files import read_json
from ..common.running import meta_model, tensor_shapes
from ..common.staging import REPORT_FILE
from ..common.weights import SKETCH, open_weights
from ..grafting.report import changed_tensors, require_report
from ..grafting.sources import HUB_ID, open_config, open_tokenizer
from .four_bit import loading_options
from .settings import TrainingSettings


HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "README.md", "vocab*", "merges.txt", "tokenizer*", "spiece.model"]


class Student(NamedTuple):
    """A B'MOJO checkpoint in memory.

    config, dtype: as it will be saved. report: of the graft, {} where there is none.
    """

    folder: Path
    model: BMojoForCausalLM
    config: BMojoConfig
    tokenizer: PreTrainedTokenizerBase
    report: dict[str, Any]
    dtype: torch.dtype


def find_checkpoint(source: str) -> Path:
    """Return the folder of a B'MOJO checkpoint: a local one, or a hub id's files.

    Raises:
        ValueError: nothing there, or no B'MOJO checkpoint.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if not HUB_ID.fullmatch(source) or folder.exists():
            raise ValueError(f"source={source!r}: no such folder; graft one first: {command('graft')}.")
        folder = _download(source)
    _refuse_adapter(source, folder)
    try:
        config = read_json(folder / "config.json", f"source={source!r}")
    except ValueError as error:
        raise ValueError(f"source={source!r}: has no readable config.json ({error}).") from error
    if config.get("model_type") != "bmojo":
        raise ValueError(
            f"source={source!r}: is a {config.get('model_type')} model, not a B'MOJO checkpoint; turn it into one with "
            f"{command('graft')}."
        )
    return folder


def _refuse_adapter(source: str, folder: Path) -> None:
    """Refuse an adapter: it is no model, and only its own base becomes one with it (ValueError)."""
    file = folder / "adapter_config.json"
    if not file.is_file() or (folder / "config.json").is_file():
        return
    try:
        base = read_json(file, f"source={source!r}").get("base_model_name_or_path")
    except ValueError as error:
        raise ValueError(f"source={source!r}: is an adapter with an unreadable {file.name} ({error}).") from error
    raise ValueError(
        f"source={source!r}: is an adapter, not a model; give its base, {base!r}, or train it with lora.merge: true "
        "and give the folder merged/ inside it."
    )


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub raises many types
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise ValueError(f"source={source!r}: no such folder, and the hub does not give it ({reason}).") from error


def open_student(settings: TrainingSettings) -> Student:
    """Load the checkpoint, its tokenizer and its report.

    Raises:
        ValueError: what is no B'MOJO checkpoint, a damaged one, `memory` fields that change tensors, or no tokenizer.
    """
    folder, what = find_checkpoint(settings.source), f"source={settings.source!r}"
    report = require_report(folder, what)
    dtype = getattr(torch, settings.dtype or report.get("dtype") or "float32")
    config = open_config(folder, what, **settings.memory)
    _check_memory(folder, settings.memory)
    open_weights(folder, what)  # names the file that is damaged, or leads out of the folder
    try:
        model, info = BMojoForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **settings.memory, **loading_options(settings)
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"source={settings.source!r}: does not load ({error}).") from error
    if any(SKETCH in name for name in info["missing_keys"]):
        raise ValueError(
            f"source={settings.source!r}: has no sketches of keys, and storage_sketch_size="
            f"{config.storage_sketch_size} asks for them; fit them first: {command('fit_storage')}."
        )
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise ValueError(
            f"source={settings.source!r}: tensors and config do not fit ({', '.join(wrong[:4])}); it is damaged."
        )
    return Student(folder, model, config, open_tokenizer(folder, what), report, dtype)


def check_reported(folder: Path) -> None:
    """Refuse a checkpoint whose weights are not what its report says (ValueError).

    A teacher that shares them would not be the source, and the report of a result would say of them what is not so.
    """
    report = require_report(folder, f"source={str(folder)!r}")
    if not report.get("target_tensors"):
        return
    changed = changed_tensors(report, open_weights(folder, f"source={str(folder)!r}"))
    if changed:
        raise ValueError(
            f"source={str(folder)!r}: {len(changed)} of its tensors are not what its {REPORT_FILE} says (SHA-256), "
            f"such as {changed[0]}: changed since, or damaged. Put the weights back or graft anew; or delete "
            f"{REPORT_FILE} to train on them as they are (`train` by patterns, and a named teacher)."
        )


def _check_memory(folder: Path, memory: Mapping[str, Any]) -> None:
    """Refuse `memory` fields that would change a tensor's name or shape (ValueError)."""
    if not memory:
        return
    before, after = (
        tensor_shapes(meta_model(config))
        for config in (BMojoConfig.from_pretrained(folder), BMojoConfig.from_pretrained(folder, **memory))
    )
    # A folder may hold sketches of keys that only a model with storage has; loading finds out.
    names = [name for name in before.keys() | after.keys() if SKETCH not in name]
    changed = [name for name in names if before.get(name) != after.get(name)]
    if changed:
        raise ValueError(
            f"memory={dict(memory)!r}: would change {len(changed)} tensors, such as {min(changed)}; fields that decide "
            "what tensors there are, are set when grafting."
        )


def choose_trained(model: torch.nn.Module, train: str | list[str], report: Mapping[str, Any]) -> list[str]:
    """Return names of the parameters that train; only these ask for a gradient afterwards.

    Raises:
        ValueError: "new" without a report of the graft, or a pattern that matches nothing.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen: set[str] = set()
    for pattern in [train] if isinstance(train, str) else train:
        if pattern == "new":
            chosen |= initialised(report).intersection(names)
            if not initialised(report):
                raise ValueError(
                    f"train='new': the checkpoint has no {REPORT_FILE} that says which tensors are new; give 'all' or "
                    "patterns such as 'model.layers.*.fading.*'."
                )
            continue
        found = {name for name in names if pattern == "all" or fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(f"train: {pattern!r} matches no tensor; names read like {names[1]!r} and {names[-1]!r}.")
        chosen |= found
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name in names if name in chosen]


def initialised(report: Mapping[str, Any]) -> set[str]:
    """Return the tensors that the graft did not copy from its source."""
    return {name for name, entry in report.get("target_tensors", {}).items() if "initialised-by" in entry}


def hold_in_float32(model: torch.nn.Module) -> None:
    """Cast the parameters that train: steps of an optimiser are lost in the rounding of narrower types."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
