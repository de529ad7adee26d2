"""Lists the recipes, or prints one to copy and change: `python -m conversion.recipes graft/smollm2-135m.yaml`.

    python -m conversion.recipes [NAME] [--path]

A program takes a recipe by its name from any folder. To change more of it than `--set` does conveniently, print it into
a file of your own. Exit status: 0 done, 2 there is no such recipe.
"""

import argparse
import sys
from collections.abc import Sequence

from .common.commands import command, purpose
from .common.recipes import CONFIGS, find_recipe, recipe_names


def first_line(name: str) -> str:
    """Return what a recipe says of itself first."""
    return (CONFIGS / name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(prog=command("recipes"), description=purpose(__doc__))
    parser.add_argument("name", nargs="?", help="e.g. graft/smollm2-135m.yaml; without it all are listed")
    parser.add_argument("--path", action="store_true", help="print where the file is instead of what is in it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    arguments = parse_arguments(argv)
    if arguments.name is None:
        names = recipe_names()
        width = max(map(len, names))
        told = [str(CONFIGS / name) if arguments.path else f"{name:{width}}  {first_line(name)}" for name in names]
        print("\n".join(told))
        return 0
    try:
        path = find_recipe(arguments.name)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path if arguments.path else path.read_text(encoding="utf-8").rstrip("\n"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
