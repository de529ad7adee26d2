"""From settings to a trained checkpoint: what conversion.align and conversion.finetune do.

Order of work: everything that can be refused is checked first (settings, folders, checkpoint, teacher, data); training
runs in `<output>.training/`, which --resume goes on with; the result is written beside its place and renamed into it.
"""

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import TrainerState

from ..common.files import writing
from ..common.staging import check_output, sole_writer, staged_folder
from ..data.packing import Collator
from ..data.rows import TrainingData, build_data
from ..grafting.sources import source_files
from . import four_bit
from .arguments import training_arguments
from .checkpoints import (
    best_checkpoint,
    check_files,
    check_recipe,
    check_work,
    checkpoints,
    read_state,
    recipe_of,
    remove_incomplete,
    remove_work,
    start_work,
    step_of,
    work_folder,
)
from .output import training_entry, write_log
from .settings import AlignSettings, TrainingSettings
from .student import check_reported, find_checkpoint, open_student
from .tasks import Task, alignment_task, finetuning_task, sharding
from .trainer import BMojoTrainer, LossNotFiniteError, StopAfterStep, load_trained


@dataclass(frozen=True)
class RunOptions:
    """How to treat what is there already. finish: "last" or "best", write that checkpoint's result, train nothing."""

    resume: bool = False
    overwrite: bool = False
    finish: str | None = None


@dataclass(frozen=True)
class Result:
    """What a run did.

    state: the Trainer's. trained, parameters: numbers of values that train, and of all. seconds, cpu_seconds: of the
    training itself and its evaluations, 0 where nothing was trained; the latter are this process's, over all threads.
    """

    output: Path
    state: TrainerState
    trained: int
    parameters: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def train(settings: TrainingSettings, options: RunOptions) -> Result:
    """Train and write the output folder, of which this run is the only writer meanwhile.

    Raises:
        ValueError: anything about settings, files or a loss that stops the run. Checkpoints stay.
        WriteError: a disk that is full, or refuses otherwise. Checkpoints stay.
        KeyboardInterrupt: it was asked to stop; with a checkpoint unless asked twice.
    """
    output = Path(settings.output)
    four_bit.check_machine(settings)
    folder = find_checkpoint(settings.source)
    arguments = training_arguments(settings, work_folder(output))
    with sole_writer(output) if arguments.should_save else nullcontext():
        return _train(settings, options, folder, arguments)


def _train(settings: TrainingSettings, options: RunOptions, folder: Path, arguments: TrainingArguments) -> Result:
    """Return the run itself. folder: of the source."""
    output, work = Path(settings.output), work_folder(Path(settings.output))
    replace = options.overwrite or options.resume or options.finish is not None
    check_output(output, replace, sources=(folder,))
    check_work(output, options.resume, options.overwrite, options.finish is not None)
    if arguments.should_save:  # one process reads everything once, for all
        check_reported(folder)
        if options.resume:
            check_files(checkpoints(work)[-1])
    arguments.eval_on_start = arguments.eval_on_start and not options.resume  # a resumed run has it in its log
    set_seed(settings.seed)  # adapters start from random numbers
    task = _task(settings, arguments)
    if options.finish is not None:
        check_recipe(work, recipe_of(settings, {"source_files": source_files(str(folder))}), "--finish")
        return _finish(task, settings, options.finish)
    with arguments.main_process_first(desc="reading the data"), writing(Path(datasets.config.HF_DATASETS_CACHE)):
        data = build_data(settings.data, task.student.tokenizer, task.loss_from, settings.seed)
    facts = {
        "source_files": source_files(str(folder)),
        "data_files": data.files,
        "processes": arguments.world_size,
        "sharding": sharding(arguments),
    }
    recipe = recipe_of(settings, facts)
    PartialState().wait_for_everyone()  # every process has looked at the folders before one changes them
    if arguments.should_save:
        if options.resume:
            check_recipe(work, recipe)
            remove_incomplete(work)
        else:
            start_work(output, recipe)
    PartialState().wait_for_everyone()
    clock = time.monotonic(), time.process_time()
    trainer = _run(task, arguments, data, recipe, checkpoints(work)[-1] if options.resume else None)
    seconds, cpu_seconds = time.monotonic() - clock[0], time.process_time() - clock[1]
    tensors = trainer.full_state()
    if arguments.should_save:
        _write(task, settings, tensors, trainer.state)
        remove_work(output)
    return Result(output, trainer.state, *task.sizes, seconds, cpu_seconds)


def _task(settings: TrainingSettings, arguments: TrainingArguments) -> Task:
    build = alignment_task if isinstance(settings, AlignSettings) else finetuning_task
    return build(settings, open_student(settings), arguments)


def _run(
    task: Task, arguments: TrainingArguments, data: TrainingData, recipe: dict[str, Any], checkpoint: Path | None
) -> BMojoTrainer:
    """Train to the end, or raises."""
    stop, pad = StopAfterStep(), task.student.config.pad_token_id
    trainer = BMojoTrainer(
        model=task.model,
        args=arguments,
        data_collator=Collator(0 if pad is None else pad),
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        callbacks=[stop],
        trained=task.trained,
        recipe=recipe,
    )
    work = Path(arguments.output_dir)
    try:
        with stop.listening(), writing(work):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except LossNotFiniteError as error:
        raise LossNotFiniteError(f"{error} {_kept(work)}") from error
    if stop.asked and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt(f"stopped after step {trainer.state.global_step}. {_kept(work)}")
    return trainer


def _kept(work: Path) -> str:
    """Return what is left of a run that ended early."""
    done = checkpoints(work)
    if not done:
        return "No checkpoint had been written yet."
    return (
        f"The last checkpoint is {str(done[-1])!r} (step {step_of(done[-1])}): --resume goes on from it, --finish last "
        "writes its result."
    )


def _finish(task: Task, settings: TrainingSettings, which: str) -> Result:
    """Write the result of a run's last or best checkpoint; the run can still be resumed."""
    work = work_folder(Path(settings.output))
    checkpoint = checkpoints(work)[-1] if which == "last" else best_checkpoint(work)
    if checkpoint is None:
        raise ValueError("--finish best: the run has not evaluated with keep: best; use --finish last.")
    if PartialState().is_main_process:
        check_files(checkpoint, "--finish")
    load_trained(task.model, task.trained, checkpoint)
    state = read_state(checkpoint)
    if PartialState().is_main_process:
        _write(task, settings, task.model.state_dict(), state)
    return Result(Path(settings.output), state, *task.sizes)


def _write(task: Task, settings: TrainingSettings, tensors: dict[str, torch.Tensor], state: TrainerState) -> None:
    """Write the output folder, whole or not at all."""
    entry = training_entry(task.program, settings, task.trained, task.sizes, state)
    with staged_folder(Path(settings.output)) as folder:
        task.write(folder, tensors, entry)
        write_log(folder, state, work_folder(Path(settings.output)) / "runs")
