"""What a row of the benchmark is: a parity check, and figures that are measured only if it passes.

A figure is a ratio ours / theirs. `GOALS` holds the ratios that the project wants to reach on 2 CPU cores, and on one
GPU of the H200 class for the rows that need one; a figure of a `--quick` run has no goal, for its sizes are others.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .models import FORMATS, Models
from .timing import Action, Rounds, alternate, compare


GOALS = {
    "scan, default chunk": 0.12,
    "scan, best chunk": 0.45,
    "scan, memory": 0.4,
    "delta, theirs": 0.5,
    "delta, mamba2": 3.0,
    "kalma, mamba2": 15.0,
    "attention, full causal": 0.33,
    "prefill 512": 1.15,
    "prefill 2048": 0.95,
    "prefill 8192": 0.5,
    "prefill 32768": 0.2,
    "prefill 512 bfloat16": 1.25,
    "prefill 2048 bfloat16": 1.1,
    "prefill 8192 bfloat16": 0.5,
    "decode 512": 1.15,
    "decode 8192": 0.45,
    "decode 32768": 0.12,
    "decode 512 bfloat16": 1.15,
    "decode 8192 bfloat16": 0.45,
    "decode compiled": 0.6,
    "decode int8": 0.6,
    "cache 32768": 0.03,
    "cache stays": 1.0,
    "storage decode 512": 1.05,
    "storage decode 8192": 1.3,
    "storage prefill 2048": 1.3,
    "storage prefill 8192": 1.0,
    "prompt lookup": 1 / 1.5,
    "prefix 8192": 0.02,
    "innovation 32768": 0.03,
    "train 2048": 1.5,
    "train 2048 bfloat16": 1.2,
    "cuda scan": 1.05,
    "cuda conv": 1.05,
    "cuda attention": 1.3,
    "cuda decode": 0.5,
    "cuda train": 1.0,
}


@dataclass
class Limits:
    """What one call of a side has to do, and what this machine needs for it at the least (`benchmarks/limits.py`).

    work: bytes that it must read, or floating-point operations that it must do. unit: `"B"` or `"FLOP"`. rate: of this
    machine, measured, per second. operations: started at torch's top level, per_layer: those of one layer; None where
    they are not counted.
    """

    work: int
    unit: str
    rate: float
    operations: int | None = None
    per_layer: int | None = None

    @property
    def floor(self) -> float:
        """Seconds below which this machine cannot do it."""
        return self.work / self.rate


@dataclass
class Figure:
    """One line of the table, one object of the JSON.

    name: what was measured. against: what `theirs` is. context: tokens. unit: `"s"` or `"B"`.
    ours, theirs: medians in that unit. ratio: median of the rounds' ratios. low, high: smallest and largest of them.
    goal: the ratio to reach, None if there is none. panel: the diagram that shows this figure, None for no diagram.
    dtype: the format of both sides, or of ours where `against` names another. limits: by side, `"ours"` and `"theirs"`.
    """

    name: str
    against: str
    context: int
    unit: str
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    rounds: int
    goal: float | None = None
    panel: str | None = None
    note: str = ""
    dtype: str = "float32"
    limits: dict[str, Limits] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.ratio <= self.goal


@dataclass
class Check:
    """A comparison made before anything is timed: passes if difference <= tolerance (so not if it is NaN)."""

    what: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance


@dataclass
class Context:
    """How this run measures. threads: of torch, also in child processes. models: the real model and its graft.

    dtypes: the formats that the rows of whole models measure, names of `models.FORMATS`.
    """

    quick: bool
    threads: int
    device: str
    models: Models
    dtypes: tuple[str, ...] = tuple(FORMATS)
    rounds: Rounds = field(init=False)

    def __post_init__(self):
        self.rounds = Rounds(least=3, most=3, budget=1.0) if self.quick else Rounds()

    def goal(self, name: str, dtype: str = "float32") -> float | None:
        """Return the goal of that name and format, none in a quick run and none for a size that has none."""
        return None if self.quick else GOALS.get(name if dtype == "float32" else f"{name} {dtype}")

    def alternate(self, actions: dict[str, Action], rounds: Rounds | None = None) -> dict[str, list[float]]:
        """`timing.alternate` by this run's rounds, which a quick run keeps whatever a row asks for."""
        wait = torch.cuda.synchronize if self.device == "cuda" else None
        return alternate(actions, self.rounds if self.quick or rounds is None else rounds, wait)


class Row(NamedTuple):
    """A row: its name on the command line, what it compares, its check and its figures (or remarks, as text).

    optional: runs only when asked for. needs: a package without which it does not run.
    """

    name: str
    title: str
    checks: Callable[[Context], list[Check]]
    figures: Callable[[Context], Iterator[Figure | str]]
    device: str = "cpu"
    optional: bool = False
    needs: str | None = None


def figure(
    name: str,
    against: str,
    context: int,
    ours: list[float],
    theirs: list[float],
    unit: str = "s",
    goal: float | None = None,
    **told,
) -> Figure:
    """Return a figure from samples of the same rounds: seconds, or bytes. told: other fields of `Figure`."""
    return Figure(name, against, context, unit, *compare(ours, theirs), goal=goal, **told)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, as a share of the largest magnitude of what is wanted."""
    if found.shape != wanted.shape:
        return float("inf")
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)).item()
