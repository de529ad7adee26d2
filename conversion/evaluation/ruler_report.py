"""What RULER's samples come to: scores with intervals, the difference to the source on the same samples, one table."""

from collections.abc import Mapping, Sequence
from typing import Any

from .baselines import Row
from .job import ruler_section
from .ruler import paired, wilson


def summarise_ruler(
    rows: Sequence[Row], measurements: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]
) -> dict[str, list[dict[str, Any]]]:
    """Return one entry per task and length of every row, by the row's name, as plain data.

    An entry has task, length, samples, score with low and high (95%, Wilson), bytes of the memory, and above_source:
    mean, low and high of the difference to the source's score on the same samples, where it was measured.
    """
    found: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    for length in settings["ruler_lengths"]:
        for task in settings["ruler_tasks"]:
            source = None
            for row in rows:
                samples = measurements[row.name][ruler_section(task, length)]["samples"][: settings["ruler_samples"]]
                source = samples if row.kind == "source" else source
                found[row.name].append(_entry(task, length, samples, None if row.kind == "source" else source))
    return found


def _entry(task: str, length: int, samples: Sequence[Mapping[str, Any]], source: Any) -> dict[str, Any]:
    scores = [sample["score"] for sample in samples]
    mean = sum(scores) / len(scores)
    low, high = wilson(mean, len(scores))
    entry = {"task": task, "length": length, "samples": len(scores), "score": mean, "low": low, "high": high}
    entry["bytes"] = max(sample["bytes"] for sample in samples)
    if source is not None:
        entry["above_source"] = paired(scores, [sample["score"] for sample in source])
    return entry


def ruler_table(figures: Mapping[str, Sequence[Mapping[str, Any]]], settings: Mapping[str, Any]) -> str:
    """Return a Markdown table: a row per model and length, a column per task, percent with the interval's half."""
    tasks = settings["ruler_tasks"]
    headings = ["model", "tokens", *tasks, *(["all tasks"] if len(tasks) > 1 else []), "memory, MB"]
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for length in settings["ruler_lengths"]:
        for name, entries in figures.items():
            own = {entry["task"]: entry for entry in entries if entry["length"] == length}
            cells = [_cell(own[task]) for task in tasks]
            if len(tasks) > 1:
                cells.append(f"{100 * sum(entry['score'] for entry in own.values()) / len(own):.0f}")
            memory = max(entry["bytes"] for entry in own.values())
            lines.append(f"| {name} | {length:,} | {' | '.join(cells)} | {memory / 1e6:,.1f} |")
    note = (
        f"RULER's tasks, {settings['ruler_samples']} samples each, template {settings['ruler_template']!r}, seed "
        f"{settings['seed']}: percent of the answers found, in brackets the 95% interval (Wilson), behind it the "
        "difference to the source on the same samples with its 95% interval (Agresti and Min). Tokens: of prompt and "
        "answer together. Memory: of the cache behind the longest answer; keys and values of stored tokens not counted."
    )
    return "\n".join(lines) + "\n\n" + note


def _cell(entry: Mapping[str, Any]) -> str:
    text = f"{100 * entry['score']:.0f} ({100 * entry['low']:.0f} to {100 * entry['high']:.0f})"
    if "above_source" in entry:
        mean, low, high = (100 * value for value in entry["above_source"])
        text += f"; {mean:+.0f} ({low:+.0f} to {high:+.0f})"
    return text
