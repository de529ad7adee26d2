"""The notebooks: each runs from its first cell to its last on a tiny model, and what is stored in it is whole.

A small run replaces the values of the cell tagged "parameters", nothing else. The model is a random Llama of two layers
that is saved on the spot; the settings are those of the shipped YAML files.
"""

import ast
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import modeling_bmojo
from notebooks.run import assigned_names, execute, main, notebooks, read, with_parameters
from tests.project.test_project import ON_ONE_MACHINE, ROOT, pyproject


NAMES = ("01_quickstart", "02_graft_and_align", "03_lora", "04_inside_the_memory", "05_long_memory")
# What each shows: pictures, and texts coloured by show_memory or show_passages.
SHOWN = {
    "01_quickstart": (0, 1),
    "02_graft_and_align": (3, 0),
    "03_lora": (1, 0),
    "04_inside_the_memory": (6, 2),
    "05_long_memory": (0, 3),
}
SMALL = {
    "01_quickstart": {"MEMORY": {"window_size": 32, "eidetic_size": 8}, "NEW_TOKENS": 4},
    "02_graft_and_align": {
        "MEMORY": {"window_size": 32, "eidetic_size": 8},
        "TOKENS": 96,
        "STEPS": 2,
        "ROW": 64,
    },
    "03_lora": {"STEPS": 2, "BATCH": 2, "LONGEST": 400, "NEW_TOKENS": 4},
    "04_inside_the_memory": {"SMALL_MEMORY": {"window_size": 32, "eidetic_size": 4}, "CONTEXTS": [32, 64]},
    "05_long_memory": {
        "MEMORY": ["window_size=32", "storage_size=4", "storage_candidates=8", "storage_sketch_size=4"],
        "TOPICS": ["raise", "pass"],
        "NEW_TOKENS": 4,
    },
}
PROGRAMS = ("graft", "align", "evaluate", "finetune", "restore")  # of conversion: `main` alone is called
LARGEST = 1_000_000  # bytes of a notebook, outputs included
LONGEST_CELL = 25  # lines of code
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def path_of(name: str) -> Path:
    return ROOT / "notebooks" / f"{name}.ipynb"


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook) -> list:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def texts_of(output) -> list[str]:
    """What an output says: streams, HTML and plain text, without pictures."""
    data = output.get("data", {})
    return [output.get("text", ""), *(value for kind, value in data.items() if kind.startswith("text/"))]


def count_shown(notebook) -> tuple[int, int]:
    data = [output.get("data", {}) for output in outputs_of(notebook)]
    pictures = sum("image/png" in entry for entry in data)
    return pictures, sum('class="bmojo-memory"' in entry.get("text/html", "") for entry in data)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny Llama with a byte-level tokenizer and a chat template, saved as any checkpoint is."""
    folder = tmp_path_factory.mktemp("source")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_end|>", "<|im_start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([topics["raise"], topics["objects"]], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=special[1], eos_token=special[0], pad_token=special[0]
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ids = dict(bos_token_id=1, eos_token_id=0, pad_token_id=0)
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=8192, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


# They run ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_on_small_settings(name, source, tmp_path_factory):
    """In the order of the files; the first makes the graft that the others reuse, as a reader's first one does."""
    folder = tmp_path_factory.getbasetemp() / "notebooks"
    values = {"SOURCE": str(source), "GRAFT": str(folder / "graft"), **SMALL[name]}
    if "OUTPUT" in parameters_of(name):
        values["OUTPUT"] = str(folder / "outputs")
    before = path_of(name).read_bytes()
    ran = execute(path_of(name), values)
    assert count_shown(ran) == SHOWN[name]
    assert [output for output in outputs_of(ran) if output.output_type == "error"] == []
    assert path_of(name).read_bytes() == before, "a small run must not touch the stored notebook"


def parameters_of(name: str) -> list[str]:
    (cell,) = [c for c in code_cells(read(path_of(name))) if "parameters" in c.metadata.get("tags", ())]
    return assigned_names(cell.source)


