"""Trains small models on recall tasks and compares them: `python -m conversion.recall configs/recall/quick.yaml`.

    python -m conversion.recall SETTINGS.yaml [--output Y] [--set key=value ...] [--overwrite | --reuse]

Full attention, a sliding window, Mamba, Mamba-2, stacks of them and B'MOJO with each innovation test, with equal
parameters and equal bytes of state, on MQAR, recall with noise, copying and real text beyond the length trained at. The
settings are described in conversion/synthetic/settings.py and docs/recall.md. Exit status: 0 done, 2 refused or failed
with a message, 130 interrupted; what was measured until then is stored, and --reuse goes on from there.
"""

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from .common.commands import command, purpose
from .common.files import write_text
from .common.programs import run_program
from .common.recipes import find_recipe
from .common.settings import parse_assignments
from .common.staging import sole_writer
from .evaluation.store import Store, check_folder
from .synthetic.job import SECTION, plan, run
from .synthetic.models import Model
from .synthetic.plot import draw
from .synthetic.report import losses, markdown, summarise
from .synthetic.samples import Task
from .synthetic.settings import RecallSettings, load_recall


RESULT_FILE, TABLE_FILE = "recall.json", "table.md"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=command("recall"), description=purpose(__doc__))
    parser.add_argument("settings", help="YAML file, e.g. configs/recall/quick.yaml")
    parser.add_argument("--output", help="folder to write; replaces the YAML's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replaces one setting")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="start anew where the output holds a run")
    existing.add_argument("--reuse", action="store_true", help="keep what is still valid, train the rest")
    return parser.parse_args(argv)


def compare(
    settings: RecallSettings,
    tasks: list[Task],
    models: list[Model],
    command: str,
    overwrite: bool = False,
    reuse: bool = False,
) -> str:
    """Train what is missing, write the folder and return the tables.

    Raises:
        ValueError: anything about sizes, models or output that stops the comparison.
    """
    folder = Path(settings.output)
    with sole_writer(folder):
        check_folder(folder, overwrite, reuse, RESULT_FILE)
        cells = plan(settings, tasks, models)
        if overwrite:
            shutil.rmtree(folder / "work", ignore_errors=True)
        store = Store(folder, settings.as_dict(), command, reuse, RESULT_FILE)
        run(cells, store, settings.workers)
        rows = summarise([store.get(cell.row, SECTION) for cell in cells])
        seconds = sum(store.get(cell.row, SECTION)["seconds"] for cell in cells)
        done = f"{len(cells)} trainings of {seconds / 60:.0f} minutes together."
        table = markdown(rows, settings.as_dict(), store.header, done)
        write_text(folder / TABLE_FILE, table)
        if settings.plot:
            draw(rows, folder)
        store.write(finished=True, summary=rows, losses=losses(rows, settings.chosen))
        shutil.rmtree(folder / "work", ignore_errors=True)
        return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parse_arguments(argv)
    called = f"{command('recall')} {shlex.join(argv)}"

    def work() -> int:
        overrides = parse_assignments(arguments.set)
        if arguments.output is not None:
            overrides["output"] = arguments.output
        settings, tasks, models = load_recall(find_recipe(arguments.settings, "recall"), overrides)
        print(compare(settings, tasks, models, called, arguments.overwrite, arguments.reuse))
        print(f"Written to {settings.output}")
        return 0

    return run_program(work, "what was trained is stored, --reuse goes on from there")


if __name__ == "__main__":
    sys.exit(main())
