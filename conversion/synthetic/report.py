"""The tables of a recall run, as Markdown and as plain data: one per task, a row per model and bytes.

Of the learning rates that were tried the one with the lowest loss on samples of its own, which no test has, counts, by
model, bytes and seed, alike for all.
Means are over seeds, +- is their standard error. A loss of B'MOJO is a test of a task in which the chosen model (else
the best ranked one with an eidetic memory) is below another ranked model of the same bytes without such a memory by
more than `MARGIN`; B'MOJO-F has none and is among the others. Accuracies are compared; of real text, where nobody is
right in all bytes and the NLL tells more, losses in nats.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from ..common.nll import mean_and_error


Figures = dict[str, Any]
MARGIN = 0.01  # of accuracy; three times the standard error of 99% over 512 samples of two scored tokens; of text: nats


def summarise(cells: Sequence[Mapping[str, Any]]) -> list[Figures]:
    """Return one row for every task, model, bytes and test, in the order of `cells`, from what was measured of them."""
    best: dict[tuple, Mapping[str, Any]] = {}
    for cell in cells:
        place = (cell["task"], cell["model"], cell["wanted_bytes"], cell["seed"])
        if place not in best or _choice(cell) < _choice(best[place]):
            best[place] = cell
    groups = defaultdict(list)
    for (task, model, size, _), cell in best.items():
        groups[task, model, size].append(cell)
    rows = []
    for (task, model, size), found in groups.items():
        for test in found[0]["scores"]:
            rows.append({
                "task": task, "model": model, "wanted_bytes": size, "test": test,
                **{name: found[0][name] for name in ("ranked", "eidetic", "bytes", "parameters", "memory")},
                "seeds": len(found),
                "accuracy": mean_and_error([cell["scores"][test]["accuracy"] for cell in found]),
                "loss": mean_and_error([cell["scores"][test]["loss"] for cell in found]),
                "learning_rates": sorted({cell["learning_rate"] for cell in found}),
                "steps": sum(cell["steps"] for cell in found) / len(found),
                "seconds": sum(cell["seconds"] for cell in found) / len(found),
            })  # fmt: skip
    return rows


def _choice(cell: Mapping[str, Any]) -> float:
    """Return the loss by which learning rates are compared; one that is no number is last."""
    return cell["choice_loss"] if math.isfinite(cell["choice_loss"]) else math.inf


def by_position(test: str) -> bool:
    """Whether a test is a stretch of a text, `0 to 512`: what counts there is the loss."""
    return " to " in test


def losses(rows: Sequence[Figures], chosen: str | None = None) -> list[dict[str, Any]]:
    """Return where B'MOJO is behind: task, test, bytes, what is compared, our model and the better ones.

    Args:
        chosen: name of our model; None: in every comparison the best of those with an eidetic memory.
    """
    found = []
    for place in dict.fromkeys((row["task"], row["test"], row["wanted_bytes"]) for row in rows if row["ranked"]):
        here = [r for r in rows if r["ranked"] and (r["task"], r["test"], r["wanted_bytes"]) == place]
        ours = [row for row in here if row["eidetic"] and chosen in (None, row["model"])]
        if not ours:
            continue
        by = "loss" if by_position(place[1]) else "accuracy"
        best = max(ours, key=lambda row: _merit(row, by))
        better = [r for r in here if not r["eidetic"] and _merit(r, by) > _merit(best, by) + MARGIN]
        if better:
            names = {row["model"]: row[by][0] for row in better}
            found.append({"task": place[0], "test": place[1], "bytes": place[2], "by": by, "ours": best["model"],
                          "value": best[by][0], "better": names})  # fmt: skip
    return found


def _merit(row: Figures, by: str) -> float:
    """Return a figure of which more is better; a loss that is no number is worst."""
    value = row[by][0]
    if by == "accuracy":
        return value
    return -value if math.isfinite(value) else -math.inf


def markdown(rows: Sequence[Figures], settings: Mapping[str, Any], header: Mapping[str, Any], done: str) -> str:
    """Return the tables with a line on how to read them and one on where they come from."""
    parts = []
    for task in dict.fromkeys(row["task"] for row in rows):
        parts += [f"## {task}", _table([row for row in rows if row["task"] == task])]
    behind = losses(rows, settings["chosen"])
    ours = f"B'MOJO ({settings['chosen'] or 'the best one of each comparison'})"
    parts.append(
        f"{ours} is behind in {len(behind)} comparisons (same task, test and bytes)" + (":" if behind else ".")
    )
    if behind:
        parts.append("\n".join(
            f"- {loss['task']}, {loss['test']}, {loss['bytes']:,} bytes, {loss['by']}: "
            f"{loss['ours']} {loss['value']:.3f}; "
            + ", ".join(f"{name} {value:.3f}" for name, value in loss["better"].items())
            for loss in behind
        ))  # fmt: skip
    parts.append(
        f"Accuracy over all scored tokens of {settings['test_samples']} test samples; +- is the standard error over "
        f"seeds. (c): a ceiling, whose memory grows with the text and which is not ranked. Learning rates tried with "
        f"every model: {settings['learning_rates']}; width {settings['width']}, {settings['layers']} layers, at most "
        f"{settings['steps']} steps of {settings['batch']} samples. {done}"
    )
    machine = header["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    parts.append(f"`{header['command']}`; commit {machine['commit'] or 'unknown'}; {machine['device']}, "
                 f"{machine['cores']} cores, {machine['threads']} threads; {versions}")  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Figures]) -> str:
    tests = list(dict.fromkeys(row["test"] for row in rows))
    head = ["model", "bytes", "parameters", "W / M / N", *tests, "steps", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    by_place = defaultdict(dict)
    for row in rows:
        by_place[row["wanted_bytes"], row["model"]][row["test"]] = row
    for (_, model), of_tests in sorted(by_place.items(), key=lambda item: item[0][0]):
        row = next(iter(of_tests.values()))
        memory = row["memory"]
        sizes = f"{memory['window']} / {memory['slots']} / {memory['channels']}" if row["ranked"] else "(c)"
        cells = [model, f"{row['bytes']:,}", f"{row['parameters']:,}", sizes]
        cells += [_with_error(of_tests[test]) for test in tests]
        lines.append("| " + " | ".join([*cells, f"{row['steps']:.0f}", f"{row['seconds']:.0f}"]) + " |")
    return "\n".join(lines)


def _with_error(row: Figures) -> str:
    mean, error = row["accuracy"]
    return f"{mean:.3f}" + ("" if error is None else f" ± {error:.3f}") + f" ({row['loss'][0]:.2f})"
