"""What a run found: JSON for machines, a Markdown table for people, and diagrams of time and memory against context."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .machine import describe
from .row import Check, Figure, Limits


SCHEMA = "bmojo-bench-2"
OK, RED, FAILED, NOT_RUN, CUT = "ok", "parity failed", "failed", "not run", "interrupted"


@dataclass
class Result:
    """What became of a row. reason: why it is not `OK`. remarks: what else is to be said of it. seconds: it took."""

    row: str
    title: str
    status: str
    reason: str = ""
    checks: list[Check] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Report:
    """A run. machine: `machine.facts`. started: UTC, ISO 8601. seconds: so far. finished: every row had its turn."""

    machine: dict[str, Any]
    started: str
    command: str
    quick: bool
    seconds: float = 0.0
    finished: bool = False
    results: list[Result] = field(default_factory=list)

    def to_json(self) -> str:
        values = {"schema": SCHEMA, **asdict(self)}
        for result, stored in zip(self.results, values["results"], strict=True):
            for figure, entry in zip(result.figures, stored["figures"], strict=True):
                entry["met"] = figure.met
                for side, limits in figure.limits.items():
                    entry["limits"][side]["floor"] = limits.floor
            for check in stored["checks"]:  # JSON knows no NaN and no infinity
                check["difference"] = check["difference"] if math.isfinite(check["difference"]) else None
        return json.dumps(values, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Return the report that `to_json` wrote.

        Raises:
            ValueError: another schema.
        """
        values = json.loads(text)
        schema = values.pop("schema", None)
        if schema != SCHEMA:
            raise ValueError(f"schema={schema!r}: must be {SCHEMA!r}; measure again with this version.")
        results = []
        for stored in values.pop("results"):
            checks = [
                Check(c["what"], math.nan if c["difference"] is None else c["difference"], c["tolerance"])
                for c in stored.pop("checks")
            ]
            figures = [_figure(entry) for entry in stored.pop("figures")]
            results.append(Result(**stored, checks=checks, figures=figures))
        return cls(**values, results=results)


def _figure(entry: dict[str, Any]) -> Figure:
    """Return the figure of a stored entry, without what follows from the rest."""
    values = {name: value for name, value in entry.items() if name not in ("met", "limits")}
    sides = entry["limits"].items()
    limits = {side: Limits(**{k: v for k, v in stored.items() if k != "floor"}) for side, stored in sides}
    return Figure(**values, limits=limits)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Return a path to write to, renamed to `path` at the end: nobody ever sees half a file."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save(report: Report, path: Path) -> None:
    """Write the JSON."""
    with beside(path) as partial:
        partial.write_text(report.to_json(), encoding="utf-8")


