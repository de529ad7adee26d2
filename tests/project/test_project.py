"""The project's frame as a contract: metadata, pinned versions, what files may say, what the package may import.

A checkpoint carries the package's flat files to machines that do not have the package, and transformers finds them by
reading their text. The import rules below are the conditions under which that works; each is checked from the syntax
tree, and once more through transformers' own reader. What does not travel lives in rooms, which are sub-packages.
"""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

import modeling_bmojo


ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "modeling_bmojo"
FLAT = sorted(PACKAGE.glob("*.py"))
ROOMS = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
MODULES = FLAT + [path for room in ROOMS for path in sorted(room.glob("*.py"))]
# What a checkpoint may demand of the machine that loads it. Everything else belongs inside `try`.
REQUIRED_ROOTS = {"torch", "transformers", "safetensors", "huggingface_hub", "numpy"}
UNTRACKED = {
    ".git",
    ".venv",
    ".venvs",
    ".hypothesis",
    ".pytest_cache",
    ".ruff_cache",
    "__pycache__",
    "build",
    "dist",
    "outputs",
    "runs",
}
ON_ONE_MACHINE = re.compile(
    r"(?:^|[^A-Za-z0-9_.])/(?:work|farm|root|home/[a-z]\w*|Users/[A-Za-z]\w*)/|/tmp/[A-Za-z0-9_]|[A-Z]:\\\\?Users\b",
    re.MULTILINE,
)
LIKE_AN_IMPORT = re.compile(r"^[ \t]*(?:from|import)[ \t]+\.\S*", re.MULTILINE)
REGISTRY_HOST = re.compile(
    r"(?:pypi|pythonhosted|anaconda|npmjs)\.(?:org|com)|download\.pytorch\.org|deb\.debian\.org|localhost:\d+",
    re.IGNORECASE,
)


