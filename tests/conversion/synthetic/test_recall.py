"""conversion.recall end to end on tiny models: tables, pictures, store, interruptions, refusals, what is learned."""

import json
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
import yaml

from conversion import recall
from conversion.synthetic import job
from conversion.synthetic.report import losses, markdown, summarise
from conversion.synthetic.samples import IGNORED
from conversion.synthetic.settings import load_recall
from conversion.synthetic.tasks import tasks_of
from conversion.synthetic.text import Text, corpus
from conversion.synthetic.training import Batches, Reader, Recipe, choice_loss, score, train
from modeling_bmojo import BMojoConfig, BMojoForCausalLM


ROOT = Path(__file__).resolve().parents[3]
TINY = {
    "tasks": [{"task": "mqar", "length": 16, "pairs": 2, "vocabulary": 16}],
    "models": ["window", "bmojo_key"],
    "state_bytes": [8192],
    "width": 16,
    "heads": 1,
    "parameters": 9000,
    "steps": 3,
    "batch": 4,
    "test_samples": 8,
    "solved": None,
    "device": "cpu",
    "plot": False,
}


def recalled(tmp_path, *arguments: str, **settings) -> int:
    values = {"output": str(tmp_path / "out"), **TINY, **settings}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(values))
    return recall.main([str(tmp_path / "settings.yaml"), *arguments])


def stored(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "recall.json").read_text())


def figures(tmp_path) -> dict:
    """All that was measured but times."""
    return {
        row: {name: value for name, value in found["trained"].items() if "seconds" not in name and name != "machine"}
        for row, found in stored(tmp_path)["measurements"].items()
    }


def test_tables_and_pictures(tmp_path, capsys):
    texts = {"task": "text", "length": 16, "stretch": [4]}
    tasks = [*TINY["tasks"], {"task": "compression", "length": 6}, texts]
    assert recalled(tmp_path, tasks=tasks, plot=True, state_bytes=[8192, 12288], learning_rates=["1e-3", 0.01]) == 0
    shown, result = capsys.readouterr().out, stored(tmp_path)
    assert (tmp_path / "out" / "table.md").read_text() in shown
    for task in ("mqar", "compression", "text"):
        assert (tmp_path / "out" / f"{task}.png").read_bytes().startswith(b"\x89PNG")
    assert len(result["measurements"]) == 3 * 2 * 2 * 2 and result["finished"]
    assert not (tmp_path / "out" / "work").exists()
    assert [row["test"] for row in result["summary"] if row["task"] == "text"][:3] == [
        "0 to 16",
        "16 to 32",
        "32 to 64",
    ]
    widths = {line.count("|") for line in shown.splitlines() if line.startswith("| bmojo_key | 8")}
    assert len(widths) == 2  # the text's has a column for each of its tests
    for row in result["summary"]:
        assert row["bytes"] <= row["wanted_bytes"] + 64 and row["seeds"] == 1


