"""Settings of the recall program: one flat YAML file, `--set key=value` on top, everything checked before any work."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ..common.settings import RULED, as_number, check_choice, make_settings, read_settings
from .models import MODELS, Model, Sizes, models_of
from .samples import Task
from .tasks import TASKS, tasks_of
from .training import SOLVED_OVER, Recipe


DEVICES = ("auto", "cpu", "cuda")
COUNTS = ("width", "heads", "layers", "parameters", "steps", "batch", "test_samples", "save_steps", "workers")


@dataclass(frozen=True)
class RecallSettings:
    """What is trained on what, and how, alike for all.

    output: folder of table, JSON and pictures. tasks, models: names, or mappings with fields of their own (`tasks_of`,
        `models_of`). state_bytes: the bytes of a text's memory that the ranked models are made to have, each a point of
        the pictures. seeds: of initial weights and samples. learning_rates: each is tried with every model; the best
        one counts, by the loss on samples that are in no test.
    chosen: the model, of those with an eidetic memory, whose losses are counted: name the one that other seeds chose;
        null: in every comparison the best of them, which flatters.
    width, heads, layers, parameters: of every model, the last without embeddings. taps: see `training.Reader`.
    steps, batch, warmup, weight_decay: of every training; warmup is a share of the steps below 1. solved: training
        accuracy over 50 steps at which a training stops early; null: never. test_samples: of each test.
    save_steps: a training that is interrupted goes on from the last multiple. workers: trainings at a time, each in a
        process of one thread. device: where. plot: draw the PNGs.
    """

    output: str
    tasks: Annotated[list[Any], RULED] = field(default_factory=lambda: list(TASKS))
    models: Annotated[list[Any], RULED] = field(default_factory=lambda: list(MODELS))
    state_bytes: Annotated[list[int], RULED] = field(default_factory=lambda: [32768])
    seeds: Annotated[list[int], RULED] = field(default_factory=lambda: [0])
    learning_rates: Annotated[list[float], RULED] = field(default_factory=lambda: [3e-3])
    chosen: str | None = None
    width: int = 64
    heads: int = 2
    layers: int = 2
    parameters: int = 100_000
    taps: int = 3
    steps: int = 1000
    batch: int = 32
    warmup: float = 0.1
    weight_decay: float = 0.01
    solved: float | None = 0.995
    test_samples: int = 512
    save_steps: int = 500
    workers: int = 1
    device: Annotated[str, RULED] = "auto"
    plot: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the report."""
        return asdict(self)

    def sizes(self, task: Task, state_bytes: int) -> Sizes:
        """Return what all models of a task and a memory share; the convolution's state is part of the bytes."""
        own = state_bytes - max(self.taps - 1, 0) * self.width * 4
        return Sizes(self.width, self.heads, self.layers, task.vocabulary, self.parameters, own)

    def recipe(self, seed: int, learning_rate: float) -> Recipe:
        """Return how a model is trained."""
        solved = 2.0 if self.solved is None else self.solved
        steps = (self.steps, self.batch, learning_rate, self.warmup, self.weight_decay, solved)
        return Recipe(*steps, seed, self.save_steps, self.taps)


def load_recall(path: str | Path, overrides: dict[str, Any]) -> tuple[RecallSettings, list[Task], list[Model]]:
    """Read the settings of a YAML file with `overrides` on top, with the tasks and models that they name, checked.

    Raises:
        ValueError: unknown key, task, model or field, a wrong type, sizes that no sample or no model fits.
    """
    values = read_settings(path, overrides)
    if isinstance(values.get("learning_rates"), list):
        values["learning_rates"] = [as_number(value) for value in values["learning_rates"]]
    settings = make_settings(RecallSettings, values)
    _check(settings)
    tasks, models = tasks_of(settings.tasks), models_of(settings.models)
    if settings.chosen is not None:
        _check_chosen(settings, tasks[0], models)
    return settings, tasks, models


def _check_chosen(settings: RecallSettings, task: Task, models: list[Model]) -> None:
    """Refuse a model whose losses would never be counted (ValueError)."""
    sizes = settings.sizes(task, max(settings.state_bytes))
    ours = [model.name for model in models if model.ranked and model.keeps(sizes)]
    if settings.chosen not in ours:
        raise ValueError(
            f"chosen={settings.chosen!r}: must be one of the models that have an eidetic memory and equal bytes, "
            f"{ours}, or null."
        )


def _check(settings: RecallSettings) -> None:
    for name in COUNTS:
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}={getattr(settings, name)}: must be at least 1.")
    check_choice("device", settings.device, DEVICES)
    if settings.width % settings.heads or settings.width // settings.heads % 2:
        raise ValueError(f"heads={settings.heads}: must divide width={settings.width} into even parts.")
    if settings.taps < 0 or settings.taps == 1:
        raise ValueError(f"taps={settings.taps}: must be 2 or more, or 0 for no convolution.")
    if settings.warmup < 0 or settings.weight_decay < 0:
        raise ValueError(f"warmup={settings.warmup}, weight_decay={settings.weight_decay}: must not be negative.")
    if settings.solved is not None and not 0 < settings.solved <= 1:
        raise ValueError(f"solved={settings.solved}: must be a share of right answers in (0, 1], or null for never.")
    if settings.solved is not None and settings.save_steps % SOLVED_OVER:
        raise ValueError(
            f"save_steps={settings.save_steps}: must be a multiple of {SOLVED_OVER}, because whether a task is solved "
            "is looked at over so many steps; or solved: null."
        )
    _check_numbers("state_bytes", settings.state_bytes, (int,), 1)
    _check_numbers("seeds", settings.seeds, (int,), 0)
    _check_numbers("learning_rates", settings.learning_rates, (int, float), 1e-12)


def _check_numbers(name: str, values: Sequence[Any], kinds: tuple[type, ...], least: float) -> None:
    good = isinstance(values, list) and values and all(type(value) in kinds and value >= least for value in values)
    if not good or len(set(values)) != len(values):
        what = "whole numbers" if float not in kinds else "numbers"
        raise ValueError(f"{name}={values!r}: must be a list of distinct {what}, each at least {least:g}.")
