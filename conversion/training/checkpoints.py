"""Checkpoints of a training run, and the recipe that a resumed run must share with them.

A run works in `<output>.training/`: `recipe.json`, `checkpoint-<step>/`, `runs/` (TensorBoard). A checkpoint holds the
trained tensors (`trained.safetensors`) and what the Trainer needs to go on. `files.json` is written last: the names,
sizes and SHA-256 of the other files, and of the recipe. So a checkpoint without it was cut short and is never used, and
one that was damaged later is refused by the name of the file. A checkpoint that is removed loses that file first, and a
work folder its name, so that what a killed process leaves of them is known for what it is.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState

from ..common.files import leftovers, partial_name, read_json, rename, sha256, sync, write_json
from ..common.staging import REPORT_FILE
from .settings import TrainingSettings


RECIPE_FILE = "recipe.json"
STATE_FILE = "trainer_state.json"
FILES_FILE = "files.json"
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
    """Return the Trainer's state in a checkpoint, or None where it was not completed."""
    try:
        return TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    except (OSError, ValueError, TypeError):
        return None


def step_of(checkpoint: Path) -> int:
    """Return the step in the folder's name."""
    return int(checkpoint.name.rpartition("-")[2])


def folders_of(work: Path) -> list[Path]:
    """Return the checkpoint folders of a run, complete or not, oldest first."""
    folders = [path for path in work.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(folders, key=step_of)


def checkpoints(work: Path) -> list[Path]:
    """Return the completed checkpoints of a run, oldest first."""
    return [path for path in folders_of(work) if (path / FILES_FILE).is_file()]


def seal(checkpoint: Path, recipe: Mapping[str, Any]) -> None:
    """Complete a checkpoint: all its files are on the disk, with their hashes.

    Args:
        recipe: of the run that made it, as `recipe_of` tells it.
    """
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        sync(path)
        name = path.relative_to(checkpoint).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(checkpoint / FILES_FILE, {"recipe": fingerprint(recipe), "files": files})


def fingerprint(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of a recipe."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def check_files(checkpoint: Path, flag: str = "--resume") -> None:
    """Refuse a checkpoint that is not what was sealed (ValueError that names the files); reads all of it."""
    what = f"{flag}: checkpoint {str(checkpoint)!r}"
    sealed = read_json(checkpoint / FILES_FILE, what)
    try:
        problems = [
            f"{name} {problem}"
            for name, known in sealed["files"].items()
            if (problem := _problem(checkpoint / name, known["bytes"], known["sha256"]))
        ]
        recipe = sealed["recipe"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{what}: {FILES_FILE} is damaged ({error!r}). {_way_out(checkpoint)}") from error
    if problems:
        raise ValueError(f"{what} is damaged: {'; '.join(problems)}. {_way_out(checkpoint)}")
    if recipe != fingerprint(read_recipe(checkpoint.parent, flag)):
        raise ValueError(
            f"{what} was made by another recipe than {RECIPE_FILE} beside it states (settings of another run, or an "
            f"edited file). {_way_out(checkpoint)}"
        )


def _problem(path: Path, size: int, digest: str) -> str | None:
    """Return what is wrong with a file of a checkpoint."""
    if not path.is_file():
        return "is missing"
    found = path.stat().st_size
    if found != size:
        return f"has {found:,} bytes instead of {size:,}"
    return None if sha256(path) == digest else f"has other contents than were written (SHA-256 in {FILES_FILE})"


def _way_out(checkpoint: Path) -> str:
    earlier = [path for path in checkpoints(checkpoint.parent) if step_of(path) < step_of(checkpoint)]
    if not earlier:
        return "Put the file back from a copy, or start anew with --overwrite."
    return (
        f"Put the file back from a copy, or delete this folder to go on from {earlier[-1].name}, or start anew with "
        "--overwrite."
    )


def remove_checkpoint(checkpoint: Path) -> None:
    """Delete a checkpoint, first what says that it is complete."""
    (checkpoint / FILES_FILE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def remove_incomplete(work: Path) -> None:
    """Delete checkpoints that were cut short."""
    complete = checkpoints(work)
    for path in folders_of(work):
        if path not in complete:
            remove_checkpoint(path)


def rotate(work: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit` (None or 0: none), never the last one nor the best one.

    Args:
        best: its folder, as the Trainer's state names it.
    """
    kept = {None if best is None else Path(best).name}
    done = checkpoints(work)
    spare = [path for path in done[:-1] if path.name not in kept]
    for path in spare[: len(done) - limit] if limit and len(done) > limit else []:
        remove_checkpoint(path)


def best_checkpoint(work: Path) -> Path | None:
    """Return the checkpoint with the lowest held-out loss, as the last one knows it, or None."""
    done = checkpoints(work)
    state = read_state(done[-1]) if done else None
    best = None if state is None else state.best_model_checkpoint
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


def read_recipe(work: Path, flag: str) -> dict[str, Any]:
    """Return the recipe of the run that works in `work` (ValueError: it cannot be read)."""
    try:
        return read_json(work / RECIPE_FILE, f"{flag}: {str(work)!r}")
    except ValueError as error:
        raise ValueError(f"{error} Move this folder away and start anew.") from error


def check_recipe(work: Path, recipe: Mapping[str, Any], flag: str = "--resume") -> None:
    """Refuse to go on with a run of another recipe (ValueError that lists what differs).

    Args:
        recipe: of the settings now. flag: what asked; --finish reads no data, so its recipe has no facts about them.
    """
    before = read_recipe(work, flag)
    looked_at = before.keys() | recipe.keys() if flag == "--resume" else recipe.keys()
    keys = [key for key in sorted(looked_at) if before.get(key) != recipe.get(key)]
    if keys:
        shown = "; ".join(f"{key}: {before.get(key)!r} then, {recipe.get(key)!r} now" for key in keys)
        raise ValueError(
            f"{flag}: the run in {str(work)!r} was started with another recipe ({shown}); restore these settings, or "
            "start anew with --overwrite."
        )


def check_work(output: Path, resume: bool, overwrite: bool, finish: bool) -> None:
    """Refuse what would lose an unfinished run or other files, or go on with a run that is not there (ValueError)."""
    work = work_folder(output)
    _check_ours(output, work)
    done = checkpoints(work)
    if done and not (resume or finish or overwrite):
        raise ValueError(
            f"output={str(output)!r}: {str(work)!r} holds an unfinished run at step {step_of(done[-1])}; --resume goes "
            "on with it, --finish last writes its result as it is, --overwrite starts anew."
        )
    if done or overwrite:
        return
    unsealed = [path for path in folders_of(work) if read_state(path) is not None]
    if unsealed:
        raise ValueError(
            f"output={str(output)!r}: {str(unsealed[-1])!r} has no {FILES_FILE}: it was cut short at its very end, or "
            "written by a version that recorded no hashes (which can still finish it); --overwrite starts anew."
        )
    if resume or finish:
        flag = "--resume" if resume else "--finish"
        hint = f"; {str(output)!r} holds the result of a finished run" if (output / REPORT_FILE).is_file() else ""
        raise ValueError(f"{flag}: there is no checkpoint in {str(work)!r}{hint}; start without it.")


def _check_ours(output: Path, work: Path) -> None:
    """Refuse a work folder that holds something, but no recipe of ours: it would be emptied (ValueError)."""
    if not work.exists() and not work.is_symlink():
        return
    if work.is_dir() and not work.is_symlink() and (_is_begun(work) or _holds_recipe(work)):
        return
    raise ValueError(
        f"output={str(output)!r}: a run would empty {str(work)!r} and work there, which is no work folder of ours (it "
        f"has no {RECIPE_FILE} of ours); move it away, or give another output."
    )


def _is_begun(work: Path) -> bool:
    """Whether a folder holds nothing, or only what one that was killed while it wrote the recipe left."""
    return set(work.iterdir()) <= set(leftovers(work / RECIPE_FILE))


def _holds_recipe(work: Path) -> bool:
    """Whether there is a recipe as `recipe_of` makes it, and not just a file of that name."""
    try:
        found = read_json(work / RECIPE_FILE, str(work))
    except ValueError:
        return False
    return {"source", "seed", "data.packing"} <= found.keys()


def start_work(output: Path, recipe: Mapping[str, Any]) -> Path:
    """Return an empty work folder with the recipe in it, in place of an earlier run's (ValueError: of anything
    else)."""
    work = work_folder(output)
    _check_ours(output, work)  # once more: reading the data took a while
    remove_work(output)
    work.mkdir(parents=True)
    write_json(work / RECIPE_FILE, recipe)
    return work


def remove_work(output: Path) -> None:
    """Delete the work folder; from its new name on it is a remainder that the next writer of `output` clears away."""
    work = work_folder(output)
    if work.exists():
        doomed = partial_name(output)
        rename(work, doomed)
        shutil.rmtree(doomed)