def pyproject() -> dict:
    """pyproject.toml. `tomllib` came with Python 3.11; before that pytest brings `tomli`."""
    if sys.version_info >= (3, 11):
        import tomllib as toml
    else:
        import tomli as toml
    return toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def tracked_files() -> list[Path]:
    """What git tracks or would track; in an unpacked archive, every file that no program made."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
        files = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        files = [path for path in ROOT.rglob("*") if not UNTRACKED.intersection(path.relative_to(ROOT).parts)]
        files = [path for path in files if not any(part.endswith(".egg-info") for part in path.parts)]
    return [path for path in files if path.is_file()]


def tracked_texts() -> dict[str, str]:
    texts = {}
    for path in tracked_files():
        data = path.read_bytes()
        if b"\0" not in data[:8192]:
            texts[path.relative_to(ROOT).as_posix()] = data.decode("utf-8")
    return texts


def lines_matching(pattern: re.Pattern, texts: dict[str, str]) -> list[str]:
    hits = ((name, text, match) for name, text in texts.items() for match in pattern.finditer(text))
    return [f"{name}:{text.count(chr(10), 0, match.start() + 1) + 1}: {match[0].strip()}" for name, text, match in hits]


# Metadata ------------------------------------------------------------------------------------------------------------
def test_metadata():
    project = pyproject()["project"]
    assert project["name"] == "modeling-bmojo"
    assert project["license"] == "Apache-2.0"
    assert Requirement(f"python{project['requires-python']}").specifier.contains("3.10")
    assert {"cuda", "convert", "bench", "train", "notebooks", "test", "dev"} <= set(project["optional-dependencies"])
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").count("Apache License") >= 1
    assert (PACKAGE / "py.typed").is_file()


def test_one_version():
    version = pyproject()["project"]["version"]
    assert modeling_bmojo.__version__ == version
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(version)}\]", changelog, re.MULTILINE), (
        f"CHANGELOG.md has no section [{version}]"
    )
    assert "### Numerics" in changelog


def test_dependencies_are_open_ranges_and_constraints_pin_them():
    """Each dependency has a lower bound, no upper one, and one tested version inside its range per Python."""
    requirements = [Requirement(text) for text in pyproject()["project"]["dependencies"]]
    for requirement in requirements:
        assert [s.operator for s in requirement.specifier] == [">="], f"{requirement}: give a lower bound and no other"
        for python in ("3.10", "3.13"):
            pins = [
                pin
                for pin in constraints()
                if canonicalize_name(pin.name) == canonicalize_name(requirement.name)
                and (pin.marker is None or pin.marker.evaluate({"python_version": python}))
            ]
            assert len(pins) == 1, f"constraints.txt pins {requirement.name} {len(pins)} times for Python {python}"
            (specifier,) = pins[0].specifier
            assert specifier.operator == "==" and "+" not in specifier.version, f"{pins[0]}: pin one public version"
            assert requirement.specifier.contains(specifier.version), f"{pins[0]} is outside {requirement}"


def test_extras_name_their_test_tools_in_constraints():
    pinned = {canonicalize_name(pin.name) for pin in constraints()}
    extras = pyproject()["project"]["optional-dependencies"]
    for text in extras["convert"] + extras["bench"] + extras["notebooks"] + extras["test"]:
        name = canonicalize_name(Requirement(text).name)
        assert name in pinned | {"modeling-bmojo"}, f"constraints.txt does not pin {name}, which make installs"


def test_pre_commit_uses_the_pinned_ruff():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (revision,) = [repo["rev"] for repo in config["repos"] if repo["repo"].endswith("ruff-pre-commit")]
    assert f"ruff=={revision.removeprefix('v')}" in [str(pin) for pin in constraints()]


# What files say ------------------------------------------------------------------------------------------------------
def test_patterns_find_what_they_look_for():
    """The two scans below would pass on anything if their patterns matched nothing."""
    slash = "/"
    for text in (
        f"{slash}root{slash}x",
        f"see {slash}home/ann{slash}x",
        f"open('{slash}tmp{slash}x')",
        "C:" + "\\Users",
    ):
        assert ON_ONE_MACHINE.search(text), text
    for text in ("docs/home/", "a/work/b", "network/", f"{slash}tmp"):
        assert not ON_ONE_MACHINE.search(text), text
    for text in ("https://" + "pypi" + ".org/simple", "files." + "pythonhosted" + ".org"):
        assert REGISTRY_HOST.search(text), text


def test_no_machine_paths_or_registry_hosts():
    texts = tracked_texts()
    assert "pyproject.toml" in texts and "tests/project/test_project.py" in texts
    assert lines_matching(ON_ONE_MACHINE, texts) == []
    assert lines_matching(REGISTRY_HOST, texts) == []


def test_configs_parse_and_say_how_they_are_run():
    """Each YAML opens with a comment that holds the exact command, with the file's own path in it."""
    files = sorted((ROOT / "configs").rglob("*.y*ml"))
    assert ROOT / "configs" / "graft" / "smollm2-135m.yaml" in files
    for path in files:
        name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        assert isinstance(yaml.safe_load(text), dict), f"{name} is not a mapping"
        header = re.match(r"(?:#[^\n]*\n|\n)*", text)[0]
        command = re.search(rf"#\s+(?:\$ )?(?:python -m|accelerate launch) [^\n]*{re.escape(name)}", header)
        assert command, f"{name}: its header comment holds no command such as `python -m conversion.graft {name}`"
        program = re.search(r"(?:python -m|-m) ([\w.]+)", command[0])
        if program and program[1].startswith("conversion."):
            assert (ROOT / (program[1].replace(".", "/") + ".py")).is_file(), (
                f"{name} names {program[1]}, which is not there"
            )


def test_readme_links_resolve():
    """Every relative link of the Markdown files leads to a file of the checkout."""
    files = [ROOT / name for name in tracked_texts() if name.endswith(".md")]
    assert ROOT / "README.md" in files
    for path in files:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href|srcset)=\"([^\"]+)\"", text)
        for target in (markdown or html for markdown, html in links):
            file = target.partition("#")[0]
            if file and not re.match(r"[a-z]+:", file):
                assert (path.parent / file).exists(), f"{path.relative_to(ROOT)} links to {file}, which is not there"


def prose(text: str) -> list[tuple[int, str]]:
    """Numbers and lines of a Markdown text without its tables and its fenced or indented code."""
    found, fence, in_list, before = [], None, False, ""
    for number, line in enumerate(text.splitlines(), 1):
        mark = re.match(r"\s*(```|~~~)", line)
        if mark and fence in (None, mark[1]):
            fence = mark[1] if fence is None else None
            in_list = in_list and line.startswith(" ")
        elif fence is None and line.strip():
            item = re.match(r"\s*(?:[-*+]|\d+[.)])\s", line)
            in_list = item is not None or (in_list and (line[0] == " " or before != ""))
            code = line.startswith("    ") and not in_list
            if not code and not line.lstrip().startswith("|"):
                found.append((number, line))
        before = line.strip()
    return found


def test_prose_is_found():
    text = "a\n\n    code\n\n- b\n\n    c\n\n| d |\n```\ncode\n```\n  ~~~\n```\n~~~\ne\n\n    code\nf\n"
    assert [line.strip() for _, line in prose(text)] == ["a", "- b", "c", "e", "f"]


