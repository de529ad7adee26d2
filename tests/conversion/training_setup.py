"""What the tests of conversion.align and conversion.finetune share: a tiny graft, text for it, and the command lines.

The graft is made once per process from a random Llama of transformers' own class; tests only read it.
"""

import json
import random
import tempfile
from functools import cache
from pathlib import Path

import yaml

from conversion import align, finetune
from tests.conversion.graft_sources import W, graft, save_source, tiny_tokenizer


T = 3 * W
QUIET = {"disable_tqdm": True, "report_to": "none", "logging_steps": 1}
_FOLDERS: list[tempfile.TemporaryDirectory] = []  # removed when the process ends


@cache
def tiny_graft(name: str = "llama", **settings) -> Path:
    """Folder of a fresh graft of `graft_sources.SOURCES[name]` with a tokenizer; its source lies beside it."""
    _FOLDERS.append(tempfile.TemporaryDirectory())
    folder = Path(_FOLDERS[-1].name)
    save_source(folder / "source", name)
    tiny_tokenizer().save_pretrained(folder / "source")
    assert graft(folder, **settings) == 0
    return folder / "graft"


def letters(count: int, seed: int = 0) -> str:
    """A text of `count` tokens of the tiny tokenizer; half of its letters follow from the two before them."""
    draw = random.Random(seed)
    found = [0, 1]
    while len(found) < count:
        found.append((2 * found[-1] + found[-2]) % 10 if draw.random() < 0.5 else draw.randrange(10))
    return " ".join("abcdefghij"[value] for value in found[:count])


def write_text(folder: Path, documents: int = 6, tokens: int = 120) -> str:
    """Writes text files and returns their pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(documents):
        (folder / f"{index}.txt").write_text(letters(tokens, seed=index))
    return str(folder / "*.txt")


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe(tmp_path: Path, **values) -> dict:
    """A small recipe: 4 steps on local text. A section of `values` is laid over the recipe's own."""
    sections = {
        "data": {"files": write_text(tmp_path / "text"), "sequence_length": T, "packing": "concatenate"},
        "trainer": {"max_steps": 4, "learning_rate": 1e-2, "save_steps": 2, **QUIET},
    }
    for name, section in sections.items():
        given = values.pop(name, {})
        drops_files = name == "data" and {"hub", "builtin"} & given.keys()
        sections[name] = {key: value for key, value in section.items() if key != "files" or not drops_files} | given
    return {"source": str(tiny_graft()), "output": str(tmp_path / "out"), **sections, **values}


def run(program, tmp_path: Path, *arguments: str, **values) -> int:
    """Runs a program's command line on a recipe."""
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(recipe(tmp_path, **values)))
    return program.main([str(path), *arguments])


def run_align(tmp_path: Path, *arguments: str, **values) -> int:
    return run(align, tmp_path, *arguments, **values)


def run_finetune(tmp_path: Path, *arguments: str, **values) -> int:
    return run(finetune, tmp_path, *arguments, **values)


def log_of(folder: Path, key: str = "loss") -> list[float]:
    """The values of `key` in a result's log, step by step."""
    entries = json.loads((folder / "training_log.json").read_text())
    return [entry[key] for entry in entries if key in entry]
