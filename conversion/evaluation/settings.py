"""Settings of an evaluation: one flat YAML file, `--set key=value` on top, everything checked before any work.

Keys are the fields of `EvaluationSettings` plus the memory fields of `BMojoConfig`, which say what the fresh graft is.
What can only be checked against the source, the grafts and the texts is checked in `job.py`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from ..common.settings import DTYPES, RULED, check_choice, known_keys, make_settings, read_settings
from ..data.texts import BUILTINS
from ..grafting.families import MEMORY_FIELDS
from ..grafting.settings import GraftSettings, build_settings
from .baselines import ROWS
from .ruler import TEMPLATES
from .ruler_tasks import TASKS


SECTIONS = ("nll", "agreement", "passkey", "cost", "ruler")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class EvaluationSettings:
    """What to compare, on what text, and which figures to measure.

    source: what the models were made from (see `GraftSettings`). output: folder of table, JSON and diagram.
    rows: which of `baselines.ROWS` are compared. sinks: tokens of the `sinks` row.
    grafts: checkpoint folders, each a row: a path, or `{folder: ..., name: ..., window_size: ...}` with memory fields
        that replace those of its config.
    builtin, topics, files: the text (`texts.read_texts`); nothing given means builtin: pydoc, its held-out part.
    tokens, texts: length and number of the sequences; with `topics`, the first `tokens` of each. chunk: tokens read at
        a time, which bounds memory and changes no result.
    nll, agreement, passkey, cost: the sections, each on or off. greedy_tokens: how far both models write on.
    passkey_lengths, passkey_depths, passkey_trials, passkey_digits: prompts in tokens, places in [0, 1], prompts per
        pair of them, digits of the key. decode_tokens, cost_rounds: tokens written and repetitions for the costs.
    ruler: the benchmark's tasks (`ruler_tasks.TASKS`), off unless asked for. ruler_tasks, ruler_lengths, ruler_samples:
        which, in how many tokens, and how many of each. ruler_template: "none", or the tokenizer's "chat" template.
    presses: classes of NVIDIA's kvpress that compress the source's cache to the bytes of the row `presses_like` (the
        first graft, or else the fresh one), for RULER's tasks. press_python: the Python that has kvpress.
    layers, ssm_init, smoother_tau, memory: of the fresh graft; layers are also those that the windows replace.
    allow_pickle: read a source of pickled weights. dtype, device: what is computed in and where.
    seed: of passkeys, RULER's tasks and initialisation. plot: draw the PNG. cards: write the tables into the README.md
        of the grafts' folders.
    """

    source: str
    output: str
    rows: Annotated[list[str], RULED] = field(default_factory=lambda: list(ROWS))
    sinks: int = 4
    grafts: Annotated[list[Any], RULED] = field(default_factory=list)
    builtin: Annotated[str | None, RULED] = None
    topics: Annotated[list[str] | None, RULED] = None
    files: Annotated[list[str] | None, RULED] = None
    tokens: int = 2048
    texts: int = 3
    chunk: int = 512
    nll: bool = True
    agreement: bool = True
    passkey: bool = True
    cost: bool = True
    greedy_tokens: int = 32
    passkey_lengths: Annotated[list[int], RULED] = field(default_factory=lambda: [1024, 2048])
    passkey_depths: Annotated[list[float], RULED] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    passkey_trials: int = 1
    passkey_digits: int = 5
    decode_tokens: int = 32
    cost_rounds: int = 1
    ruler: bool = False
    ruler_tasks: Annotated[list[str], RULED] = field(default_factory=lambda: list(TASKS)[:3])
    ruler_lengths: Annotated[list[int], RULED] = field(default_factory=lambda: [2048, 4096])
    ruler_samples: int = 20
    ruler_template: Annotated[str, RULED] = "none"
    presses: Annotated[list[str], RULED] = field(default_factory=list)
    presses_like: str | None = None
    press_python: str = ".venvs/kvpress/bin/python"
    layers: Annotated[str | list[int], RULED] = "all"
    ssm_init: Annotated[str, RULED] = "smoother"
    smoother_tau: Annotated[list[float], RULED] = field(default_factory=lambda: [2.0, 16.0])
    allow_pickle: bool = False
    dtype: Annotated[str, RULED] = "float32"
    device: Annotated[str, RULED] = "auto"
    seed: int = 0
    plot: bool = True
    cards: bool = False
    memory: dict[str, Any] = field(default_factory=dict)

    def graft_settings(self) -> GraftSettings:
        """Return the settings of the fresh graft, checked as `conversion.graft` checks its own; nothing is written."""
        names = ("source", "output", "layers", "ssm_init", "smoother_tau", "dtype", "seed", "allow_pickle")
        return build_settings({**{name: getattr(self, name) for name in names}, **self.memory})

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the report."""
        return asdict(self)


KNOWN_KEYS = known_keys(EvaluationSettings, MEMORY_FIELDS)


