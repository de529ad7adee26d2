"""What programs are called, how recipes are found by name, and what is said where a package or a recipe is missing."""

import re
from pathlib import Path

import pytest

from conversion import finetune, graft, recipes
from conversion.__main__ import PROGRAMS, main
from conversion.common.commands import EXTRAS, command, missing_package, purpose
from conversion.common.recipes import CONFIGS, find_recipe, own_data, recipe_names
from conversion.data.reading import read_files
from tests.project.test_project import pyproject


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("given", "program", "found"),
    [
        ("smollm2-135m.yaml", "graft", "graft/smollm2-135m.yaml"),
        ("smollm2-135m", "align", "align/smollm2-135m.yaml"),
        ("configs/graft/qwen3-8b.yaml", "graft", "graft/qwen3-8b.yaml"),
        ("finetune/qwen3-8b", "finetune", "finetune/qwen3-8b.yaml"),
        ("lora-smollm2-135m", "finetune", "peft/lora-smollm2-135m.yaml"),
        ("quick", "recall", "recall/quick.yaml"),
        ("accelerate/ddp.yaml", None, "accelerate/ddp.yaml"),
    ],
)
def test_recipes_are_found_by_name_from_any_folder(tmp_path, monkeypatch, given, program, found):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(given, program) == ROOT / "configs" / found


def test_a_file_comes_before_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m.yaml").write_text("own: file\n", encoding="utf-8")
    assert find_recipe("smollm2-135m.yaml", "graft") == Path("smollm2-135m.yaml")
    assert find_recipe(str(tmp_path / "smollm2-135m.yaml"), "graft").read_text(encoding="utf-8") == "own: file\n"


@pytest.mark.parametrize("given", ["absent.yaml", "../graft/smollm2-135m.yaml", "align/qwen3-8b.yaml", "", "configs"])
def test_what_is_no_recipe_is_refused_with_those_that_are(tmp_path, monkeypatch, capsys, given):
    """Those of the program alone: an alignment's settings are none of a graft."""
    monkeypatch.chdir(tmp_path)
    assert graft.main([given]) == 2
    told = capsys.readouterr().err
    assert f"settings file {given!r}: no such file" in told
    assert re.findall(r"\w+/[\w.-]+\.yaml", told.partition("one of:")[2]) == recipe_names("graft")
    assert finetune.main([given]) == 2
    assert "peft/lora-smollm2-135m.yaml" in capsys.readouterr().err


def test_data_of_a_recipe_is_found_from_any_folder(tmp_path, monkeypatch):
    pattern = "configs/peft/data/short-answers-held-out.jsonl"
    monkeypatch.chdir(ROOT)
    assert own_data(pattern) == pattern and own_data("texts/*.txt") == "texts/*.txt"
    rows, files = read_files(pattern, "text")
    monkeypatch.chdir(tmp_path)
    again, same_files = read_files(pattern, "text")
    assert len(rows) == len(again) > 0 and files == same_files
    (tmp_path / "configs").mkdir()  # the user's own folder of that name is theirs
    with pytest.raises(ValueError, match="matches no file"):
        read_files(pattern, "text")


def test_recipes_are_listed_and_printed(capsys):
    assert recipes.main([]) == 0
    told = capsys.readouterr().out.splitlines()
    listed = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("*/*.yaml")}
    assert {line.split()[0] for line in told} == listed and all(len(line.split()) > 4 for line in told)
    assert recipes.main(["graft/qwen3-8b"]) == 0
    assert capsys.readouterr().out == (CONFIGS / "graft" / "qwen3-8b.yaml").read_text(encoding="utf-8")
    assert recipes.main(["nothing"]) == 2
    assert "error: settings file 'nothing'" in capsys.readouterr().err


def test_programs_by_name(capsys):
    assert main([]) == 2 and main(["--help"]) == 0
    shown = capsys.readouterr()
    assert shown.out == shown.err
    assert main(["allign"]) == 2
    assert "did you mean 'align'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["fit_storage", "--help"])
    assert ended.value.code == 0 and "usage: python -m conversion.fit_storage" in capsys.readouterr().out
    assert command("fit_storage") == "python -m conversion.fit_storage"


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_says_what_it_does(name):
    path = ROOT / "conversion" / f"{name.replace('-', '_')}.py"
    first = path.read_text(encoding="utf-8").removeprefix('"""').splitlines()[0]
    assert f"`{command(path.stem)}" in first
    said = purpose(first)
    assert said.count(".") == 1 and said.endswith(".") and "`" not in said and len(said) > 20


def test_extras_are_those_of_pyproject():
    """Each extra that a message names brings that package; a package that comes anyhow needs no message."""
    project = pyproject()["project"]
    distributions = {"bs4": "beautifulsoup4", "google": "protobuf"}
    for module, extra in EXTRAS.items():
        name = distributions.get(module, module)
        assert any(re.match(rf"{name}\b", text) for text in project["optional-dependencies"][extra]), module
        assert not any(re.match(rf"{name}\b", text) for text in project["dependencies"]), module
        told = missing_package(ModuleNotFoundError(name=f"{module}.inner"))
        assert f"{module!r}" in told and f"modeling-bmojo[{extra}]" in told
    assert missing_package(ModuleNotFoundError(name="conversion.common.absent")) is None
    assert missing_package(ModuleNotFoundError()) is None