def test_prose_has_at_most_120_columns():
    """As the code; tables cannot be wrapped, and code is as long as it is."""
    files = {name: text for name, text in tracked_texts().items() if name.endswith(".md")}
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/log.md"} <= set(files)
    wide = [f"{name}:{n}" for name, text in files.items() for n, line in prose(text) if len(line) > 120]
    assert wide == [], "wrap these lines"


# What the package imports --------------------------------------------------------------------------------------------
def in_package(path: Path) -> str:
    """A module's place in the package: "memory_ops", "inspect/plots"."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def unguarded_imports(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    """Import statements that are not in the body of a `try`: functions and `if` do not count as a guard."""
    found, queue = [], [tree]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        children = ast.iter_child_nodes(node)
        queue += [c for c in children if not (isinstance(node, ast.Try) and c in node.body)]
    return found


def stems(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")} - {"__init__"}


def may_import(path: Path) -> dict[int, set[str]]:
    """What a file may import relatively, by the number of dots: a flat file flat ones, a room its own and flat ones.

    The package's `__init__` may import rooms as well. Nobody may import an `__init__` from inside.
    """
    if path.parent != PACKAGE:
        return {1: stems(path.parent), 2: stems(PACKAGE)}
    return {1: stems(PACKAGE) | ({room.name for room in ROOMS} if path.stem == "__init__" else set())}


def import_faults(source: str, allowed: dict[int, set[str]], travels: bool = True) -> list[str]:
    """Imports, and docstring lines of what travels, that would keep an exported checkpoint from loading by itself."""
    tree, faults = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.module is None:
                faults.append(f"{node.lineno}: `from . import` imports an `__init__`, which no checkpoint has")
            elif node.module not in allowed.get(node.level, ()):
                faults.append(f"{node.lineno}: `{'.' * node.level}{node.module}` is not for this file to import")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if any(name.partition(".")[0] == "modeling_bmojo" for name in names):
                faults.append(f"{node.lineno}: an absolute import of the package itself")
        elif travels and isinstance(node, ast.Constant) and isinstance(node.value, str):
            faults += [
                f"{node.lineno}: text reads like an import: {m[0]!r}" for m in LIKE_AN_IMPORT.finditer(node.value)
            ]
    for node in unguarded_imports(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            continue
        names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        roots = {name.partition(".")[0] for name in names}
        for root in sorted(roots - REQUIRED_ROOTS - set(sys.stdlib_module_names) - {"modeling_bmojo"}):
            faults.append(f"{node.lineno}: `{root}` is optional; import it inside `try`")
    return faults


@pytest.mark.parametrize(
    "source",
    [
        "from . import other",
        "from .sub.other import x",
        "from ..other import x",
        "from .ghost import x",
        "from .__init__ import x",
        "import modeling_bmojo.other",
        "from modeling_bmojo import other",
        '"""Text.\n\nfrom .other on, all is well.\n"""',
        "def f():\n    import triton",
        "if FLAG:\n    from fla.ops import x",
        "import einops",
        "try:\n    pass\nexcept ImportError:\n    import mamba_ssm",
    ],
)
def test_import_rules_reject(source: str):
    assert len(import_faults(source, {1: {"other"}})) == 1


@pytest.mark.parametrize(
    "source", ["from .. import x", "from ..ghost import x", "from ..room.own import x", "import peft"]
)
def test_import_rules_reject_in_a_room(source: str):
    assert len(import_faults(source, {1: {"own"}, 2: {"other"}}, travels=False)) == 1


def test_import_rules_accept():
    guarded = "try:\n    import triton\nexcept ImportError:\n    triton = None\n"
    assert import_faults("from .other import x\nimport math, torch\n" + guarded, {1: {"other"}}) == []
    assert import_faults("from ..other import x\nfrom .own import y", {1: {"own"}, 2: {"other"}}) == []


@pytest.mark.parametrize("path", MODULES, ids=in_package)
def test_module_imports_what_it_may(path: Path):
    source = path.read_text(encoding="utf-8")
    assert import_faults(source, may_import(path), travels=path in FLAT) == []
    assert set(get_imports(path)) <= REQUIRED_ROOTS | set(sys.stdlib_module_names)


def test_flat_is_what_travels():
    """What transformers copies beside a model, found by its own reader, is every flat file and nothing else."""
    copied = {Path(file) for file in get_relative_import_files(PACKAGE / "modeling_bmojo.py")}
    assert copied | {PACKAGE / "modeling_bmojo.py", PACKAGE / "__init__.py"} == set(FLAT)
    for path in copied:
        assert set(get_relative_imports(path)) <= stems(PACKAGE)


def test_imports_run_one_way():
    """No module imports itself through others, not even inside a function."""
    graph = {}
    for path in MODULES:
        imports = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ImportFrom)]
        folders = [([path, *path.parents][node.level], node.module) for node in imports if node.level]
        graph[in_package(path)] = {in_package(folder / f"{module}.py") for folder, module in folders}
    assert graph["inspect/plots"] >= {"memory_ops", "inspect/pieces"}
    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", MODULES, ids=in_package)
def test_module_is_documented_and_named_safely(path: Path):
    """generate() passes the cache as `cache_params` to a class with "mamba" in its name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path.name} has no module docstring"
    classes = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert [name for name in classes if "mamba" in name.lower()] == []