def test_the_same_figures_again(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    assert recalled(tmp_path / "a") == 0 and recalled(tmp_path / "b") == 0
    assert figures(tmp_path / "a") == figures(tmp_path / "b")


def test_two_workers_measure_the_same(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    assert recalled(tmp_path / "a") == 0 and recalled(tmp_path / "b", workers=2) == 0
    assert figures(tmp_path / "a") == figures(tmp_path / "b")


def test_an_interrupted_run_goes_on(tmp_path, capsys, monkeypatch):
    """Interrupted in the middle of the second training: the first is not done again, the second goes on from its last
    checkpoint, and the figures are those of a run that nothing interrupted."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    assert recalled(tmp_path / "a", save_steps=2, steps=5) == 0
    real, drawn = Batches.__getitem__, []

    def until_the_last(self, step):
        drawn.append(step)
        if len(drawn) == 5 + 5:
            raise KeyboardInterrupt
        return real(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(Batches, "__getitem__", until_the_last)
        assert recalled(tmp_path / "b", save_steps=2, steps=5) == 130
    assert "what was trained is stored, --reuse goes on from there" in capsys.readouterr().err
    first = stored(tmp_path / "b")
    assert list(first["measurements"]) == ["mqar | window | 8192 | seed 0 | lr 0.003"] and not first["finished"]
    (whole,) = (tmp_path / "b" / "out" / "work").glob("*/checkpoint-2")
    for place, name in enumerate(("trainer_state.json", "optimizer.pt", "model.safetensors"), start=3):
        cut = shutil.copytree(whole, whole.with_name(f"checkpoint-{place}"))  # as a kill in the middle of saving leaves
        (cut / name).write_bytes((cut / name).read_bytes()[:-20])
    drawn.clear()

    def seen(self, step):
        drawn.append(step)
        return real(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(Batches, "__getitem__", seen)
        assert recalled(tmp_path / "b", "--reuse", save_steps=2, steps=5) == 0
    assert drawn == [2, 3, 4]
    assert figures(tmp_path / "b") == figures(tmp_path / "a")


def test_a_run_that_is_interrupted_in_its_first_training_goes_on(tmp_path, monkeypatch):
    real, drawn = Batches.__getitem__, []

    def until_the_fourth(self, step):
        drawn.append(step)
        if len(drawn) == 4:
            raise KeyboardInterrupt
        return real(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(Batches, "__getitem__", until_the_fourth)
        assert recalled(tmp_path, save_steps=2, steps=5) == 130
    assert stored(tmp_path)["measurements"] == {} and not stored(tmp_path)["finished"]
    assert recalled(tmp_path, "--reuse", save_steps=2, steps=5) == 0
    assert stored(tmp_path)["finished"]


def threads_for_processes(monkeypatch, measure):
    """Workers as threads, so that what they do can be replaced."""
    monkeypatch.setattr(job, "ProcessPoolExecutor", lambda workers, **options: ThreadPoolExecutor(workers))
    monkeypatch.setattr(job, "measure", measure)


def test_an_interruption_keeps_what_other_workers_finish(tmp_path, monkeypatch):
    started, interrupted, real = threading.Event(), threading.Event(), job.measure

    def measure(cell, work):
        if cell.model == "window":
            assert started.wait(60)
            interrupted.set()
            raise KeyboardInterrupt
        started.set()
        interrupted.wait(60)
        return real(cell, work)

    threads_for_processes(monkeypatch, measure)
    assert recalled(tmp_path, workers=2) == 130
    assert [row.split(" | ")[1] for row in stored(tmp_path)["measurements"]] == ["bmojo_key"]


def test_a_training_that_fails_keeps_what_other_workers_finish(tmp_path, capsys, monkeypatch):
    started, failed, real = threading.Event(), threading.Event(), job.measure

    def measure(cell, work):
        if cell.model == "window":
            assert started.wait(60)
            failed.set()
            raise ValueError("no room left")
        started.set()
        failed.wait(60)
        return real(cell, work)

    threads_for_processes(monkeypatch, measure)
    assert recalled(tmp_path, workers=2) == 2 and "no room left" in capsys.readouterr().err
    assert [row.split(" | ")[1] for row in stored(tmp_path)["measurements"]] == ["bmojo_key"]


def test_other_text_is_trained_on_anew(tmp_path):
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text("abc " * 60)
    files = {"train_files": (str(tmp_path / "train.txt"),), "test_files": (str(tmp_path / "test.txt"),)}
    before = Text(name="text", length=16, stretch=(2,), **files).facts()
    corpus.cache_clear()
    (tmp_path / "train.txt").write_text("abd " * 60)
    after = Text(name="text", length=16, stretch=(2,), **files).facts()
    assert before[0] != after[0] and before[1] == after[1]


def test_a_killed_worker_is_told(tmp_path, capsys, monkeypatch):
    def measure(cell, work):
        raise BrokenProcessPool

    threads_for_processes(monkeypatch, measure)
    assert recalled(tmp_path, workers=2) == 2
    assert "workers=2: the process of a training was killed" in capsys.readouterr().err


def test_only_what_is_missing_is_trained(tmp_path, capsys, monkeypatch):
    assert recalled(tmp_path) == 0
    before, trained, real = stored(tmp_path)["measurements"], [], job.measure
    monkeypatch.setattr(job, "measure", lambda cell, work: trained.append(cell.row) or real(cell, work))
    assert recalled(tmp_path) == 2 and "--reuse" in capsys.readouterr().err and trained == []
    assert recalled(tmp_path, "--reuse", seeds=[0, 1]) == 0
    assert [row.split(" | ")[3] for row in trained] == ["seed 1"] * 2
    assert {row: stored(tmp_path)["measurements"][row] for row in before} == before
    trained.clear()
    assert recalled(tmp_path, "--reuse", steps=2) == 0 and len(trained) == 2
    trained.clear()
    assert recalled(tmp_path, "--overwrite", steps=2) == 0 and len(trained) == 2


def test_other_code_is_other_figures(tmp_path, monkeypatch):
    """A cell counts for the code that it was trained by: tasks, training and the model's own modules are part of it."""
    read, told = [], job.fingerprint_of
    monkeypatch.setattr(job, "fingerprint_of", lambda files, roots: read.extend(files) or told(files, roots))
    job.code.cache_clear()
    assert len(job.code()) == 64
    names = {f"{path.parent.name}/{path.name}" for path in read}
    assert {"synthetic/associative.py", "synthetic/training.py", "modeling_bmojo/ssm_ops.py"} <= names
    assert not {"synthetic/report.py", "synthetic/plot.py"} & names


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tasks": ["mqra"]}, "'mqra' is no task"),
        ({"models": ["lstm"]}, "'lstm' is no model"),
        ({"tasks": [{"task": "mqar", "length": 10, "pairs": 4}]}, "16 at least"),
        ({"state_bytes": [100]}, "state_bytes=-28: window needs"),
        ({"state_bytes": "many"}, "state_bytes='many': must be a list of distinct whole numbers"),
        ({"learning_rates": [0.0]}, "learning_rates=[0.0]: must be a list of distinct numbers"),
        ({"learning_rates": ["fast"]}, "learning_rates=['fast']"),
        ({"seeds": [1, 1]}, "seeds=[1, 1]: must be a list of distinct"),
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"heads": 3}, "heads=3: must divide width=16"),
        ({"taps": 1}, "taps=1: must be 2 or more"),
        ({"chosen": "mamba2"}, "chosen='mamba2': must be one of the models that have"),
        ({"chosen": "window"}, "must be one of the models that have an eidetic memory and equal bytes"),
        ({"chosen": "bmojo_storage", "models": ["bmojo_storage", "bmojo_f"]}, "and equal bytes, [], or null"),
        ({"solved": 1.5}, "solved=1.5: must be a share"),
        ({"solved": 0.9, "save_steps": 20}, "save_steps=20: must be a multiple of 50"),
        ({"device": "tpu"}, "device='tpu': must be one of"),
        ({"step": 3}, "did you mean 'steps'"),
        ({"parameters": 2000}, "parameters=2,000: window has"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, capsys, settings, said):
    assert recalled(tmp_path, **settings) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_foreign_folder_and_a_damaged_one_are_refused(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "evaluation.json").write_text("{}")
    assert recalled(tmp_path, "--overwrite") == 2 and "no recall.json in it" in capsys.readouterr().err
    (tmp_path / "out" / "recall.json").write_text("{")
    assert recalled(tmp_path, "--reuse") == 2 and "damaged" in capsys.readouterr().err


