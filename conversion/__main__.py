"""Starts a program by its name: `bmojo graft smollm2-135m.yaml`, or `python -m conversion graft ...` from a checkout.

`bmojo` is what `pip install` makes of this file. A program is imported when it is asked for, so that the list of them
does not wait for torch, and a package that one of them lacks is said with the extra that brings it.
"""

import difflib
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

from .common.commands import missing_package


# Name to what it does, in the order in which they are used; the module has _ for -.
PROGRAMS = {
    "demo": "graft a model, let it read a long document and answer",
    "recipes": "list the recipes, or print one to copy and change",
    "graft": "turn a Transformer into a B'MOJO model",
    "import-hmf": "read a checkpoint of hybrid-model-factory as a B'MOJO model",
    "fit-storage": "fit the sketches of a storage to a B'MOJO folder",
    "align": "train a graft's new tensors to do what its source did",
    "finetune": "train a B'MOJO model on next tokens, with or without LoRA",
    "evaluate": "compare models side by side",
    "recall": "train small models on recall tasks and compare them",
    "restore": "write the source of a graft again, byte for byte",
    "html-text": "turn HTML pages into text files to train on",
}


def overview() -> str:
    """Return what `bmojo --help` prints."""
    width = max(map(len, PROGRAMS))
    listed = "\n".join(f"  {name:{width}}  {what}" for name, what in PROGRAMS.items())
    return (
        "usage: bmojo PROGRAM [ARGUMENTS ...]\n\n"
        f"{listed}\n\n"
        "bmojo PROGRAM --help says more of one; bmojo --version names the version. Most take a settings file, your own "
        "or\na recipe by its name: bmojo graft smollm2-135m.yaml"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a program and return its exit status; 2 where there is none of that name, or it lacks a package."""
    given = list(sys.argv[1:] if argv is None else argv)
    name, arguments = (given[0], given[1:]) if given else ("", [])
    if name in ("", "-h", "--help"):
        print(overview(), file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name == "--version":
        print(importlib.metadata.version("modeling-bmojo"))
        return 0
    known = name.replace("_", "-")
    if known not in PROGRAMS:
        close = difflib.get_close_matches(known, PROGRAMS, n=1)
        hint = f"did you mean {close[0]!r}? K" if close else "k"
        print(f"error: {name!r}: no such program; {hint}nown programs: {', '.join(PROGRAMS)}.", file=sys.stderr)
        return 2
    try:
        program = importlib.import_module(f".{known.replace('-', '_')}", __package__)
    except ModuleNotFoundError as error:
        told = missing_package(error)
        if told is None:
            raise
        print(f"error: bmojo {known}: {told}", file=sys.stderr)
        return 2
    return program.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