def load_evaluation(path: str | Path, overrides: Mapping[str, Any] | None = None) -> EvaluationSettings:
    """Read the settings of a YAML file with `overrides` on top, checked.

    Raises:
        ValueError: unknown key (with the closest known one), missing source or output, wrong type or contradiction.
    """
    values = read_settings(path, overrides or {})
    if values.get("builtin") is None and values.get("files") is None:
        values["builtin"] = BUILTINS[0]
    settings = make_settings(EvaluationSettings, values, MEMORY_FIELDS)
    _check(settings)
    return settings


def _check(settings: EvaluationSettings) -> None:
    for item in fields(settings):
        value = getattr(settings, item.name)
        if item.type is int and item.name != "seed" and value < 1:
            raise ValueError(f"{item.name}={value!r}: must be at least 1.")
    check_choice("dtype", settings.dtype, DTYPES)
    check_choice("device", settings.device, DEVICES)
    if not any(getattr(settings, name) for name in SECTIONS):
        raise ValueError(f"nothing to measure: switch one of {', '.join(SECTIONS)} on.")
    if settings.layers == "measured":
        raise ValueError("layers='measured': choosing layers is conversion.graft's work; give its folder under grafts.")
    _check_rows(settings)
    _check_passkey(settings)
    _check_ruler(settings)
    _check_grafts(settings.grafts)
    settings.graft_settings()


def _check_rows(settings: EvaluationSettings) -> None:
    rows = settings.rows
    if not isinstance(rows, list) or len(set(map(str, rows))) != len(rows) or not set(map(str, rows)) <= set(ROWS):
        raise ValueError(f"rows={rows!r}: must be a list of distinct ones of {list(ROWS)}.")
    if not rows and not settings.grafts:
        raise ValueError("rows=[]: nothing to compare; name rows or grafts.")
    if settings.agreement and "source" not in rows:
        raise ValueError(f"agreement=True, rows={rows!r}: agreement is with the source; add it, or agreement: false.")


def _check_token_lengths(name: str, lengths: Any) -> None:
    if not isinstance(lengths, list) or not lengths or not all(type(value) is int and value > 0 for value in lengths):
        raise ValueError(f"{name}={lengths!r}: must be a list of lengths in tokens, e.g. [1024, 2048].")
    if len(set(lengths)) != len(lengths):
        raise ValueError(f"{name}={lengths!r}: must be different lengths.")


def _check_ruler(settings: EvaluationSettings) -> None:
    tasks = settings.ruler_tasks
    if not isinstance(tasks, list) or not tasks or len(set(map(str, tasks))) != len(tasks):
        raise ValueError(f"ruler_tasks={tasks!r}: must be a list of different tasks, of {list(TASKS)}.")
    for task in tasks:
        check_choice("ruler_tasks", task, TASKS)
    _check_token_lengths("ruler_lengths", settings.ruler_lengths)
    check_choice("ruler_template", settings.ruler_template, TEMPLATES)
    presses = settings.presses
    if not isinstance(presses, list) or len(set(map(str, presses))) != len(presses):
        raise ValueError(f"presses={presses!r}: must be a list of different classes of kvpress, e.g. [SnapKVPress].")
    if presses and not settings.ruler:
        raise ValueError(f"presses={presses!r}: are measured by RULER's tasks only; set ruler: true, or presses: [].")


def _check_passkey(settings: EvaluationSettings) -> None:
    depths = settings.passkey_depths
    _check_token_lengths("passkey_lengths", settings.passkey_lengths)
    numbers = isinstance(depths, list) and depths and all(type(value) in (int, float) for value in depths)
    if not numbers or not all(0 <= value <= 1 for value in depths):
        raise ValueError(f"passkey_depths={depths!r}: must be a list of numbers from 0 (beginning) to 1 (end).")


def _check_grafts(grafts: Any) -> None:
    if not isinstance(grafts, list):
        raise ValueError(f"grafts={grafts!r}: must be a list of checkpoint folders.")
    for entry in grafts:
        if isinstance(entry, str) and entry.strip():
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("folder"), str):
            raise ValueError(f"grafts: {entry!r} must be a folder, or a mapping with folder: and name:.")
        unknown = sorted(map(str, set(entry) - {"folder", "name", *MEMORY_FIELDS}))
        if unknown:
            raise ValueError(f"grafts: {entry['folder']}: unknown {unknown}; known are folder, name and memory fields.")


def graft_entries(settings: EvaluationSettings) -> list[tuple[Path, str, dict[str, Any]]]:
    """Folder, name and replaced config fields of every graft; names are made distinct by their folders.

    Raises:
        ValueError: two grafts of one name.
    """
    entries = []
    for entry in settings.grafts:
        values = {"folder": entry} if isinstance(entry, str) else dict(entry)
        folder = Path(values.pop("folder")).expanduser()
        entries.append((folder, str(values.pop("name", folder.name)), values))
    names = [name for _, name, _ in entries]
    if len(set(names)) != len(names):
        raise ValueError(f"grafts: the names {names} must be distinct; give them with {{folder: ..., name: ...}}.")
    return entries
