"""Trains a B'MOJO model on next tokens: `python -m conversion.finetune configs/finetune/smollm2-135m.yaml`.

    python -m conversion.finetune SETTINGS.yaml [--source X] [--output Y] [--set key=value ...]
                                  [--resume | --overwrite | --finish last|best]
    accelerate launch -m conversion.finetune SETTINGS.yaml ...                                    several GPUs

The settings are described in conversion/training/settings.py and docs/training.md. Exit status: 0 done, 2 refused or
failed with a message, 130 interrupted. An unfinished run stays in `<output>.training/` and can be resumed.
"""

import sys
from collections.abc import Sequence

from .common.commands import purpose
from .training.cli import run
from .training.settings import FinetuneSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return run("finetune", FinetuneSettings, purpose(__doc__), argv)


if __name__ == "__main__":
    sys.exit(main())