def test_a_training_that_diverges_ends_and_does_not_count(tmp_path):
    assert recalled(tmp_path, models=["window"], learning_rates=[1e30, 1e-3], steps=100, warmup=0) == 0
    lost, sound = (found["trained"] for found in stored(tmp_path)["measurements"].values())
    assert lost["steps"] == 50 and sound["steps"] == 100
    (row,) = stored(tmp_path)["summary"]
    assert row["learning_rates"] == [1e-3] and row["accuracy"][0] == sound["scores"]["16 tokens"]["accuracy"]


# Training and scores -------------------------------------------------------------------------------------------------
def reader_of(task, **fields) -> Reader:
    config = BMojoConfig(
        vocab_size=task.vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1,
        layer_types=["full_attention"] * 2, **fields,
    )  # fmt: skip
    return Reader(BMojoForCausalLM(config), task, taps=3)


def test_full_attention_learns_to_recall_and_stops(tmp_path):
    """The whole harness in one: what can be solved is, and a test set that was never seen says so."""
    (task,) = tasks_of([{"task": "recall", "length": 32}])
    recipe = Recipe(400, 32, 1e-2, 0.1, 0.0, 0.99, 0, 1000, 3)
    reader, found = train(reader_of(task, initializer_range=0.18).model.config, task, recipe, "cpu", tmp_path / "work")
    assert choice_loss(reader, task, 64, 0, 32) == pytest.approx(0, abs=0.15)
    assert found["steps"] < 400
    assert score(reader, task, 64, 0, 32)["32 tokens"]["accuracy"] > 0.97


