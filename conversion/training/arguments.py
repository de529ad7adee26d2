"""The `trainer:` section as transformers' TrainingArguments, with defaults that fit these programs."""

import difflib
import importlib.util
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..common.settings import as_number
from .settings import FinetuneSettings, TrainingSettings


DEFAULTS = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # below 1: a share of all steps
    "logging_steps": 10,
    "logging_first_step": True,
    "save_steps": 100,
    "save_total_limit": 2,
    "ddp_find_unused_parameters": False,  # the first step refuses tensors that the losses do not reach
}
# What the programs decide themselves, and where to say it instead.
OWNED = {
    "output_dir": "set output",
    "seed": "set seed",
    "data_seed": "set seed",
    "load_best_model_at_end": "set keep: best",
    "metric_for_best_model": "keep: best goes by the held-out loss",
    "greater_is_better": "keep: best goes by the held-out loss",
    "resume_from_checkpoint": "use --resume",
    "save_only_model": "a run must stay resumable",
    "push_to_hub": "upload the output folder when it is done",
    "remove_unused_columns": "rows hold what the model reads and their number",
    "label_names": "labels are called labels",
    "label_smoothing_factor": "losses are those of the losses section",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "prediction_loss_only": "evaluation computes losses only",
    "use_cache": "training keeps no cache",
    "auto_find_batch_size": "it would start anew within a run",
    "average_tokens_across_devices": "the loss is the mean over all counted tokens",
    "torch_compile": "not supported here yet",
    "use_liger_kernel": "it does not know B'MOJO",
}


def training_arguments(settings: TrainingSettings, work: Path) -> TrainingArguments:
    """TrainingArguments of a run that works in the folder `work`.

    Raises:
        ValueError: unknown or owned fields, or values that TrainingArguments or these programs refuse.
    """
    given = {name: as_number(value) for name, value in settings.trainer.items()}
    known = {item.name for item in fields(TrainingArguments) if item.init}
    for name in given:
        if name in OWNED:
            raise ValueError(f"trainer.{name}: is decided elsewhere; {OWNED[name]}.")
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"trainer.{name}: TrainingArguments has no such field; {hint}See its documentation.")
    values = {**DEFAULTS, "learning_rate": _learning_rate(settings), **_evaluation(settings, given), **given}
    try:
        arguments = TrainingArguments(
            output_dir=str(work),
            seed=settings.seed,
            data_seed=settings.seed,
            remove_unused_columns=False,
            logging_nan_inf_filter=False,
            prediction_loss_only=True,
            label_names=["labels"],
            **{"report_to": _loggers(), "dataloader_pin_memory": torch.cuda.is_available(), **_current(values, known)},
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ValueError(f"trainer: {error}") from error
    if arguments.n_gpu > 1:
        # One process with several GPUs would copy the model in every step: `accelerate launch` starts one for each.
        arguments._n_gpu = 1
    if settings.data.streaming and arguments.max_steps <= 0:
        raise ValueError("trainer.max_steps: a stream has no known length; say how many steps to train.")
    return arguments


def _learning_rate(settings: TrainingSettings) -> float:
    if isinstance(settings, FinetuneSettings):
        return 2e-5 if settings.lora is None else 2e-4
    return 1e-4


def _evaluation(settings: TrainingSettings, given: dict[str, Any]) -> dict[str, Any]:
    """Evaluate as often as it saves, where anything is held out; fine-tuning also before its first step."""
    held_out = bool(settings.data.held_out) or settings.data.eval_files is not None
    strategy = given.get("eval_strategy", given.get("save_strategy", "steps") if held_out else "no")
    if strategy != "no" and not held_out:
        raise ValueError(f"trainer.eval_strategy={strategy!r}: nothing is held out; set data.held_out or eval_files.")
    if settings.keep == "best" and strategy == "no":
        raise ValueError("keep='best': goes by the loss on held-out text; set data.held_out or data.eval_files.")
    if settings.keep == "best" and given.get("save_total_limit") == 1:
        # The Trainer would delete all but the best one, also what it has just written when it was asked to stop.
        raise ValueError(
            "trainer.save_total_limit=1: with keep='best' the best and the last checkpoint are needed; set it to 2 or "
            "more, or keep: last."
        )
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    steps = given.get("save_steps", DEFAULTS["save_steps"])
    # Losses are compared with the model as it was; an alignment's own first loss says that already.
    start = isinstance(settings, FinetuneSettings) and strategy != "no"
    return {
        "eval_strategy": strategy,
        "eval_steps": steps,
        "eval_on_start": start,
        **(best if settings.keep == "best" else {}),
    }


def _loggers() -> list[str]:
    return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []


def _current(values: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """Gradient checkpointing under the name of the installed transformers, and in the form that hooks can stand."""
    values = dict(values)
    current = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    other = "gradient_checkpointing" if current == "activation_checkpointing" else None
    if other:
        for suffix in ("", "_kwargs"):
            if other + suffix in values:
                values.setdefault(current + suffix, values.pop(other + suffix))
    if values.get(current):
        values[current + "_kwargs"] = {"use_reentrant": False, **(values.get(current + "_kwargs") or {})}
    return values


def check_precision(dtype: torch.dtype, arguments: TrainingArguments) -> None:
    """Refuse narrow weights without mixed precision: the tensors that train are float32 beside them (ValueError)."""
    if dtype != torch.float32 and not (arguments.bf16 or arguments.fp16):
        raise ValueError(
            f"dtype: the checkpoint is {str(dtype).removeprefix('torch.')}, and the tensors that train stay float32, "
            "so mixed precision is needed to compute with both; set trainer.bf16: true (or fp16), or dtype: float32."
        )
