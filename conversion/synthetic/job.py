"""The cells of a run (task, model, bytes, seed, learning rate): checked together, then trained one by one and stored.

All models of all cells are planned before the first is trained. A cell counts under a fingerprint of all that decides
it, so that a run goes on where it stopped: between cells from the store, within one from its last checkpoint.
"""

import functools
import hashlib
import json
import multiprocessing
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from modeling_bmojo import BMojoConfig

from ..common.plotting import require_matplotlib
from ..common.provenance import CONVERSION, PACKAGE, SHOWN, fingerprint_of, import_closure
from ..evaluation.store import Store
from .models import Model, bytes_read, parameters
from .samples import Task
from .settings import RecallSettings
from .training import Recipe, choice_loss, score, train


SECTION = "trained"


@functools.cache
def code() -> str:
    """Hash the modules that decide the figures (SHA-256): these tasks, models and trainings, and the package's own."""
    roots = (CONVERSION, PACKAGE)
    return fingerprint_of(import_closure((Path(__file__), PACKAGE / "modeling_bmojo.py"), roots, SHOWN), roots)


@dataclass(frozen=True)
class Cell:
    """One training. row: its name in the store; model: its name; ranked: whether its bytes are the wanted ones."""

    row: str
    task: Task
    model: str
    ranked: bool
    state_bytes: int
    config: BMojoConfig
    recipe: Recipe
    test_samples: int
    device: str

    def key(self) -> str:
        """Fingerprint of everything that decides the figures; speeds are not compared."""
        told = self.config.to_dict()
        recipe = {name: value for name, value in self.recipe._asdict().items() if name != "save_steps"}
        parts = [
            code(),
            type(self.task).__name__,
            asdict(self.task),
            self.task.facts(),
            told,
            recipe,
            self.test_samples,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def device_of(settings: RecallSettings) -> str:
    """Return the device that is computed on (ValueError: `cuda` where there is none)."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': this machine has no CUDA device that torch can use; set device: cpu.")
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return settings.device


def plan(settings: RecallSettings, tasks: list[Task], models: list[Model]) -> list[Cell]:
    """Return all cells, their models' sizes solved for; models that grow with the text once, for the largest bytes.

    Raises:
        ValueError: a model that no size of its memory makes equal to the others, or a missing library or device.
    """
    if settings.plot:
        require_matplotlib("plot: true")
    device, cells = device_of(settings), []
    for seed in settings.seeds:  # outermost: what is done first is a whole comparison
        for task in tasks:
            for model in models:
                for size in settings.state_bytes if model.ranked else [max(settings.state_bytes)]:
                    config = model.config(settings.sizes(task, size), task.length * max(task.stretch))
                    for rate in settings.learning_rates:
                        row = f"{task.name} | {model.name} | {size} | seed {seed} | lr {rate:g}"
                        recipe = settings.recipe(seed, rate)
                        cell = (
                            row,
                            task,
                            model.name,
                            model.ranked,
                            size,
                            config,
                            recipe,
                            settings.test_samples,
                            device,
                        )
                        cells.append(Cell(*cell))
    return cells


def run(cells: list[Cell], store: Store, workers: int) -> None:
    """Train what `store` does not hold yet, and store each cell at once.

    Args:
        workers: trainings at a time; 1 trains in this process.
    """
    missing = [cell for cell in cells if not store.has(cell.row, SECTION, cell.key())]
    work = store.path.parent / "work"
    if missing:
        store.write(finished=False)  # marks the folder: a run that is cut short in its first training goes on, too
    with tqdm(total=len(cells), initial=len(cells) - len(missing), unit="model", disable=None) as bar:
        for cell, found in _results(missing, work, workers):
            store.put(cell.row, SECTION, cell.key(), found)
            shutil.rmtree(work / cell.key()[:16], ignore_errors=True)
            accuracy = ", ".join(f"{value['accuracy']:.3f}" for value in found["scores"].values())
            bar.write(f"{cell.row}: {accuracy} after {found['steps']} steps, {found['seconds']:.0f} s")
            bar.update()


def _results(cells: list[Cell], work: Path, workers: int) -> Iterator[tuple[Cell, dict[str, Any]]]:
    if workers == 1 or len(cells) < 2:
        for cell in cells:
            yield cell, measure(cell, work)
        return
    # spawn: a forked process would inherit torch's threads and, on a GPU, a device that it must not touch.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread)
    try:
        waiting = {pool.submit(measure, cell, work): cell for cell in cells}
        for done in as_completed(list(waiting)):
            yield waiting.pop(done), done.result()
    except GeneratorExit:
        raise
    except BaseException as error:
        pool.shutdown(wait=True, cancel_futures=True)  # Ctrl-C has stopped the others as well; else they end first
        for done, cell in waiting.items():
            if not done.cancelled() and done.exception() is None:
                yield cell, done.result()
        if isinstance(error, BrokenProcessPool):
            raise ValueError(
                f"workers={workers}: the process of a training was killed, as where memory is short; what was trained "
                "is stored, --reuse goes on from there; set fewer workers."
            ) from error
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _one_thread() -> None:
    torch.set_num_threads(1)


def measure(cell: Cell, work: Path) -> dict[str, Any]:
    """Train a cell's model and return its scores, sizes and times."""
    start = time.time()
    place = work / cell.key()[:16]
    reader, found = train(cell.config, cell.task, cell.recipe, cell.device, place)
    middle = time.time()
    tested = (reader, cell.task, cell.test_samples, cell.recipe.seed, cell.recipe.batch)
    scores = score(*tested)
    config, task = cell.config, cell.task
    own = max(cell.recipe.taps - 1, 0) * config.hidden_size * 4
    return {
        "task": task.name,
        "model": cell.model,
        "ranked": cell.ranked,
        "eidetic": any(config.layer_spec(index).slots for index in range(config.num_hidden_layers)),
        "wanted_bytes": cell.state_bytes,
        "bytes": own + bytes_read(reader.model, task.length * max(task.stretch)),
        "parameters": parameters(config),
        "memory": {"window": config.window_size, "slots": config.eidetic_size, "channels": config.ssm_state_size},
        "seed": cell.recipe.seed,
        "learning_rate": cell.recipe.learning_rate,
        "choice_loss": choice_loss(*tested),
        "scores": scores,
        **found,
        "seconds": middle - start,
        "test_seconds": time.time() - middle,
    }