def amount(value: float, unit: str) -> str:
    """Return a number for people: 3.1 s, 41.2 ms, 860 us; 1.51 GB, 55.4 MB, 12 kB."""
    steps = {"s": [(1, "s"), (1e-3, "ms"), (1e-6, "us")], "B": [(1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")]}
    scale, name = next((step for step in steps[unit] if value >= step[0]), steps[unit][-1])
    return f"{value / scale:.3g} {name}" if value / scale < 1000 else f"{value / scale:,.0f} {name}"


def verdict(figure: Figure) -> str:
    return {None: "", True: "met", False: "missed"}[figure.met]


def markdown(report: Report) -> str:
    """Return the whole report as Markdown."""
    quick = "A quick run: small sizes, no goals. Its figures say that the program works and nothing else. "
    state = "" if report.finished else " **Not finished: only what was measured is listed.**"
    parts = [
        f"{quick if report.quick else ''}Ratio = ours / theirs, lower is better: the median over rounds in which both "
        "ran in turn (smallest to largest). Times and bytes are medians; goals are for 2 CPU cores.",
        f"{report.started}, {report.seconds / 60:.1f} minutes; {describe(report.machine)}; `{report.command}`.{state}",
    ]
    for result in report.results:
        parts += _section(result)
    return "\n\n".join(parts) + "\n"


def _section(result: Result) -> list[str]:
    """Return a row's paragraphs: heading, what went wrong, table, notes."""
    parts = [f"### {result.row}: {result.title}"]
    if result.status != OK:
        parts.append(f"**{result.status}**: {result.reason}")
    if result.figures:
        head = "| | tokens | format | against | ours | theirs | ratio | spread | rounds | goal | |"
        parts.append("\n".join([head, "|---|---|---|---|---|---|---|---|---|---|---|", *map(_line, result.figures)]))
    bounded = [line for figure in result.figures for line in _limits_lines(figure)]
    if bounded:
        head = "| what limits it | tokens | format | side | operations | of them in a layer | least time | took | by |"
        parts.append("\n".join([head, "|---|---|---|---|---|---|---|---|---|", *bounded]))
    notes = [
        f"- {figure.name}, {figure.context:,}, {figure.dtype}: {figure.note}"
        for figure in result.figures
        if figure.note
    ]
    notes += [f"- {remark}" for remark in result.remarks]
    notes += [f"- checked: {c.what}: {c.difference:.1e}, at most {c.tolerance:.0e}" for c in result.checks]
    return [*parts, "\n".join(notes)] if notes else parts


def _line(figure: Figure) -> str:
    spread = f"{figure.low:.3g} to {figure.high:.3g}" if figure.rounds > 1 else ""
    goal = "" if figure.goal is None else f"{figure.goal:g}"
    ours, theirs = amount(figure.ours, figure.unit), amount(figure.theirs, figure.unit)
    cells = [
        figure.name,
        f"{figure.context:,}",
        figure.dtype,
        figure.against,
        ours,
        theirs,
        f"**{figure.ratio:.3g}**",
        spread,
    ]
    return f"| {' | '.join([*cells, str(figure.rounds), goal, verdict(figure)])} |"


def counted(limits: Limits) -> tuple[str, str]:
    """Return how many operations start, in all and in a layer; empty where they are not counted."""
    return tuple("" if count is None else f"{count:,}" for count in (limits.operations, limits.per_layer))


def reason(limits: Limits) -> str:
    """Return what the least time is made of: 565 MB at 22.4 GB/s, 571 GFLOP at 306 GFLOP/s."""
    if limits.unit == "B":
        return f"{amount(limits.work, 'B')} at {amount(limits.rate, 'B')}/s"
    return f"{limits.work / 1e9:,.3g} GFLOP at {limits.rate / 1e9:,.3g} GFLOP/s"


def _limits_lines(figure: Figure) -> list[str]:
    """Return a line for each side: the least time beside the time that it took."""
    took, lines = {"ours": figure.ours, "theirs": figure.theirs}, []
    for side, limits in figure.limits.items():
        name = "ours" if side == "ours" else figure.against
        cells = [figure.name, f"{figure.context:,}", figure.dtype, name, *counted(limits)]
        times = [amount(limits.floor, "s"), f"{took[side] / limits.floor:,.3g} times that", reason(limits)]
        lines.append(f"| {' | '.join([*cells, *times])} |")
    return lines


def panels(report: Report) -> dict[str, list[Figure]]:
    """Return diagrams: the figures that name one, by name; those with a single context are left out."""
    found: dict[str, list[Figure]] = {}
    for result in report.results:
        for figure in result.figures:
            if figure.panel is not None:
                found.setdefault(figure.panel, []).append(figure)
    return {name: figures for name, figures in found.items() if len({figure.context for figure in figures}) > 1}


def draw(report: Report, path: Path) -> str | None:
    """Draw time and memory against context. Returns None, or why there is no diagram."""
    diagrams = panels(report)
    if not diagrams:
        return "nothing was measured at more than one context"
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed; pip install -e '.[bench]'"
    matplotlib.use("Agg")
    from matplotlib.figure import Figure as Canvas

    columns = min(3, len(diagrams))
    rows = -(-len(diagrams) // columns)
    canvas = Canvas(figsize=(4.6 * columns, 3.6 * rows + 0.5), layout="constrained")
    for index, (name, figures) in enumerate(diagrams.items()):
        _panel(canvas.add_subplot(rows, columns, index + 1), name, figures)
    canvas.suptitle("lower is better" + (" (quick run)" if report.quick else ""), fontsize=10)
    canvas.supxlabel(describe(report.machine), fontsize=6, wrap=True)
    with beside(path) as partial:
        canvas.savefig(partial, dpi=130, format="png")
    return None


def _panel(axes: Any, name: str, figures: list[Figure]) -> None:
    """One diagram, both axes logarithmic: ours once, and every `against`."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figures = sorted(figures, key=lambda figure: figure.context)
    scale, unit = (1e-3, "ms") if figures[0].unit == "s" and figures[-1].ours < 1 else (1, "s")
    scale, unit = (1e6, "MB") if figures[0].unit == "B" else (scale, unit)
    ours = {figure.context: figure.ours / scale for figure in figures}
    axes.plot(list(ours), list(ours.values()), "o-", color="tab:blue", label="B'MOJO")
    others = dict.fromkeys(figure.against for figure in figures)
    for (style, color), against in zip((("s--", "tab:orange"), ("^--", "tab:green"), ("v--", "tab:red")), others):
        points = [(figure.context, figure.theirs / scale) for figure in figures if figure.against == against]
        axes.plot(*zip(*points), style, color=color, label=against)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(ours), [f"{context:,}" for context in ours])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title(f"{name}, {unit}", fontsize=10)
    axes.set_xlabel("tokens", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
