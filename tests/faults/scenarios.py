"""What is disturbed: the programs on tiny models, what a user does afterwards, and what must have come out.

A scenario works in a folder of its own, `work`, that holds what was there before; the output is `work/out`.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from conversion import align, finetune, fit_storage, graft, import_hmf, restore
from tests.conversion.graft_sources import W
from tests.conversion.hmf_sources import make_config, write_source
from tests.conversion.training_setup import QUIET, T, letters, tiny_graft


STEADY = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0}  # one step too many would show
DURATIONS = ("runtime", "per_second")  # in the log of a training: of no two runs the same


@dataclass(frozen=True)
class Scenario:
    """One program on one state of the disk.

    prepare: makes `work` as it is before the run. run: the program's command line. afterwards: the command lines that a
    user tries after the disturbance, in this order, until one succeeds; each may be refused, with one message. The last
    may also be refused because the result is there already. share: of its points, each how many-th is tried by default.
    """

    name: str
    prepare: Callable[[Path], None]
    program: Any
    run: list[str]
    afterwards: list[list[str]]
    share: int = 1

    def command(self, work: Path, arguments: list[str]) -> list[str]:
        return [argument.replace("WORK", str(work)) for argument in arguments]


def outcome(work: Path) -> dict[str, Any]:
    """All that a scenario's folder holds in the end, without what differs from run to run."""
    found = {}
    for path in sorted(path for path in work.rglob("*") if path.is_file()):
        name = path.relative_to(work).as_posix()
        if path.name == "training_log.json":
            # The Trainer's last entry sums up the steps since the last start alone.
            steps = [entry for entry in json.loads(path.read_text()) if "train_loss" not in entry]
            found[name] = _without_durations(steps)
        elif path.name == "graft_report.json":
            found[name] = _without_durations(json.loads(path.read_text()))
        else:
            found[name] = path.read_bytes()
    return found


def _without_durations(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_durations(item) for key, item in value.items() if not any(word in key for word in DURATIONS)
        }
    return [_without_durations(item) for item in value] if isinstance(value, list) else value


def settings(folder: Path, name: str, **values: Any) -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def all_scenarios(folder: Path) -> list[Scenario]:
    """The scenarios; `folder` holds their settings and data."""
    source = tiny_graft().parent / "source"
    texts = folder / "text"
    texts.mkdir()
    for index in range(4):
        (texts / f"{index}.txt").write_text(letters(100, seed=index))
    fields = {"window_size": W, "eidetic_size": 4, "fading_size": 2, "max_shard_size": "40KB"}
    grafted = settings(folder, "graft", source=str(source), output="unset", **fields)
    training = {
        "source": str(tiny_graft()),
        "output": "unset",
        "data": {"files": str(texts / "*.txt"), "sequence_length": T, "packing": "concatenate", "held_out": 0},
        "trainer": {
            "max_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "save_steps": 1,
            "save_total_limit": 1,
            **QUIET,
        },
    }
    aligned = settings(folder, "align", **training, losses={"mixer": 1.0})
    tuned = settings(folder, "finetune", **training)
    adapted = settings(folder, "lora", **training, lora={"r": 2, "merge": True})
    to = ["--output", "WORK/out"]
    go_on = [["--resume"], [], ["--overwrite"]]

    def then(recipe: str, *flags: list[str]) -> list[list[str]]:
        return [[recipe, *given, *to] for given in flags]

    def nothing(work: Path) -> None:
        work.mkdir()

    def earlier(program: Any, recipe: str) -> Callable[[Path], None]:
        def prepare(work: Path) -> None:
            work.mkdir()
            assert program.main([recipe, "--set", "seed=7", "--output", str(work / "out")]) == 0

        return prepare

    def unfinished(work: Path) -> None:
        """A run that was stopped after its first step."""
        work.mkdir()
        _stopped(work, aligned, step=1)

    def unfinished_of_others(work: Path) -> None:
        earlier(finetune, tuned)(work)
        _stopped(work, tuned, step=1, program=finetune, extra=["--overwrite", "--set", "seed=8"])

    def grafted_before(work: Path) -> None:
        work.mkdir()
        shutil.copytree(tiny_graft(), work / "out")

    sketched = ["WORK/out", "--sketch-size", "4"]

    def published(work: Path) -> None:
        work.mkdir()
        write_source(work / "hmf", make_config("*-BMF"), shards=2)

    read = ["WORK/hmf", "--max-shard-size", "10KB", "--out", "WORK/out"]
    again = ["WORK/graft", "--max-shard-size", "40KB", *to]
    reuse, resume = then(grafted, ["--reuse"]), then(tuned, ["--resume"], ["--overwrite"])
    old = [earlier(graft, grafted), unfinished_of_others]
    return [
        Scenario("graft", nothing, graft, [grafted, *to], reuse),
        Scenario("graft over", old[0], graft, [grafted, "--overwrite", *to], reuse),
        Scenario("align", nothing, align, [aligned, *to], then(aligned, *go_on)),
        Scenario("align on", unfinished, align, [aligned, "--resume", *to], then(aligned, *go_on), share=3),
        Scenario("finetune over", old[1], finetune, [tuned, "--overwrite", *to], resume, share=2),
        Scenario("lora", nothing, finetune, [adapted, *to], then(adapted, *go_on), share=3),
        Scenario("restore", lambda work: shutil.copytree(tiny_graft(), work / "graft"), restore, again, [again]),
        Scenario("import hmf", published, import_hmf, read, [read], share=3),
        Scenario("fit storage", grafted_before, fit_storage, sketched, [sketched]),
    ]


def _stopped(work: Path, recipe: str, step: int, program: Any = align, extra: list[str] | None = None) -> None:
    """Leaves an unfinished run: Ctrl-C at the end of a step."""
    from conversion.training.trainer import StopAfterStep

    ended = StopAfterStep.on_step_end

    def on_step_end(self, args, state, control, **options):
        self.asked = self.asked or state.global_step == step
        ended(self, args, state, control, **options)

    StopAfterStep.on_step_end = on_step_end
    try:
        assert program.main([recipe, *(extra or []), "--output", str(work / "out")]) == 130
    finally:
        StopAfterStep.on_step_end = ended
