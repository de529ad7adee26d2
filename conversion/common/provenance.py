"""What a result depends on beside its settings: versions of the libraries, and the code that computed it."""

import ast
import functools
import hashlib
import platform
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers

import modeling_bmojo


CONVERSION = Path(__file__).resolve().parents[1]
PACKAGE = Path(modeling_bmojo.__file__).resolve().parent
# Where the code that computes is entered: grafts, training, evaluation, and the model itself.
ENTRIES = (
    CONVERSION / "grafting" / "pipeline.py",
    CONVERSION / "training" / "run.py",
    CONVERSION / "evaluation" / "job.py",
    PACKAGE / "modeling_bmojo.py",
)
# What shows results and changes none: it is neither followed nor counted.
SHOWN = (
    CONVERSION / "common" / "commands.py",
    CONVERSION / "common" / "plotting.py",
    CONVERSION / "common" / "programs.py",
    CONVERSION / "grafting" / "card.py",
    CONVERSION / "evaluation" / "plot.py",
    CONVERSION / "evaluation" / "report.py",
)


def versions() -> dict[str, str]:
    """Name the versions that a graft depends on."""
    return {
        "modeling_bmojo": modeling_bmojo.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


@functools.cache
def code_fingerprint() -> str:
    """Hash the modules that compute (SHA-256), by their paths: a graft by other code is not reused."""
    return fingerprint_of(import_closure(ENTRIES, (CONVERSION, PACKAGE), SHOWN), (CONVERSION, PACKAGE))


def fingerprint_of(files: Iterable[Path], packages: Iterable[Path]) -> str:
    """Hash names, as seen from the folder that holds their package, and contents of files (SHA-256).

    A wheel names conversion/ bmojo_conversion; what is in it is the same code.
    """
    digest = hashlib.sha256()
    named = {
        f"{root.name.removeprefix('bmojo_')}/{file.relative_to(root).as_posix()}": file
        for root in packages
        for file in files
        if root in file.parents
    }
    for name, file in sorted(named.items()):
        digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def import_closure(entries: Iterable[Path], packages: Iterable[Path], left_out: Iterable[Path] = ()) -> set[Path]:
    """Collect the modules that `entries` import, directly or not, from the given packages and their sub-packages.

    The syntax tree is read, so imports inside functions and `try` count as well. A package's `__init__` is followed
    where it is named, and for a name that it only passes on: there the module that the name comes from is followed, and
    not all the others that the `__init__` imports.

    Args:
        entries: files to begin with. packages: folders of the packages. left_out: files that are not followed.
    """
    roots, skipped = {folder.name: folder for folder in packages}, set(left_out)
    found, queue = set(), list(entries)
    while queue:
        file = queue.pop()
        if file in found or file in skipped:
            continue
        found.add(file)
        for node in ast.walk(_parsed(file.read_text(encoding="utf-8"))):
            queue += _imported(node, file, roots)
    return found


@functools.lru_cache(maxsize=256)
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def _imported(node: ast.AST, file: Path, roots: dict[str, Path]) -> list[Path]:
    """Return the files that an import statement in `file` reaches."""
    if isinstance(node, ast.Import):
        places = [(_absolute(alias.name, roots), ()) for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level:
        places = [(file.parents[node.level - 1].joinpath(*(node.module or "").split(".")), node.names)]
    elif isinstance(node, ast.ImportFrom):
        places = [(_absolute(node.module, roots), node.names)]
    else:
        return []
    return [found for place, names in places if place is not None for found in _files_of(place, names)]


def _absolute(module: str, roots: dict[str, Path]) -> Path | None:
    root, *inside = module.split(".")
    return roots[root].joinpath(*inside) if root in roots else None


def _files_of(place: Path, names: Iterable[ast.alias]) -> list[Path]:
    """Return a module's file; of a package its `__init__`, or where the names that are imported from it are made."""
    if place.with_suffix(".py").is_file():
        return [place.with_suffix(".py")]
    init = place / "__init__.py"
    if not init.is_file():
        return []
    found, passed_on = [], {}
    for node in _parsed(init.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            passed_on |= {alias.asname or alias.name: (node.module, alias) for alias in node.names}
    for alias in names:
        if (place / f"{alias.name}.py").is_file() or (place / alias.name / "__init__.py").is_file():
            found += _files_of(place / alias.name, ())
        elif alias.name in passed_on:
            module, origin = passed_on[alias.name]
            found += _files_of(place.joinpath(*module.split(".")), [origin])
        else:
            found.append(init)
    return found
