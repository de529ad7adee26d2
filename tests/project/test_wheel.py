"""The wheel: the files of the package, the programs and the recipes and nothing else, at work where no checkout is."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from conversion.__main__ import PROGRAMS
from conversion.common.provenance import code_fingerprint


ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "modeling_bmojo"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
# What the programs and recipes are called in the wheel; pyproject.toml says why.
PROGRAMS_AS, RECIPES_AS = "bmojo_conversion", "bmojo_conversion/configs"


def run(*command: object, cwd: Path, status: int = 0, **environment: str) -> str:
    options = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 240}
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env={**clean, **environment}, **options)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout if status == 0 else done.stderr


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


@pytest.fixture(scope="module")
def scripts(wheel, tmp_path_factory) -> Path:
    """The commands of an environment with the wheel, and behind it the packages of this one but for our checkout.

    A path in a .pth is searched, but the .pth files in it are not read: those of an editable install neither.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    base = {"base": str(folder), "platbase": str(folder)}
    places = {name: Path(sysconfig.get_path(name, vars=base)) for name in ("purelib", "scripts")}
    behind = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
    (places["purelib"] / "behind.pth").write_text("\n".join(behind), encoding="utf-8")
    python = places["scripts"] / "python"
    run(*PIP, "--python", python, "install", "--no-index", "--no-deps", wheel, cwd=folder)
    return places["scripts"]


def named(folder: Path, pattern: str, prefix: str) -> set[str]:
    found = (path for path in folder.rglob(pattern) if path.is_file() and "__pycache__" not in path.parts)
    return {f"{prefix}/{path.relative_to(folder).as_posix()}" for path in found}


def test_the_wheel_holds_what_it_should_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {file for file in archive.namelist() if ".dist-info/" not in file}
    expected = named(PACKAGE, "*.py", "modeling_bmojo") | {"modeling_bmojo/py.typed"}
    expected |= named(ROOT / "conversion", "*.py", PROGRAMS_AS) | named(ROOT / "configs", "*", RECIPES_AS)
    assert files == expected


def test_it_imports_grafts_and_writes_where_no_checkout_is(scripts, tmp_path):
    program = ROOT / "tests" / "launched" / "installed.py"
    printed = run(scripts / "python", program, cwd=tmp_path, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    lines = [line.split() for line in printed.splitlines() if line.startswith("package ")]
    names = {package: set(public) for _, package, *public in lines}
    rooms = {f"modeling_bmojo.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")}
    libraries = {f"{PROGRAMS_AS}.{path.parent.name}" for path in (ROOT / "conversion").glob("*/__init__.py")}
    assert names.keys() == rooms | libraries | {"modeling_bmojo", PROGRAMS_AS}
    assert {"show_memory", "bmojo_lora_config", "explain_kernels", "BMojoForCausalLM"} <= names["modeling_bmojo"]
    assert "trace_innovation" in names["modeling_bmojo.inspect"]
    report = json.loads((tmp_path / "graft" / "graft_report.json").read_text(encoding="utf-8"))
    assert report["code_sha256"] == code_fingerprint(), "a graft of the checkout would be made anew"


def test_the_command_lists_its_programs_and_recipes(scripts, tmp_path):
    from importlib.metadata import version

    programs = {path.stem.replace("_", "-") for path in (ROOT / "conversion").glob("*.py")}
    assert programs - {"--init--", "--main--"} == set(PROGRAMS)
    bmojo = scripts / "bmojo"
    told = run(bmojo, "--help", cwd=tmp_path)
    assert all(f"\n  {name} " in told for name in PROGRAMS)
    assert run(bmojo, "--version", cwd=tmp_path).strip() == version("modeling-bmojo")
    assert "did you mean 'fit-storage'" in run(bmojo, "fit-storag", cwd=tmp_path, status=2)
    listed = {line.split()[0] for line in run(bmojo, "recipes", cwd=tmp_path).splitlines()}
    assert listed == {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").glob("*/*.yaml")}
    text = (ROOT / "configs" / "align" / "qwen3-8b.yaml").read_text(encoding="utf-8")
    assert run(bmojo, "recipes", "align/qwen3-8b.yaml", cwd=tmp_path) == text
    place = run(bmojo, "recipes", "--path", "accelerate/ddp", cwd=tmp_path).strip()
    assert Path(place).is_file() and str(scripts.parent) in place
    assert list(tmp_path.iterdir()) == []


WITHOUT = "import sys; sys.modules[{0!r}] = None; from {1}.__main__ import main; sys.exit(main([{2!r}, 'x']))"


def test_a_missing_package_is_said_with_the_extra_that_brings_it(scripts, tmp_path):
    told = run(scripts / "python", "-c", WITHOUT.format("bs4", PROGRAMS_AS, "html-text"), cwd=tmp_path, status=2)
    assert told.strip() == (
        "error: bmojo html-text: needs the package 'bs4', which is not installed here; "
        "pip install 'modeling-bmojo[convert]'."
    )
    told = run(scripts / "python", "-c", WITHOUT.format("argparse", PROGRAMS_AS, "recipes"), cwd=tmp_path, status=1)
    assert "ModuleNotFoundError" in told, "a module of no extra is a defect, which keeps its traceback"
