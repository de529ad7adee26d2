"""What trains: a student against its teacher (align), or a model on next tokens, whole or by an adapter (finetune)."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from modeling_bmojo.configuration_bmojo import INNOVATIONS

from . import four_bit
from .adapters import check_names, lora_config
from .alignment import Alignment
from .arguments import check_precision
from .merging import merge_adapter
from .output import write_adapter, write_checkpoint
from .settings import AlignSettings, FinetuneSettings, LoraSettings
from .student import Student, choose_trained, hold_in_float32
from .teacher import check_head, check_teacher, load_teacher, shared_teacher


Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """A model for the Trainer. trained: names of its parameters that train. loss_from: first position that counts.

    write: `(folder, state dict, report entry)`, fills an output folder. sizes: numbers of values that train, and of all
    (a 4-bit weight counts as what it stands for).
    """

    program: str
    student: Student
    model: torch.nn.Module
    trained: list[str]
    loss_from: int
    write: Callable[[Path, Tensors, dict[str, Any]], None]
    sizes: tuple[int, int]


def alignment_task(settings: AlignSettings, student: Student, arguments: TrainingArguments) -> Task:
    """Student and teacher, checked against each other and the losses.

    Raises:
        ValueError: see `teacher.py`; tensors that cannot learn; sharded training with a shared teacher.
    """
    model, losses = student.model, settings.losses
    check_precision(model.dtype, arguments)
    trained = choose_trained(model, settings.train, student.report)
    _check_learns(student, trained)
    if "bmojo" not in student.config.layer_types:
        raise ValueError(f"source={settings.source!r}: has no B'MOJO layer, so there is nothing to align.")
    _check_sharding(arguments, settings)
    if settings.teacher is None:
        teacher = shared_teacher(model, student.report.get("source"), set(trained))
    else:
        teacher, tokenizer = load_teacher(settings.teacher, model.dtype)
        check_teacher(model, student.tokenizer, teacher, tokenizer, losses)
    if losses.kl or losses.ce:
        check_head(model, "source")
        check_head(teacher, "teacher")
    hold_in_float32(model)
    loss_from = student.config.alone if settings.loss_from is None else settings.loss_from
    prefix = "student."

    def write(folder: Path, tensors: Tensors, entry: dict[str, Any]) -> None:
        whole = {name.removeprefix(prefix): value for name, value in tensors.items()}
        write_checkpoint(folder, student, whole, trained, entry, settings.max_shard_size)

    return Task(
        "align",
        student,
        Alignment(model, teacher, losses),
        [prefix + name for name in trained],
        loss_from,
        write,
        _sizes(model),
    )


def _check_learns(student: Student, trained: list[str]) -> None:
    """Refuse what has no gradient: the SSM of a layer without fading tokens feeds the innovation test alone, which has
    none but by `innovation_gradient` (ValueError)."""
    learns = student.config.innovation_gradient > 0 and INNOVATIONS[student.config.innovation].signal == "output"
    if student.config.fading_size == 0 and not learns and all(".fading." in name for name in trained):
        raise ValueError(
            "train: with fading_size=0 nothing that can be trained depends on the fading memory; set "
            "memory.fading_size: 1, or train other tensors."
        )


def _check_sharding(arguments: TrainingArguments, settings: AlignSettings) -> None:
    """Refuse what needs the student's tensors whole where they are spread over devices (ValueError)."""
    kind, losses = sharding(arguments), settings.losses
    if kind and settings.teacher is None:
        raise ValueError(
            f"teacher: {kind} spreads the student's tensors over devices, where a teacher cannot share them; "
            "name the teacher (teacher: a folder or hub id), or launch without sharding."
        )
    if kind == "FSDP" and losses.mixer and losses.mixer_inputs == "teacher":
        raise ValueError(
            "losses.mixer_inputs='teacher': runs the student's mixers by themselves, but FSDP puts the tensors of a "
            "layer together only for a pass through the whole layer; set losses.mixer_inputs: student, or launch "
            "without FSDP."
        )


def sharding(arguments: TrainingArguments) -> str | None:
    """Return what spreads the model's tensors over devices: "FSDP", "DeepSpeed" or None; also as `accelerate launch`
    asks."""
    for kind, given in (("FSDP", arguments.fsdp), ("DeepSpeed", arguments.deepspeed)):
        if given or os.environ.get(f"ACCELERATE_USE_{kind.upper()}", "false").lower() == "true":
            return kind
    return None


def finetuning_task(settings: FinetuneSettings, student: Student, arguments: TrainingArguments) -> Task:
    """Return the model itself, or an adapter on it.

    Raises:
        ValueError: an adapter that fits nothing, or narrow weights that train without mixed precision.
    """
    if settings.lora is not None:
        return _adapter_task(settings, settings.lora, student, arguments)
    check_precision(student.model.dtype, arguments)
    trained = choose_trained(student.model, settings.train, student.report)
    _check_learns(student, trained)
    hold_in_float32(student.model)

    def write(folder: Path, tensors: Tensors, entry: dict[str, Any]) -> None:
        write_checkpoint(folder, student, tensors, trained, entry, settings.max_shard_size)

    return Task("finetune", student, student.model, trained, 0, write, _sizes(student.model))


def _sizes(model: torch.nn.Module) -> tuple[int, int]:
    return model.num_parameters(only_trainable=True), model.num_parameters()


def _adapter_task(
    settings: FinetuneSettings, lora: LoraSettings, student: Student, arguments: TrainingArguments
) -> Task:
    from peft import get_peft_model

    if lora.quantize is not None:
        if sharding(arguments):
            raise ValueError(
                f"lora.quantize={lora.quantize!r}: a base in 4 bits cannot be sharded here; remove it, or launch "
                f"without {sharding(arguments)}."
            )
        four_bit.prepare(student.model)
    check_names(student.model, lora)
    try:
        adapted = get_peft_model(student.model, lora_config(student.model, lora))
    except ValueError as error:
        raise ValueError(f"lora: {error}") from error
    hold_in_float32(adapted)  # PEFT does so for low-rank pairs, not for what trains in full
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]

    def write(folder: Path, tensors: Tensors, entry: dict[str, Any]) -> None:
        write_adapter(folder, adapted, tensors, student, entry)
        if lora.merge:
            whole, values, changed = merge_adapter(student, folder)
            (folder / "merged").mkdir()
            write_checkpoint(folder / "merged", whole, values, changed, entry, settings.max_shard_size)

    return Task("finetune", student, adapted, trained, 0, write, adapted.get_nb_trainable_parameters())
