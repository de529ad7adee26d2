"""Figures of several machines: one JSON of each under docs/bench/, and the table of all in docs/performance.md.

`python -m benchmarks.speed --keep [NAME]` writes such a file, `machines_table` makes the table, and
`python -m benchmarks.machines` puts it into the document; a test sees that it is current. The table has the rows of
whole models (`SHOWN`), the files have all that were measured.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .models import ROOT
from .report import Report, amount, save
from .row import Figure


KEPT = ROOT / "docs" / "bench"
DOCUMENT = ROOT / "docs" / "performance.md"
SHOWN = ("prefill", "prefill-32k", "decode", "int8", "cache", "train", "llama")
NAME = re.compile(r"[a-z0-9]+(?:[-_.][a-z0-9]+)*")
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


def check_kept(name: str, quick: bool, device: str, default_models: bool) -> None:
    """Refuse to keep what is not comparable, before anything is measured. name: empty for one made from the CPU.

    Raises:
        ValueError: a quick run, another device than the CPU, other models, or no name for a file.
    """
    if quick:
        raise ValueError("--keep with --quick: figures of small sizes say nothing; leave one of them out.")
    if device != "cpu":
        raise ValueError(f"--keep with --device {device}: kept figures are of CPUs; leave one of them out.")
    if not default_models:
        raise ValueError("--keep with --source or --graft: kept figures are of the default models; leave one out.")
    if name and not NAME.fullmatch(name):
        raise ValueError(f"--keep {name}: must be lower-case letters and digits joined by - . or _; or leave it empty.")


def name_of(report: Report, dtypes: Sequence[str]) -> str:
    """Return the name of a machine's file: its CPU, its cores, the threads and the formats."""
    machine = report.machine
    words = f"{machine['processor']} {machine['cores']} cores {machine['threads']} threads"
    formats = "-".join(SHORT[dtype] for dtype in dtypes)
    return "-".join([*re.findall(r"[a-z0-9]+", words.lower()), formats])


def keep(report: Report, name: str, dtypes: Sequence[str], rows: Sequence[str] | None) -> Path:
    """Store a report for `machines_table`, with its command but for the places of files; return its path."""
    parts = [f"--threads {report.machine['threads']}", f"--dtype {' '.join(dtypes)}"]
    parts += [f"--rows {' '.join(rows)}"] if rows else []
    path = KEPT / f"{name or name_of(report, dtypes)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    save(replace(report, command=" ".join(["python -m benchmarks.speed", *parts])), path)
    return path


def machines_table(folder: Path = KEPT) -> str:
    """Return the figures of all kept machines beside each other, as Markdown: ours / theirs, [spread], our time."""
    reports = {path.stem: Report.from_json(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    if not reports:
        return f"No machine was measured with `--keep` so far: `docs/{KEPT.name}/` is empty."
    lines = [("", *(f"`{name}`" for name in reports)), ("---",) * (len(reports) + 1)]
    lines += [(label, *(said(report.machine) for report in reports.values())) for label, said in FACTS]
    columns = [{_label(figure): _cell(figure) for figure in _shown(report)} for report in reports.values()]
    for label in dict.fromkeys(label for column in columns for label in column):
        lines.append((label, *(column.get(label, "") for column in columns)))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


FACTS = (
    ("processor", lambda machine: machine["processor"]),
    ("what it can do", lambda machine: " ".join(machine["flags"])),
    ("cores, threads", lambda machine: f"{machine['cores']}, {machine['threads']}"),
    ("commit", lambda machine: machine["commit"][:7] + (" and changes" if machine["dirty"] else "")),
    ("torch", lambda machine: machine["versions"]["torch"]),
)


def _shown(report: Report) -> list[Figure]:
    return [figure for result in report.results if result.row in SHOWN for figure in result.figures]


def _label(figure: Figure) -> str:
    dtype = SHORT.get(figure.dtype, figure.dtype)
    return f"{figure.name}, {figure.context:,} tokens, {dtype}, against {figure.against}"


def _cell(figure: Figure) -> str:
    spread = f" [{figure.low:.3g}, {figure.high:.3g}]" if figure.rounds > 1 else ""
    return f"**{figure.ratio:.3g}**{spread}, {amount(figure.ours, figure.unit)}"


def write(document: Path = DOCUMENT, folder: Path = KEPT) -> None:
    """Put the table between its marks in the document.

    Raises:
        ValueError: the document has no such marks.
    """
    text = document.read_text(encoding="utf-8")
    marks = re.compile(r"(<!-- machines_table -->\n).*?(<!-- /machines_table -->)", re.DOTALL)
    table = machines_table(folder)
    text, found = marks.subn(lambda match: f"{match[1]}{table}\n{match[2]}", text)
    if found != 1:
        raise ValueError(f"{document.name}: must have <!-- machines_table --> and <!-- /machines_table --> once each.")
    document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
    sys.exit(0)
