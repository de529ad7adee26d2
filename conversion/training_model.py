"""The model that a training program starts from: opened, checked, and told which of its tensors train."""

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_bmojo import BMojoConfig, BMojoForCausalLM

from .export import meta_model
from .four_bit import loading_options
from .report import REPORT_FILE, read_report
from .sources import HUB_ID
from .training_settings import TrainingSettings


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
    """The folder of a B'MOJO checkpoint: a local one, or a hub id's files.

    Raises:
        ValueError: nothing there, or no B'MOJO checkpoint.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if not HUB_ID.fullmatch(source) or folder.exists():
            raise ValueError(f"source={source!r}: no such folder; graft one first: python -m conversion.graft.")
        folder = _download(source)
    _refuse_adapter(source, folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"source={source!r}: has no readable config.json ({error}).") from error
    if config.get("model_type") != "bmojo":
        raise ValueError(
            f"source={source!r}: is a {config.get('model_type')} model, not a B'MOJO checkpoint; turn it into one with "
            "python -m conversion.graft."
        )
    return folder


def _refuse_adapter(source: str, folder: Path) -> None:
    """An adapter is no model, and only its own base becomes one with it (ValueError)."""
    file = folder / "adapter_config.json"
    if not file.is_file() or (folder / "config.json").is_file():
        return
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
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
    """Loads the checkpoint, its tokenizer and its report.

    Raises:
        ValueError: what is no B'MOJO checkpoint, a damaged one, `memory` fields that change tensors, or no tokenizer.
    """
    folder = find_checkpoint(settings.source)
    report = read_report(folder) or {}
    dtype = getattr(torch, settings.dtype or report.get("dtype") or "float32")
    _check_memory(folder, settings.memory)
    try:
        model, info = BMojoForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **settings.memory, **loading_options(settings)
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"source={settings.source!r}: does not load ({error}).") from error
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise ValueError(
            f"source={settings.source!r}: tensors and config do not fit ({', '.join(wrong[:4])}); it is damaged."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers and tokenizers raise types of their own
        raise ValueError(f"source={settings.source!r}: its tokenizer does not load ({error}).") from error
    config = BMojoConfig.from_pretrained(folder, **settings.memory)
    return Student(folder, model, config, tokenizer, report, dtype)


def _check_memory(folder: Path, memory: Mapping[str, Any]) -> None:
    """Refuses `memory` fields that would change a tensor's name or shape (ValueError)."""
    if not memory:
        return
    before, after = (
        {name: tuple(value.shape) for name, value in meta_model(config).state_dict().items()}
        for config in (BMojoConfig.from_pretrained(folder), BMojoConfig.from_pretrained(folder, **memory))
    )
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    if changed:
        raise ValueError(
            f"memory={dict(memory)!r}: would change {len(changed)} tensors, such as {min(changed)}; fields that decide "
            "what tensors there are, are set when grafting."
        )


def choose_trained(model: torch.nn.Module, train: str | list[str], report: Mapping[str, Any]) -> list[str]:
    """Names of the parameters that train; only these ask for a gradient afterwards.

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
    """The tensors that the graft did not copy from its source."""
    return {name for name, entry in report.get("target_tensors", {}).items() if "initialised-by" in entry}


def hold_in_float32(model: torch.nn.Module) -> None:
    """Casts the parameters that train: steps of an optimiser are lost in the rounding of narrower types."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
