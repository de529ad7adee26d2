"""Checkpoints of a training run, and the recipe that a resumed run must share with them.

A run works in `<output>.training/`: `recipe.json`, `checkpoint-<step>/`, `runs/` (TensorBoard). A checkpoint holds the
trained tensors (`trained.safetensors`) and what the Trainer needs to go on; `trainer_state.json` is written last, so a
checkpoint without a readable one was cut short and is never used.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState

from .training_settings import TrainingSettings


RECIPE_FILE = "recipe.json"
STATE_FILE = "trainer_state.json"
TENSORS_FILE = "trained.safetensors"
# Fields of TrainingArguments that change what is written or shown, not what is learnt.
NEUTRAL = (
    "logging_",
    "save_",
    "report_to",
    "disable_tqdm",
    "run_name",
    "dataloader_num_workers",
    "log_level",
    "project",
)


def work_folder(output: Path) -> Path:
    """Where the run of this output works."""
    return output.with_name(f"{output.name}.training")


def read_state(checkpoint: Path) -> TrainerState | None:
    """The Trainer's state in a checkpoint, or None where it was not completed."""
    try:
        return TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    except (OSError, ValueError, TypeError):
        return None


def step_of(checkpoint: Path) -> int:
    """The step in the folder's name."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(work: Path) -> list[Path]:
    """The completed checkpoints of a run, oldest first."""
    folders = [path for path in work.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return [path for path in sorted(folders, key=step_of) if read_state(path) is not None]


def remove_incomplete(work: Path) -> None:
    """Deletes checkpoints that were cut short."""
    complete = checkpoints(work)
    for path in work.glob("checkpoint-*"):
        if path not in complete:
            shutil.rmtree(path)


def best_checkpoint(work: Path) -> Path | None:
    """The checkpoint with the lowest held-out loss, as the last one knows it, or None."""
    done = checkpoints(work)
    best = read_state(done[-1]).best_model_checkpoint if done else None
    found = None if best is None else work / Path(best).name
    return found if found in done else None


def recipe_of(settings: TrainingSettings, facts: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides what a run computes, flat: its settings without neutral ones, and facts such as its files."""
    values = settings.as_dict()
    values["trainer"] = {key: value for key, value in values["trainer"].items() if not key.startswith(NEUTRAL)}
    return json.loads(json.dumps(_flat({**values, **facts}, "")))


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def check_recipe(work: Path, recipe: Mapping[str, Any], flag: str = "--resume") -> None:
    """Refuses to go on with a run of another recipe (ValueError that lists what differs).

    Args:
        recipe: of the settings now. flag: what asked; --finish reads no data, so its recipe has no facts about them.
    """
    try:
        before = json.loads((work / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{flag}: {work / RECIPE_FILE} cannot be read ({error}); move {str(work)!r} away and start anew."
        ) from error
    looked_at = before.keys() | recipe.keys() if flag == "--resume" else recipe.keys()
    keys = [key for key in sorted(looked_at) if before.get(key) != recipe.get(key)]
    if keys:
        shown = "; ".join(f"{key}: {before.get(key)!r} then, {recipe.get(key)!r} now" for key in keys)
        raise ValueError(
            f"{flag}: the run in {str(work)!r} was started with another recipe ({shown}); restore these settings, or "
            "start anew with --overwrite."
        )


def check_work(output: Path, resume: bool, overwrite: bool, finish: bool) -> None:
    """Refuses what would lose an unfinished run or other files, or go on with a run that is not there (ValueError)."""
    work = work_folder(output)
    _check_ours(output, work)
    done = checkpoints(work)
    if (resume or finish) and not done:
        flag = "--resume" if resume else "--finish"
        raise ValueError(f"{flag}: there is no checkpoint in {str(work)!r}; start without it.")
    if done and not (resume or finish or overwrite):
        raise ValueError(
            f"output={str(output)!r}: {str(work)!r} holds an unfinished run at step {step_of(done[-1])}; --resume goes "
            "on with it, --finish last writes its result as it is, --overwrite starts anew."
        )


def _check_ours(output: Path, work: Path) -> None:
    """Refuses a work folder that holds something, but no recipe of ours: it would be emptied (ValueError)."""
    if not work.exists() and not work.is_symlink():
        return
    if work.is_dir() and not work.is_symlink() and (not any(work.iterdir()) or _holds_recipe(work)):
        return
    raise ValueError(
        f"output={str(output)!r}: a run would empty {str(work)!r} and work there, which is no work folder of ours (it "
        f"has no {RECIPE_FILE} of ours); move it away, or give another output."
    )


def _holds_recipe(work: Path) -> bool:
    """Whether there is a recipe as `recipe_of` makes it, and not just a file of that name."""
    try:
        found = json.loads((work / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"source", "seed", "data.packing"} <= found.keys()


def start_work(output: Path, recipe: Mapping[str, Any]) -> Path:
    """An empty work folder with the recipe in it, in place of an earlier run's (ValueError: of anything else)."""
    work = work_folder(output)
    _check_ours(output, work)  # once more: reading the data took a while
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    (work / RECIPE_FILE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
    return work