def test_scores_are_means_over_scored_tokens():
    (task,) = tasks_of([{"task": "recall", "length": 24}])
    reader = reader_of(task).eval()
    found = score(reader, task, 20, 5, 7)["24 tokens"]
    ((_, samples, _),) = task.test(20, 5)
    with torch.no_grad():
        embedded = reader.model.model.embed_tokens(samples.ids)
        padded = torch.nn.functional.pad(embedded, (0, 0, 2, 0))
        taps = reader.conv.weight[:, 0]
        mixed = embedded + sum(taps[:, i] * padded[:, i : i + 24] for i in range(3))
        logits = reader.model(inputs_embeds=mixed).logits
    due = samples.labels != IGNORED
    right = (logits.argmax(-1) == samples.labels)[due].double().mean().item()
    nll = -logits.log_softmax(-1).gather(2, samples.labels.clamp(min=0)[..., None])[..., 0][due].mean().item()
    assert found == {"accuracy": pytest.approx(right), "loss": pytest.approx(nll, rel=1e-5), "count": int(due.sum())}


def test_scores_of_a_text_count_their_positions_alone():
    (task,) = tasks_of([{"task": "text", "length": 16, "stretch": [4]}])
    found = score(reader_of(task).eval(), task, 3, 0, 8)
    assert {name: value["count"] for name, value in found.items()} == {"0 to 16": 48, "16 to 32": 48, "32 to 64": 96}


def test_compression_is_read_out_of_the_last_output_alone():
    (task,) = tasks_of([{"task": "compression", "length": 6}])
    reader, samples = reader_of(task), task.sample(2, torch.Generator().manual_seed(0))
    seen = []
    reader.model.model.register_forward_hook(lambda module, inputs, out: seen.append(out.last_hidden_state))
    reader(*samples)["loss"].backward(inputs=[*reader.parameters()], retain_graph=False)
    hidden = torch.randn(2, 6, 32, requires_grad=True)
    reader.model.model.forward = lambda **inputs: type("Out", (), {"last_hidden_state": hidden})
    reader(*samples)["loss"].backward()
    assert hidden.grad[:, -1].abs().min() > 0 and hidden.grad[:, :-1].abs().max() == 0


# The report ----------------------------------------------------------------------------------------------------------
def cell(model, accuracy, loss=1.0, seed=0, rate=0.1, ranked=True, size=100, test="8 tokens"):
    return {
        "task": "mqar", "model": model, "ranked": ranked, "eidetic": model in ("bmojo_key", "bmojo_state"),
        "choice_loss": loss, "wanted_bytes": size, "bytes": size - 1, "parameters": 10,
        "memory": {"window": 2, "slots": 1, "channels": 3}, "seed": seed, "learning_rate": rate, "steps": 5,
        "seconds": 2.0, "scores": {test: {"accuracy": accuracy, "loss": loss, "count": 4}},
    }  # fmt: skip


def test_the_best_learning_rate_counts_seed_by_seed():
    cells = [cell("window", 0.5, 2.0, 0, 0.1), cell("window", 0.7, 1.0, 0, 0.2), cell("window", 0.9, 3.0, 1, 0.1)]
    cells += [cell("window", 1.0, float("nan"), 1, 0.2)]
    (row,) = summarise(cells)
    assert row["accuracy"][0] == pytest.approx(0.8) and row["seeds"] == 2 and row["learning_rates"] == [0.1, 0.2]


