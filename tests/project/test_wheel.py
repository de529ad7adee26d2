"""The wheel: every file of the package and nothing else, and every public name, installed where no checkout is."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "modeling_bmojo"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def run(*command: object, cwd: Path, **environment: str) -> str:
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 240}
    done = subprocess.run([*map(str, command)], cwd=cwd, env={**os.environ, **environment}, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves `build` and an egg-info beside the sources."""
    work = tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns("__pycache__", "*.zip")
    for folder in ("modeling_bmojo", "conversion", "configs", "tests"):
        shutil.copytree(ROOT / folder, work / "source" / folder, ignore=skipped)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, work / "source" / file)
    run(*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", work, work / "source", cwd=work)
    (built,) = work.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {file for file in archive.namelist() if ".dist-info/" not in file}
    sources = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert files == sources | {"modeling_bmojo/py.typed"}


IMPORT = """
import importlib, pkgutil, sys
import modeling_bmojo

for module in pkgutil.walk_packages(modeling_bmojo.__path__, "modeling_bmojo."):
    found = importlib.import_module(module.name)
    assert found.__file__.startswith(sys.argv[1]), found.__file__
    if module.ispkg:
        print(module.name, *found.__all__)
        for name in found.__all__:
            getattr(found, name)
print("modeling_bmojo", *modeling_bmojo.__all__)
for name in modeling_bmojo.__all__:
    getattr(modeling_bmojo, name)
"""


def test_the_installed_wheel_imports_with_every_public_name(wheel, tmp_path):
    target = tmp_path / "site"
    run(*PIP, "install", "--no-index", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    printed = run(sys.executable, "-c", IMPORT, target, cwd=tmp_path, PYTHONPATH=str(target), HF_HUB_OFFLINE="1")
    names = {package: set(public) for package, *public in map(str.split, printed.splitlines())}
    rooms = {f"modeling_bmojo.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")}
    assert names.keys() == rooms | {"modeling_bmojo"}
    assert {"show_memory", "bmojo_lora_config", "explain_kernels", "BMojoForCausalLM"} <= names["modeling_bmojo"]
    assert "trace_innovation" in names["modeling_bmojo.inspect"]
