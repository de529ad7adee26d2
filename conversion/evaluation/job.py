"""The evaluation itself: checks everything, then measures model by model and stores every measurement at once.

Order of work: source, texts, grafts, lengths and output are checked before any weights are read. Then, for each row of
the table: build the model, read the texts (NLL, agreement), hide passkeys, time it, solve RULER's tasks, drop the
model. A measurement is kept under a fingerprint of all that decides it (`Job.key`), so that an interrupted run goes on
where it stopped; the samples of RULER's tasks are kept one by one.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_bmojo import BMojoConfig

from ..common.files import read_json
from ..common.nll import bucket_means, curve, read
from ..common.plotting import require_matplotlib
from ..common.provenance import code_fingerprint
from ..common.weights import open_weights
from ..data.texts import fingerprint, openings, read_texts, sequences, token_stream
from ..grafting.pipeline import Plan, plan_graft
from ..grafting.sources import open_config, open_source, open_tokenizer
from .agreement import continue_greedily, equal_prefix, equal_share
from .baselines import Models, Row, equal_memory_window
from .cost import measure_cost
from .passkey import Prompt, make_prompts, score_prompts
from .presses import check_presses
from .ruler import Prompts, solve
from .settings import EvaluationSettings, graft_entries
from .store import Store, hardware


@dataclass(frozen=True)
class Job:
    """An evaluation that was checked and can start. texts: ids `[1, T]` each; window: the W that positions count in;
    ruler: makes the prompts of RULER's tasks, None without them."""

    settings: EvaluationSettings
    rows: list[Row]
    texts: list[torch.Tensor]
    prompts: list[Prompt]
    window: int
    code: str
    ruler: Prompts | None = None

    def sections(self, row: Row) -> list[str]:
        """Return the names of all that is measured of a row."""
        settings = self.settings
        pairs = [(task, length) for length in settings.ruler_lengths for task in settings.ruler_tasks]
        ruler = [ruler_section(*pair) for pair in pairs] * settings.ruler
        if row.kind == "press":
            return ruler
        found = ["reading"] * (settings.nll or settings.agreement) + ["passkey"] * settings.passkey
        return found + ["cost"] * settings.cost + ruler

    def missing(self, row: Row, store: Store) -> list[str]:
        """Return those that `store` does not hold, or not whole."""
        return [section for section in self.sections(row) if not self._holds(row, section, store)]

    def _holds(self, row: Row, section: str, store: Store) -> bool:
        if not store.has(row.name, section, self.key(row, section)):
            return False
        samples = store.get(row.name, section).get("samples")
        return samples is None or len(samples) >= self.settings.ruler_samples

    def key(self, row: Row, section: str) -> str:
        """Fingerprint of everything that decides a measurement: code, model, texts, and the section's settings.

        Speeds are those of a machine, so costs count on the one they were measured on, with as many threads, only.
        """
        settings, device = self.settings, str(device_of(self.settings))
        reading = [fingerprint(self.texts), self.window]
        if settings.agreement:  # which is with the source, whatever the row itself is made of
            reading += [settings.greedy_tokens, next(row.facts for row in self.rows if row.kind == "source")]
        of_section = {
            "reading": reading,
            "passkey": [fingerprint([prompt.ids for prompt in self.prompts]), [p.digits for p in self.prompts]],
            "cost": [fingerprint(self.texts[:1]), settings.decode_tokens, settings.cost_rounds, hardware(device)],
        }
        ruler = [section, None if self.ruler is None else self.ruler.facts()]
        parts = [self.code, row.facts, settings.dtype, device, settings.chunk, of_section.get(section, ruler)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def device_of(settings: EvaluationSettings) -> torch.device:
    """Return the device that is computed on.

    Raises:
        ValueError: `cuda` where there is none.
    """
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': this machine has no CUDA device that torch can use; set device: cpu.")
    return torch.device(settings.device)


def prepare(settings: EvaluationSettings) -> Job:
    """Open the source and check everything that can be checked without reading weights.

    Raises:
        ValueError: anything about settings, source, grafts or texts that stops the evaluation.
    """
    if settings.plot:
        require_matplotlib("plot: true")
    device = device_of(settings)
    source = open_source(settings.source, settings.allow_pickle)
    plan = plan_graft(settings.graft_settings(), source)
    _check_lengths(settings, plan.config.max_position_embeddings)
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise ValueError(f"source={settings.source!r}: has no tokenizer, so it reads no text; add one to its folder.")
    models = Models(plan, device, getattr(torch, settings.dtype))
    rows = _rows(settings, models, _grafts(settings, plan, tokenizer))
    rows += _press_rows(settings, models, rows)
    texts = read_texts(settings.builtin, settings.files, settings.topics)
    if settings.topics is None:
        ids = sequences(tokenizer, texts, settings.tokens, settings.texts)
    else:
        ids = openings(tokenizer, texts, settings.tokens)
    prompts = []
    if settings.passkey:
        prompts = make_prompts(
            tokenizer,
            token_stream(tokenizer, texts),
            settings.passkey_lengths,
            settings.passkey_depths,
            settings.passkey_trials,
            settings.passkey_digits,
            settings.seed,
        )
    ruler = _ruler_prompts(settings, tokenizer, texts) if settings.ruler else None
    return Job(settings, rows, ids, prompts, plan.config.window_size, code_fingerprint(), ruler)


def _ruler_prompts(settings: EvaluationSettings, tokenizer: PreTrainedTokenizerBase, texts: dict[str, str]) -> Prompts:
    """Return what makes RULER's prompts, of which each length and task has one."""
    prompts = Prompts(tokenizer, "\n\n".join(texts.values()), settings.ruler_template, settings.seed)
    for length in settings.ruler_lengths:
        for task in settings.ruler_tasks:
            prompts.make(task, length, 0)
    return prompts


def ruler_section(task: str, length: int) -> str:
    """Return the name under which a task's samples of a length are stored."""
    return f"ruler {task} {length}"


def _check_lengths(settings: EvaluationSettings, positions: int) -> None:
    """Nothing may go beyond the positions that the source knows: its own figures would mean nothing there."""
    behind = max(settings.greedy_tokens if settings.agreement else 0, settings.decode_tokens if settings.cost else 0)
    if (settings.nll or settings.agreement or settings.cost) and settings.tokens + behind > positions:
        raise ValueError(
            f"tokens={settings.tokens}: with {behind} tokens written behind them they leave the {positions:,} "
            "positions of the source; give fewer, or switch agreement and cost off."
        )
    longest = max(settings.passkey_lengths) + 2 * settings.passkey_digits
    if settings.passkey and longest > positions:
        raise ValueError(f"passkey_lengths: {longest} tokens leave the {positions:,} positions of the source.")


def _grafts(
    settings: EvaluationSettings, plan: Plan, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[Path, str, BMojoConfig, dict[str, Any]]]:
    """Return the graft folders with their configs; every one must be a B'MOJO model of the source's vocabulary."""
    found = []
    for folder, name, overrides in graft_entries(settings):
        what = f"grafts: {str(folder)!r}"
        if not (folder / "config.json").is_file():
            raise ValueError(f"{what} is no checkpoint folder (it has no config.json).")
        stated = read_json(folder / "config.json", what)
        if stated.get("model_type") != "bmojo":
            raise ValueError(f"{what} holds a {stated.get('model_type')!r} model, not a B'MOJO model.")
        if not any(folder.glob("*.safetensors")):
            raise ValueError(f"{what} has no safetensors weights.")
        open_weights(folder, what)
        config = open_config(folder, what, **overrides)
        if config.vocab_size != plan.config.vocab_size:
            raise ValueError(
                f"{what} has a vocabulary of {config.vocab_size} tokens, source {settings.source!r} "
                f"one of {plan.config.vocab_size}; compare models of one vocabulary."
            )
        if (folder / "tokenizer.json").is_file():
            theirs = open_tokenizer(folder, what)
            if theirs.get_vocab() != tokenizer.get_vocab():
                raise ValueError(f"grafts: the tokenizer of {str(folder)!r} has other tokens than the source's.")
        found.append((folder, name, config, overrides))
    return found


def _rows(settings: EvaluationSettings, models: Models, grafts: list) -> list[Row]:
    """Return the table's rows, in its order."""
    config, wanted = models.plan.config, settings.rows
    rows = []
    if "source" in wanted:
        rows.append(models.source())
    if "window" in wanted:
        rows.append(models.window(config.window_size, f"sliding window of {config.window_size}"))
    if "sinks" in wanted:
        rows.append(models.sinks(settings.sinks, config.window_size, f"window + {settings.sinks} sinks"))
    if "equal_memory" in wanted:
        rows += _equal_rows(settings, models, grafts)
    if "fresh" in wanted:
        rows.append(models.fresh())
    rows += [models.graft(folder, name, its, overrides) for folder, name, its, overrides in grafts]
    names = [row.name for row in rows]
    if len(set(names)) != len(names):
        raise ValueError(f"grafts: the rows {names} must have distinct names; rename the graft.")
    return rows


def _press_rows(settings: EvaluationSettings, models: Models, rows: list[Row]) -> list[Row]:
    """Return the source with caches that a press compresses to the bytes of another row's memory."""
    if not settings.presses:
        return []
    names = [row.name for row in rows]
    ours = [row.name for row in rows if row.kind == "graft"] + [row.name for row in rows if row.kind == "fresh"]
    like = settings.presses_like or next(iter(ours), None)
    if like not in names:
        raise ValueError(f"presses_like={settings.presses_like!r}: presses take the bytes of a row, one of {names}.")
    made_by = check_presses(settings.press_python, settings.presses)
    its = next(row for row in rows if row.name == like)
    return [models.pressed(press, settings.press_python, its, made_by) for press in settings.presses]


def _equal_rows(settings: EvaluationSettings, models: Models, grafts: list) -> list[Row]:
    """Return windows of the bytes of each of our memories, without and with sinks, which then count among the bytes."""
    ours = [(name, config) for _, name, config, _ in grafts]
    if "fresh" in settings.rows or not grafts:
        ours.insert(0, ("fresh graft", models.plan.config))
    sizes: dict[int, list[str]] = {}
    for name, config in ours:
        sizes.setdefault(equal_memory_window(config, models.dtype), []).append(name)
    rows, count = [], settings.sinks
    for size, names in sizes.items():
        if size <= count:
            raise ValueError(
                f"sinks={count}: the bytes of {names} hold {size} tokens, so no window is left; give fewer."
            )
        bytes_of = f"(bytes of {', '.join(names)})"
        rows.append(models.window(size, f"window of {size} {bytes_of}", "equal_memory"))
        label = f"window of {size - count} + {count} sinks {bytes_of}"
        rows.append(models.sinks(count, size - count, label, "equal_memory_sinks"))
    return rows


def run(job: Job, store: Store) -> None:
    """Measure what `store` does not hold yet, one model in memory at a time, and stores each measurement at once."""
    for row in job.rows:
        missing = job.missing(row, store)
        if not missing:
            continue
        model = row.build()
        for section in missing:
            if section.startswith("ruler "):
                _solve(job, row, model, section, store)
            else:
                store.put(row.name, section, job.key(row, section), _measure(job, row, model, section, store))
        del model


def _solve(job: Job, row: Row, model: torch.nn.Module, section: str, store: Store) -> None:
    """Answer the prompts of one task and length that `store` does not hold, storing each."""
    key, settings, (_, task, length) = job.key(row, section), job.settings, section.split()
    samples, like = store.get(row.name, section)["samples"] if store.has(row.name, section, key) else [], None
    if row.kind == "press":
        like = [sample["bytes"] for sample in store.get(row.facts["like"], section)["samples"]]
    with tqdm(total=settings.ruler_samples, initial=len(samples), desc=f"{row.name}: {task} {length}") as bar:
        while len(samples) < settings.ruler_samples:
            which = job.ruler, task, int(length), len(samples)
            done = model.solve(*which, like[len(samples)]) if like else solve(model, *which, settings.chunk)
            samples = [*samples, done]
            store.put(row.name, section, key, {"samples": samples})
            bar.update()


def _measure(job: Job, row: Row, model: torch.nn.Module, section: str, store: Store) -> dict[str, Any]:
    settings = job.settings
    if section == "reading":
        lengths = [ids.shape[1] for ids in job.texts]
        theirs = None if row.kind == "source" or not settings.agreement else store.get("source", "reading")
        with tqdm(total=sum(lengths), desc=f"{row.name}: reading", unit="token") as bar:
            return _read_texts(job, model, theirs, bar)
    if section == "passkey":
        total = sum(prompt.ids.shape[1] for prompt in job.prompts)
        with tqdm(total=total, desc=f"{row.name}: passkeys", unit="token") as bar:
            return {"prompts": score_prompts(model, job.prompts, settings.chunk, bar)}
    ids = job.texts[0]
    with tqdm(total=(1 + settings.cost_rounds) * ids.shape[1], desc=f"{row.name}: timing", unit="token") as bar:
        return measure_cost(model, ids, settings.chunk, settings.decode_tokens, settings.cost_rounds, bar)


def _read_texts(job: Job, model: torch.nn.Module, theirs: dict[str, Any] | None, bar: Any) -> dict[str, Any]:
    """NLL by bucket and text, and, where `theirs` is the source's reading, how far the model agrees with it.

    The source's own reading (`theirs` None) holds what it predicted and wrote, for the rows that follow.
    """
    settings, found = job.settings, {"nll": [], "curve": [], "predicted": [], "written": [], "equal": [], "prefix": []}
    for index, ids in enumerate(job.texts):
        reading = read(model, ids, settings.chunk, bar)
        found["nll"].append(bucket_means(reading.nll, job.window))
        found["curve"].append(curve(reading.nll))
        if not settings.agreement:
            continue
        written = continue_greedily(model, reading, settings.greedy_tokens)
        if theirs is None:
            found["predicted"].append(reading.predicted.tolist())
            found["written"].append(written)
        else:
            source_said = torch.tensor(theirs["predicted"][index])
            found["equal"].append(equal_share(reading.predicted, source_said, job.window))
            found["prefix"].append(equal_prefix(written, theirs["written"][index]))
    return {name: values for name, values in found.items() if values}
