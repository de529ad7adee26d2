"""CPU seconds and peak memory of an alignment step on one row: `python -m benchmarks.training_step FOLDER`.

    python -m benchmarks.training_step FOLDER [--losses kl hidden] [--tokens T] [--steps 3] [--bf16] [--set key=value]

FOLDER is a graft. The new tensors train, on a row of the built-in text; one thread. CPU time, not wall time, so that a
busy machine changes little. The teacher's forward pass is timed by itself too.
"""

import argparse
import contextlib
import time
from collections.abc import Callable

import torch

from conversion.common.settings import parse_assignments
from conversion.data.packing import IGNORED
from conversion.data.texts import pydoc_text
from conversion.training.alignment import Alignment, run_teacher
from conversion.training.cli import peak_memory
from conversion.training.settings import AlignSettings, build_training_settings
from conversion.training.student import choose_trained, open_student
from conversion.training.teacher import shared_teacher


def cpu_seconds(work: Callable[[], object], repeats: int) -> list[float]:
    """CPU seconds of each call, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return times


def main() -> None:
    """Measure and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step")
    parser.add_argument("folder")
    parser.add_argument("--losses", nargs="+", default=["mixer"])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="autocast, as trainer.bf16 does")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="memory fields")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = build_training_settings(
        AlignSettings,
        {
            "source": arguments.folder,
            "output": "unused",
            "data": {"builtin": "pydoc"},
            "losses": dict.fromkeys(arguments.losses, 1.0),
            "memory": parse_assignments(arguments.set),
        },
    )
    student = open_student(settings)
    trained = choose_trained(student.model, "new", student.report)
    teacher = shared_teacher(student.model, student.report["source"], set(trained))
    alignment = Alignment(student.model, teacher, settings.losses).train()
    text = pydoc_text("training")
    ids = student.tokenizer(text[: 20 * arguments.tokens], return_tensors="pt")["input_ids"][:, : arguments.tokens]
    labels = ids.clone()
    labels[:, : student.config.window_size + 1] = IGNORED
    inputs = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None], "attention_mask": None}

    def mixed():
        return torch.autocast("cpu", torch.bfloat16) if arguments.bf16 else contextlib.nullcontext()

    def step() -> None:
        alignment.zero_grad()
        with mixed():
            loss = alignment(**inputs, labels=labels)["loss"]
        loss.backward()

    def teach() -> None:
        with torch.no_grad(), mixed():
            run_teacher(teacher, inputs)

    for name, work in ((" + ".join(arguments.losses), step), ("teacher's forward pass", teach)):
        print(f"{name}: {', '.join(f'{value:.1f}' for value in cpu_seconds(work, arguments.steps))} CPU s")
    print(f"{ids.shape[1]} tokens, W={student.config.window_size}; {peak_memory()} at the peak")


if __name__ == "__main__":
    main()