# What is stored ------------------------------------------------------------------------------------------------------
def test_every_notebook_is_tested():
    assert tuple(path.stem for path in notebooks()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_stored_and_whole(name):
    notebook = read(path_of(name))
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run all cells, in order"
    assert [cell.id for cell in cells if any(output.output_type == "error" for output in cell.outputs)] == []
    assert count_shown(notebook) == SHOWN[name]
    assert not any("injected-parameters" in cell.metadata.get("tags", ()) for cell in cells), "a small run was stored"
    assert path_of(name).stat().st_size < LARGEST


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_of_no_machine(name):
    """No paths of the machine that they were made on, no warnings, no frames of progress bars."""
    for output in outputs_of(read(path_of(name))):
        for text in texts_of(output):
            assert not ON_ONE_MACHINE.search(text), text
            assert not re.search(r"site-packages|ipykernel|Warning|\r|it/s\]", text), text
        assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_with_what_the_reader_will_be_able_to_do(name):
    opening = read(path_of(name)).cells[0]
    assert opening.cell_type == "markdown" and opening.source.startswith("# ")
    assert "At the end of this notebook you can\n\n- " in opening.source
    assert "CPU cores" in opening.source, "say how long it takes"


@pytest.mark.parametrize("name", NAMES)
def test_links_of_the_text_resolve(name):
    text = "\n".join(cell.source for cell in read(path_of(name)).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (ROOT / "notebooks" / target.partition("#")[0]).exists(), target


# What the code may use -----------------------------------------------------------------------------------------------
def private_names(source: str) -> list[str]:
    """Names that are no public interface: of the package's modules, of the programs' insides, with an underscore."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if re.match(r"(modeling_bmojo|conversion)\.", alias.name)]
        elif isinstance(node, ast.ImportFrom):
            root, _, inside = (node.module or "").partition(".")
            public = {"modeling_bmojo": modeling_bmojo.__all__, "conversion": PROGRAMS}.get(root)
            if public is not None:
                found += [alias.name for alias in node.names if inside or alias.name not in public]
        elif isinstance(node, ast.Attribute):
            of_program = isinstance(node.value, ast.Name) and node.value.id in PROGRAMS
            if (node.attr.startswith("_") and node.attr != "__name__") or (of_program and node.attr != "main"):
                found.append(node.attr)
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import modeling_bmojo.cache_bmojo",
        "from modeling_bmojo import blocked_expiry",
        "from modeling_bmojo.memory_ops import blocked_expiry",
        "from conversion import pipeline",
        "from conversion.graft import main",
        "from conversion import graft\ngraft.parse_arguments([])",
        "cache._states",
    ],
)
def test_private_names_are_found(source):
    assert len(private_names(source)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_short_and_use_public_names_only(name):
    for cell in code_cells(read(path_of(name))):
        assert private_names(cell.source) == [], cell.id
        assert len(cell.source.splitlines()) <= LONGEST_CELL, cell.id


# Started without the package -----------------------------------------------------------------------------------------
def start_cell(name: str) -> str:
    return code_cells(read(path_of(name)))[0].source


def test_all_start_alike():
    assert len({start_cell(name) for name in NAMES}) == 1
    for name in NAMES:
        tags = [cell.metadata.get("tags") for cell in code_cells(read(path_of(name)))]
        assert tags[1] == ["parameters"], f"{name}: parameters come right after the start"


def test_outside_a_checkout_it_says_where_to_open_it(tmp_path):
    copy = tmp_path / "copy.ipynb"
    copy.write_bytes(path_of(NAMES[0]).read_bytes())
    with pytest.raises(CellExecutionError, match=r"modeling_bmojo and its programs are not here.*folder notebooks/"):
        execute(copy)


def test_a_python_without_the_packages_is_told_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("torch", "peft") else find(name))
    monkeypatch.chdir(ROOT / "notebooks")
    said = r"has no torch, peft\. .*constraints\.txt -e '\.\[(\w+)\]'"
    with pytest.raises(ModuleNotFoundError, match=said) as caught:
        exec(start_cell(NAMES[0]), {})
    extra = re.search(r"\.\[(\w+)\]", str(caught.value))[1]
    wanted = " ".join(pyproject()["project"]["optional-dependencies"][extra])
    assert "convert" in wanted and "train" in wanted and "matplotlib" in wanted


def test_in_a_checkout_it_goes_to_its_root(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT / "notebooks")
    exec(start_cell(NAMES[0]), {})
    assert Path.cwd() == ROOT and sys.path[0] == str(ROOT)


# The runner ----------------------------------------------------------------------------------------------------------
def saved(path: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source, id=f"c{index}") for index, source in enumerate(sources)]
    cells[0].metadata = {"tags": ["parameters"], "execution": {"iopub.execute_input": "yesterday"}}
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python", "version": "2.7"}}), path
    )
    return path


def test_runner_writes_outputs_without_what_changes(tmp_path, capsys, monkeypatch):
    """With the environment of a test run, too, in which matplotlib draws nothing that a notebook would show."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    draw = "import matplotlib.pyplot as plt\nfigure, ax = plt.subplots(figsize=(1, 1))"
    bar = "print('10%', end='\\r')\nprint('20%')"
    path = saved(tmp_path / "a.ipynb", "X = 3", draw, bar)
    assert main([str(path)]) == 0
    assert re.search(r"a\.ipynb \.\.\. \d+ s", capsys.readouterr().out)
    notebook = json.loads(path.read_text())
    assert [cell["execution_count"] for cell in notebook["cells"]] == [1, 2, 3]
    assert notebook["cells"][0]["metadata"] == {"tags": ["parameters"]}
    assert "version" not in notebook["metadata"]["language_info"]
    assert "image/png" in notebook["cells"][1]["outputs"][0]["data"]
    assert notebook["cells"][2]["outputs"][0]["text"] == ["20%\n"]
    assert os.listdir(tmp_path) == ["a.ipynb"]


def test_a_failing_notebook_stays_as_it_was(tmp_path, capsys):
    path = saved(tmp_path / "a.ipynb", "X = 3", "X / 0")
    before = path.read_bytes()
    assert main([str(path)]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.ipynb"]


def test_asked_to_stop_it_ends_the_kernel_and_leaves_the_file(tmp_path):
    mark = tmp_path / "kernel"
    wait = f"import os, time\nopen({str(mark)!r}, 'w').write(str(os.getpid()))\ntime.sleep(300)"
    path = saved(tmp_path / "a.ipynb", "X = 3", wait)
    before = path.read_bytes()
    command = [sys.executable, str(ROOT / "notebooks" / "run.py"), str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program:
        while program.poll() is None and not (mark.exists() and mark.read_text()):
            time.sleep(0.1)
        program.send_signal(signal.SIGINT)
        said = program.communicate(timeout=120)[1]
    assert program.returncode == 130, said
    assert said.splitlines()[-1] == "interrupted; the notebook that was running is as it was"
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)
    assert path.read_bytes() == before


def test_files_that_are_no_notebooks_are_refused(tmp_path, capsys):
    (tmp_path / "a.ipynb").write_text("no JSON")
    for name in ("a.ipynb", "absent.ipynb"):
        assert main([str(tmp_path / name)]) == 2
        assert "cannot be read as a notebook" in capsys.readouterr().err


def test_parameters_that_a_notebook_does_not_have_are_refused(tmp_path):
    path = saved(tmp_path / "a.ipynb", "X, Y = 3, 4\nZ = X")
    assert with_parameters(read(path), {"Z": [1]}).cells[1].source == "Z = [1]"
    with pytest.raises(ValueError, match="W: is no parameter of this notebook; its parameters are X, Y, Z"):
        with_parameters(read(path), {"W": 1})
    notebook = read(path)
    notebook.cells[0].metadata = nbformat.from_dict({})
    with pytest.raises(ValueError, match="0 cells have the tag"):
        with_parameters(notebook, {"X": 1})
