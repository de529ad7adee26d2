"""The command line that conversion.align and conversion.finetune share."""

import argparse
import platform
from collections.abc import Sequence

from accelerate import PartialState

from ..common.commands import command
from ..common.programs import run_program
from ..common.recipes import find_recipe
from ..common.settings import parse_assignments
from .output import ADAPTER_FILE
from .run import Result, RunOptions, train
from .settings import TrainingSettings, load_training_settings


def parse_arguments(program: str, purpose: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line of a training program."""
    parser = argparse.ArgumentParser(prog=command(program), description=purpose)
    parser.add_argument("settings", help=f"YAML file, e.g. configs/{program}/smollm2-135m.yaml")
    parser.add_argument("--source", help="folder or hub id of a B'MOJO checkpoint; replaces the YAML's")
    parser.add_argument("--output", help="folder to write; replaces the YAML's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replaces one setting")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with an unfinished run, exactly")
    existing.add_argument("--overwrite", action="store_true", help="replace an earlier result or unfinished run")
    existing.add_argument(
        "--finish", choices=("last", "best"), help="write the result of an unfinished run's checkpoint; train nothing"
    )
    return parser.parse_args(argv)


def settings_of(kind: type[TrainingSettings], arguments: argparse.Namespace) -> TrainingSettings:
    """Return the settings that a command line asks for (ValueError: see `load_training_settings`)."""
    overrides = parse_assignments(arguments.set)
    given = {key: getattr(arguments, key) for key in ("source", "output")}
    overrides |= {key: value for key, value in given.items() if value is not None}
    return load_training_settings(kind, find_recipe(arguments.settings, kind.program), overrides)


def run(program: str, kind: type[TrainingSettings], purpose: str, argv: Sequence[str] | None) -> int:
    """Run the program and return its exit status: 0 done, 2 refused or failed with a message, 130 interrupted."""
    arguments = parse_arguments(program, purpose, argv)

    def work() -> int:
        options = RunOptions(arguments.resume, arguments.overwrite, arguments.finish)
        result = train(settings_of(kind, arguments), options)
        if PartialState().is_main_process:
            print(summary(result))
        return 0

    return run_program(work, "checkpoints written so far are kept")


def summary(result: Result) -> str:
    """Return what to print at the end: steps, what trained, losses, size, time, memory."""
    state = result.state
    share = result.trained / max(result.parameters, 1)
    lines = [
        f"{result.output}: step {state.global_step} of {state.max_steps}.",
        f"{result.trained:,} of {result.parameters:,} parameters trained ({share:.2%}).",
    ]
    adapter = result.output / ADAPTER_FILE
    if adapter.is_file():
        lines[-1] += f" The adapter takes {adapter.stat().st_size / 1e6:.1f} MB."
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    if losses:
        lines.append(f"Training loss {losses[0]:.4g} at first, {losses[-1]:.4g} at last.")
    held_out = [(entry["eval_loss"], entry["step"]) for entry in state.log_history if "eval_loss" in entry]
    if held_out:
        told = ", ".join(f"{loss:.4g} {_moment(step)}" for loss, step in dict.fromkeys((held_out[0], held_out[-1])))
        lines.append(f"Loss on held-out text {told}.")
    if result.seconds:
        lines.append(f"{result.seconds:,.0f} s ({result.cpu_seconds:,.0f} s of CPU time); {peak_memory()} at the peak.")
    return "\n".join(lines)


def _moment(step: int) -> str:
    return f"after step {step}" if step else "before training"


def peak_memory() -> str:
    """Return the largest amount of memory that this process has held."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB of GPU memory"
    try:
        import resource
    except ImportError:  # Windows
        return "memory not measured"
    unit = 1 if platform.system() == "Darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB of memory"
