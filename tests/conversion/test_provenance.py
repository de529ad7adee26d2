"""The fingerprint of the code: it covers what computes, across sub-packages, and nothing that only shows."""

import re
import shutil
from pathlib import Path

import pytest

from conversion.common.provenance import (
    CONVERSION,
    ENTRIES,
    PACKAGE,
    SHOWN,
    code_fingerprint,
    fingerprint_of,
    import_closure,
)


@pytest.fixture
def copies(tmp_path: Path) -> tuple[Path, Path]:
    """Both packages, to change files of."""
    for root in (CONVERSION, PACKAGE):
        shutil.copytree(root, tmp_path / root.name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / CONVERSION.name, tmp_path / PACKAGE.name


def in_copies(files, roots: tuple[Path, Path]) -> list[Path]:
    pairs = list(zip((CONVERSION, PACKAGE), roots))
    return [new / file.relative_to(old) for file in files for old, new in pairs if old in file.parents]


def fingerprint(roots: tuple[Path, Path]) -> str:
    return fingerprint_of(import_closure(in_copies(ENTRIES, roots), roots, in_copies(SHOWN, roots)), roots)


def test_a_copy_has_the_same_fingerprint_wherever_it_lies(copies):
    assert all(path.is_file() for path in (*ENTRIES, *SHOWN))
    assert fingerprint(copies) == code_fingerprint()


@pytest.mark.parametrize(
    "file",
    [
        "conversion/grafting/ssm_init.py",
        "conversion/grafting/family_table.py",
        "conversion/common/weights.py",
        "conversion/data/texts.py",
        "conversion/evaluation/passkey.py",
        "conversion/training/losses.py",
        "modeling_bmojo/modeling_bmojo.py",
        "modeling_bmojo/configuration_bmojo.py",
        "modeling_bmojo/cache_bmojo.py",
    ],
)
def test_what_computes_counts(copies, file):
    path, before = copies[0].parent / file, fingerprint(copies)
    path.write_text(path.read_text() + "\nCHANGED = True\n")
    assert fingerprint(copies) != before


def test_all_that_the_model_imports_counts():
    """Found here by another way: by the text of the relative imports."""
    counted = import_closure(ENTRIES, (CONVERSION, PACKAGE), SHOWN)
    for file in [path for path in counted if path.parent == PACKAGE]:
        for name in re.findall(r"^\s*from \.(\w+) import", file.read_text(encoding="utf-8"), flags=re.MULTILINE):
            assert PACKAGE / f"{name}.py" in counted or (PACKAGE / name).is_dir()


def test_what_shows_does_not_count(copies):
    before, package = fingerprint(copies), copies[1]
    shown = in_copies(SHOWN, copies)
    shown += [path for pattern in ("plots_bmojo.py", "show_bmojo.py", "inspect/*.py") for path in package.glob(pattern)]
    for path in shown:
        path.write_text(path.read_text() + "\nCHANGED = True\n")
    assert len(shown) > len(SHOWN) and fingerprint(copies) == before


def test_sub_packages_are_followed(copies):
    """A name that a sub-package's `__init__` passes on counts, where it is imported; its siblings do not."""
    conversion, package = copies
    folder = package / "parts"
    folder.mkdir()
    (folder / "__init__.py").write_text('"""Parts."""\n\nfrom .used import value\nfrom .unused import other\n')
    (folder / "used.py").write_text("from .deeper import value\n")
    (folder / "deeper.py").write_text("value = 1\n")
    (folder / "unused.py").write_text("other = 1\n")
    init, entry = package / "__init__.py", package / "modeling_bmojo.py"
    init.write_text(init.read_text() + "\nfrom .parts import value, other\n")
    without = fingerprint(copies)
    entry.write_text(entry.read_text() + "\n\ndef late():\n    from .parts import value\n")
    before = fingerprint(copies)
    assert before != without
    (folder / "unused.py").write_text("other = 2\n")
    assert fingerprint(copies) == before
    (folder / "deeper.py").write_text("value = 2\n")
    after = fingerprint(copies)
    assert after != before
    user = conversion / "grafting" / "check.py"
    user.write_text(user.read_text() + "\nfrom modeling_bmojo import other\n")
    outside = fingerprint(copies)
    (folder / "unused.py").write_text("other = 3\n")
    assert fingerprint(copies) != outside
