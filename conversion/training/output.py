"""What a training program leaves behind: a whole checkpoint, or an adapter, with report, card and log.

The folder is of the same kind as the one that was trained: it loads alone, and it can be trained again. Its
`graft_report.json` says under "training" what was done, run by run, and at each tensor by which program it was trained.
"""

import copy
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.trainer_callback import TrainerState

from ..common.export import save_tokenizer, write_model
from ..common.files import write_text
from ..common.provenance import versions
from ..common.running import meta_model
from ..common.weights import digest, in_float32
from ..grafting.report import CURRENT, dtype_name, write_report
from ..grafting.sketches import sketch_names
from .settings import TrainingSettings
from .student import Student, initialised


LOG_FILE = "training_log.json"
ADAPTER_FILE = "adapter_model.safetensors"  # PEFT's name
BEGIN, END = "<!-- training -->", "<!-- end of training -->"
# In a card: what a graft says of itself, or an earlier training.
PLACE = re.compile(rf"It is a fresh graft: nothing was trained\..*?(?=\n\n## |\Z)|{BEGIN}.*?{END}", flags=re.DOTALL)


def training_entry(
    program: str, settings: TrainingSettings, trained: list[str], sizes: tuple[int, int], state: TrainerState
) -> dict[str, Any]:
    """One run, as the report tells it. sizes: numbers of values that train, and of all."""
    losses = [entry for entry in state.log_history if "loss" in entry]
    held_out = [entry for entry in state.log_history if "eval_loss" in entry]
    return {
        "program": program,
        "settings": settings.as_dict(),
        "steps": state.global_step,
        "steps_planned": state.max_steps,
        "trained_tensors": len(trained),
        "parameters": dict(zip(("trained", "all"), sizes)),
        "loss": {"first": losses[0], "last": losses[-1]} if losses else None,
        "held_out": {"first": held_out[0], "last": held_out[-1], "best": state.best_metric} if held_out else None,
        "versions": versions(),
    }


def write_checkpoint(
    folder: Path,
    student: Student,
    tensors: Mapping[str, torch.Tensor],
    trained: list[str],
    entry: dict[str, Any],
    max_shard_size: str,
) -> None:
    """Fill `folder` with the whole model.

    Args:
        tensors: the model's state dict, on any device; those that trained may be float32.
        trained: names of the tensors that trained. entry: of the report.
    """
    config, dtype = student.config, student.dtype
    tied = meta_model(config).all_tied_weights_keys
    whole = {
        name: value.detach().to("cpu", torch.float32 if in_float32(name) else dtype).contiguous()
        for name, value in tensors.items()
        if name not in tied
    }
    report = updated_report(student.report, whole, trained, entry, config.alone)
    report["dtype"] = dtype_name(dtype)
    dtypes = {name: value.dtype for name, value in whole.items()}
    write_model(folder, copy.deepcopy(config), dtypes, whole.__getitem__, max_shard_size, dtype)
    GenerationConfig().save_pretrained(folder)
    if (student.folder / "generation_config.json").is_file():
        shutil.copyfile(student.folder / "generation_config.json", folder / "generation_config.json")
    report["tokenizer"] = save_tokenizer(folder, student.tokenizer, config.vocab_size)
    card = trained_card(_read_text(student.folder / "README.md"), report, report["training"])
    write_text(folder / "README.md", card)
    write_report(folder, report)


def write_adapter(
    folder: Path,
    adapter: torch.nn.Module,
    tensors: Mapping[str, torch.Tensor],
    student: Student,
    entry: dict[str, Any],
) -> None:
    """Fill `folder` with an adapter (peft's files), the tokenizer, a card and a report.

    Args:
        adapter: peft's model, for its settings and names. tensors: its state dict, whole: the model's own tensors may
            lie in parts on several devices.
    """
    adapter.save_pretrained(folder, state_dict=dict(tensors))
    student.tokenizer.save_pretrained(folder)
    card = trained_card(_read_text(folder / "README.md"), {}, [entry])
    write_text(folder / "README.md", card)
    report = {key: student.report[key] for key in ("source", "settings") if key in student.report}
    write_report(folder, {**report, "adapter": True, "training": [*student.report.get("training", []), entry]})


def write_log(folder: Path, state: TrainerState, runs: Path) -> None:
    """Write the training's log as JSON, and its TensorBoard files."""
    write_text(folder / LOG_FILE, json.dumps(state.log_history, indent=1) + "\n")
    if runs.is_dir():
        shutil.copytree(runs, folder / "runs", dirs_exist_ok=True)


def updated_report(
    report: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    trained: list[str],
    entry: dict[str, Any],
    alone: int,
) -> dict[str, Any]:
    """Return the graft's report with this run in it.

    Up to the first token that sees more than the tokens before it the logits stay the source's as long as only new
    tensors train. alone: how many there are in the result, which `memory` may have made fewer than in the graft.
    """
    updated = copy.deepcopy(dict(report))
    updated["training"] = [*updated.get("training", []), entry]
    if "identical_up_to" in updated:
        only_new = set(trained) <= initialised(report)
        updated["identical_up_to"] = min(updated["identical_up_to"], alone) if only_new else 0
    # Sketches of keys are not in a model that is trained with storage_size=0.
    accounts = {name: entry for name, entry in updated.get("target_tensors", {}).items() if name in tensors}
    updated["target_tensors"] = accounts
    if not sketch_names(tensors):
        updated.pop("sketches", None)
    for name, value in tensors.items():
        account = accounts.setdefault(name, {"shape": list(value.shape)})
        account["dtype"] = dtype_name(value.dtype)
        account[CURRENT] = digest(value)
        if name in trained:
            account["trained-by"] = [*account.get("trained-by", []), entry["program"]]
    return updated


def trained_card(card: str, report: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the model card, with what was trained in place of the remark that nothing was, or of what was trained
    before.

    Args:
        report: of the result. entries: its runs, oldest first.
    """
    lines = [line for entry in entries for line in _told(entry)]
    same = report.get("identical_up_to")
    if same:
        lines.append(f"Up to {same:,} tokens its logits are still those of the source.")
    lines.append("`graft_report.json` holds the settings, `training_log.json` the course of the last training.")
    text = "\n".join([BEGIN, *lines, END])
    if PLACE.search(card):
        return PLACE.sub(lambda match: text, card, count=1)
    return f"{card.rstrip()}\n\n## Training\n\n{text}\n".lstrip()


def _told(entry: Mapping[str, Any]) -> list[str]:
    """One run in sentences."""
    what = {"align": "aligned with its source", "finetune": "fine-tuned on next tokens"}[entry["program"]]
    settings, loss, held_out = entry["settings"], entry["loss"], entry["held_out"]
    adapter = "an adapter's tensors" if settings.get("lora") else f"`{_short(settings['train'])}`"
    lines = [
        f"It was {what} for {entry['steps']:,} steps on {_text_name(settings['data'])}; "
        f"{entry['trained_tensors']} tensors were trained ({adapter})."
    ]
    if loss:
        lines.append(f"Training loss {loss['first']['loss']:.4g} at first, {loss['last']['loss']:.4g} at last.")
    if held_out:
        first, last = held_out["first"]["eval_loss"], held_out["last"]["eval_loss"]
        lines.append(f"Loss on held-out text {first:.4g} at first, {last:.4g} at last.")
    return lines


def _short(train: Any) -> str:
    return train if isinstance(train, str) else ", ".join(map(str, train or []))


def _text_name(data: Mapping[str, Any]) -> str:
    names = data["files"] or data["hub"] or f"the built-in text {data['builtin']}"
    return names if isinstance(names, str) else ", ".join(names)


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