def test_losses_of_ours_are_counted():
    names = {"full_attention": 1.0, "window": 0.5, "mamba2": 0.9, "bmojo_f": 0.85, "bmojo_key": 0.8, "bmojo_state": 0.7}
    cells = [cell(name, value, ranked=name != "full_attention") for name, value in names.items()]
    cells += [cell("window", 0.60, size=200), cell("bmojo_key", 0.595, size=200)]  # within the margin
    rows = summarise(cells)
    (found,) = losses(rows)
    assert (found["ours"], found["by"], found["value"], found["bytes"]) == ("bmojo_key", "accuracy", 0.8, 100)
    assert found["better"] == {"mamba2": 0.9, "bmojo_f": 0.85}
    header = {"command": "x", "machine": {"commit": "", "device": "d", "cores": 1, "threads": 1, "versions": {}}}
    settings = {"test_samples": 8, "learning_rates": [0.1], "width": 4, "layers": 2, "steps": 5, "batch": 2}
    settings["chosen"] = None
    text = markdown(rows, settings, header, "")
    assert "B'MOJO (the best one of each comparison) is behind in 1 comparisons" in text
    assert "- mqar, 8 tokens, 100 bytes, accuracy: bmojo_key 0.800; mamba2 0.900, bmojo_f 0.850" in text
    text = markdown(rows, {**settings, "chosen": "bmojo_state"}, header, "")
    assert "B'MOJO (bmojo_state) is behind in 1 comparisons" in text
    assert "bmojo_state 0.700; mamba2 0.900, bmojo_f 0.850" in text
    assert re.search(r"\| full_attention \| 99 \| 10 \| \(c\) \| 1.000 \(1.00\) \|", text)


def test_of_a_text_losses_are_compared():
    """A better accuracy at a worse loss is no better model of a text."""
    cells = [cell("mamba2", 0.6, 1.65, test="0 to 8"), cell("bmojo_key", 0.5, 1.55, test="0 to 8")]
    cells += [cell("mamba2", 0.5, 1.53, test="8 to 16"), cell("bmojo_key", 0.6, 1.55, test="8 to 16")]
    (found,) = losses([row | {"wanted_bytes": 100} for each in cells for row in summarise([each])])
    assert (found["test"], found["by"], found["value"]) == ("8 to 16", "loss", 1.55)
    assert found["better"] == {"mamba2": 1.53}


@pytest.mark.parametrize("chosen", [None, "bmojo_key"])
def test_a_loss_that_is_no_number_is_behind(chosen):
    cells = [cell("bmojo_key", 0.0, float("nan"), test="0 to 8"), cell("mamba2", 0.5, 1.5, test="0 to 8")]
    rows = [row for each in cells for row in summarise([each])]
    (found,) = losses(rows, chosen)
    assert found["ours"] == "bmojo_key" and found["better"] == {"mamba2": 1.5}
    sound = summarise([cell("bmojo_state", 0.5, 1.5, test="0 to 8")])
    assert losses(rows + sound, None) == []


# The recipes ---------------------------------------------------------------------------------------------------------
RECIPES = sorted((ROOT / "configs" / "recall").glob("*.yaml"))


def test_there_are_these_recipes():
    assert [path.stem for path in RECIPES] == ["forgetting", "full", "gpu", "quick", "text"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    """Read by the program, every model solved for; its header says how, on what and how long."""
    header = re.match(r"(?:#[^\n]*\n)+", path.read_text())[0]
    assert f"python -m conversion.recall configs/recall/{path.name}\n" in header
    assert "Hardware: " in header and "Time: " in header
    settings, tasks, models = load_recall(path, {"device": "cpu"})
    cells = job.plan(settings, tasks, models)
    assert len({cell.row for cell in cells}) == len(cells)
    counts = {"quick": (2, 12, 1), "forgetting": (1, 9, 1), "full": (9, 19, 3), "gpu": (10, 19, 3), "text": (1, 20, 3)}
    assert (len(tasks), len(models), len(settings.seeds)) >= counts[path.stem]
    assert settings.chosen == ("bmojo_learnt_near" if path.stem == "text" else "bmojo_learnt")
    assert 100 not in settings.seeds, "the seed that was developed on is not reported"
