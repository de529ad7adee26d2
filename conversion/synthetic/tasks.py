"""The table of tasks, and the entries of a settings file that name them."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..common.settings import refuse_unknown
from .associative import MQAR, ForgettingMQAR, FuzzyRecall, NoisyRecall, Recall
from .copying import Compression, Induction, SelectiveCopying
from .samples import Task
from .text import Text


TASKS: dict[str, type[Task]] = {
    "mqar": MQAR,
    "forgetting_mqar": ForgettingMQAR,
    "recall": Recall,
    "noisy_recall": NoisyRecall,
    "fuzzy_recall": FuzzyRecall,
    "selective_copying": SelectiveCopying,
    "induction": Induction,
    "compression": Compression,
    "text": Text,
}


def tasks_of(entries: Any) -> list[Task]:
    """Return the tasks that the list `tasks:` names, checked.

    Args:
        entries: names of `TASKS`, or mappings `{task: mqar, name: even, power: 1}` with a task's own fields.

    Raises:
        ValueError: an unknown task or field, a value of a wrong type, sizes that no sample fits, one name twice.
    """
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"tasks={entries!r}: must be a list of some of {list(TASKS)}.")
    found = [_task(entry) for entry in entries]
    names = [task.name for task in found]
    if len(set(names)) != len(names):
        raise ValueError(f"tasks: the names {names} must be distinct; give them with {{task: ..., name: ...}}.")
    return found


def _task(entry: Any) -> Task:
    values = dict(entry) if isinstance(entry, Mapping) else {"task": entry}
    kind = values.pop("task", None)
    if kind not in TASKS:
        raise ValueError(f"tasks: {kind!r} is no task; known are {', '.join(TASKS)}.")
    known = {item.name: item.type for item in fields(TASKS[kind])}
    refuse_unknown(values, tuple(known), f"tasks: {kind}.")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, value in values.items():
        _check_type(f"tasks: {kind}.{name}", value, known[name])
    task = TASKS[kind](**{"name": kind, **values})
    if not task.stretch or min(task.stretch) < 1:
        task.refuse("stretch", "must be a list of multiples of length, 1 or more, e.g. [1, 4]")
    if task.whole and task.stretch != (1,):
        task.refuse("stretch", "must be [1]: places are read out by vectors that are trained")
    task.check()
    return task


def _check_type(what: str, value: Any, wanted: Any) -> None:
    """Refuse a value of another type than the field's (ValueError)."""
    if wanted is int:
        good = type(value) is int
    elif wanted is float:
        good = type(value) in (int, float)
    elif wanted is str:
        good = isinstance(value, str) and bool(value.strip())
    elif wanted == tuple[int, ...]:
        good = isinstance(value, tuple) and all(type(item) is int for item in value)
    else:
        good = value is None or (isinstance(value, tuple) and all(type(item) is str for item in value))
    if not good:
        name = wanted.__name__ if wanted in (int, float, str) else "list"
        raise ValueError(f"{what}={value!r}: must be of type {name}.")