def test_every_room_is_installed():
    """setuptools installs the packages that it is told of; a room has no rooms. The programs' libraries beside them."""
    packages = ["modeling_bmojo", *(f"modeling_bmojo.{room.name}" for room in ROOMS)]
    libraries = [*LIBRARIES, "configs"]
    stated = pyproject()["tool"]["setuptools"]["packages"]
    assert stated[: len(packages)] == packages and len(packages) > 1
    assert stated[len(packages) :] == ["bmojo_conversion", *(f"bmojo_conversion.{name}" for name in sorted(libraries))]
    assert sorted(PACKAGE.rglob("*.py")) == sorted(MODULES)


# What the programs import --------------------------------------------------------------------------------------------
# A library imports from itself and from those before it; training and evaluation do not know each other.
LIBRARIES = {
    "common": set(),
    "data": {"common"},
    "grafting": {"common", "data"},
    "training": {"common", "data", "grafting"},
    "evaluation": {"common", "data", "grafting"},
    "synthetic": {"common", "data", "evaluation"},
    "hmf": {"common", "data", "grafting"},
}


def conversion_imports(source: str, library: str | None) -> list[tuple[int, str]]:
    """Line and place of what a file of conversion/ imports from there: `"data"` for a library, `"./graft"` for a
    program. library: the folder that the file lies in, None for a program."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            paths = [alias.name.split(".") for alias in node.names]
            paths = [path[1:] for path in paths if path[0] == "conversion"]
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level == 0:
                if base[:1] != ["conversion"]:
                    continue
                base = base[1:]
            elif library is not None and node.level == 1:
                base = [library, *base]
            paths = [base] if base else [[alias.name] for alias in node.names]
        else:
            continue
        places = [path[0] if path and (path[0] in LIBRARIES) else f"./{'.'.join(path)}" for path in paths]
        found += [(node.lineno, place) for place in places]
    return found


def test_imports_of_conversion_run_one_way():
    """A file is a program and imports libraries only; a folder is a library and imports those before it."""
    folder = ROOT / "conversion"
    assert {path.parent.name for path in folder.rglob("*.py") if path.parent != folder} == set(LIBRARIES)
    faults = []
    for path in sorted(folder.rglob("*.py")):
        library = None if path.parent == folder else path.parent.name
        allowed = set(LIBRARIES) if library is None else LIBRARIES[library] | {library}
        for line, place in conversion_imports(path.read_text(encoding="utf-8"), library):
            if place not in allowed:
                faults.append(f"{path.relative_to(ROOT)}:{line} imports {place}")
    assert faults == []


def test_a_file_of_conversion_is_a_program():
    for path in (ROOT / "conversion").glob("*.py"):
        if path.name != "__init__.py":
            functions = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
            assert "main" in functions and '__name__ == "__main__"' in path.read_text(), f"{path.name} is no program"
    for path in (ROOT / "conversion").glob("*/*.py"):
        assert '__name__ == "__main__"' not in path.read_text(), f"{path.relative_to(ROOT)} is a program in a library"


def test_the_order_of_the_libraries_is_written_down():
    stated = ast.get_docstring(ast.parse((ROOT / "conversion" / "__init__.py").read_text(encoding="utf-8")))
    assert "common  <-  data  <-  grafting  <-  training, evaluation" in stated


@pytest.mark.parametrize(
    ("source", "library", "place"),
    [
        ("from ..evaluation.store import Store", "training", "evaluation"),
        ("from .graft import main", None, "./graft"),
        ("from . import graft", None, "./graft"),
        ("import conversion.graft", "data", "./graft"),
        ("from conversion import graft", "data", "./graft"),
        ("from conversion.training import run", "data", "training"),
        ("from .. import graft", "common", "./graft"),
        ("from .files import x", "common", "common"),
        ("def f():\n    from . import four_bit", "training", "training"),
    ],
)
def test_imports_of_conversion_are_found(source: str, library: str | None, place: str):
    assert [found for _, found in conversion_imports(source, library)] == [place]
