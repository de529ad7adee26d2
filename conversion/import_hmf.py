"""Reads a checkpoint of hybrid-model-factory as a B'MOJO model: `python -m conversion.import_hmf SOURCE --out FOLDER`.

    python -m conversion.import_hmf amazon/NAME --out outputs/NAME [--overwrite] [--max-shard-size 2GB]

SOURCE is a local folder or a hub id of a `hybrid_qwen3` model; docs/hmf.md says what is read. The weights stay what
they are: some are joined by rows. Exit status: 0 done, 2 refused or failed with a message, 130 interrupted. Nothing is
left behind where the status is not 0, and an earlier output stays as it was.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .common.commands import command, purpose
from .common.programs import run_program
from .hmf.pipeline import import_checkpoint


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=command("import_hmf"), description=purpose(__doc__))
    parser.add_argument("source", help="local folder, or hub id, of a hybrid_qwen3 checkpoint")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument("--max-shard-size", default="2GB", help="largest weights file (default: 2GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output of ours in that folder")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    arguments = parse_arguments(argv)

    def work() -> int:
        output = Path(arguments.out)
        report = import_checkpoint(arguments.source, output, arguments.max_shard_size, arguments.overwrite)
        counts = report["counts"]
        print(
            f"{output}: {counts['copied']} tensors of the source, {counts['dropped']} not needed; "
            f"{counts['parameters'] / 1e6:,.1f} million parameters in {report['dtype']}."
        )
        return 0

    return run_program(work)


if __name__ == "__main__":
    sys.exit(main())
