"""conversion.fit_storage: sketches come into a folder that exists, and nothing else of it changes."""

import json
import logging
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch

from conversion import fit_storage, restore
from conversion.common import staging
from conversion.common.weights import SKETCH, open_weights
from conversion.grafting.pipeline import damage
from conversion.grafting.report import changed_tensors, read_report
from modeling_bmojo import BMojoConfig, BMojoForCausalLM
from tests.conversion.graft_sources import W, edit_json, logits, snapshot
from tests.conversion.grafting.test_graft_storage import assert_same, refitted, sketches_in
from tests.conversion.training_setup import run_finetune, tiny_graft


STORED = {"storage_size": 3, "storage_candidates": 8}
TOLD = ("config.json", "graft_report.json", "README.md", "model.safetensors")


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(tiny_graft(), tmp_path / "graft"))


def run(folder: Path, *arguments: str) -> int:
    return fit_storage.main([str(folder), "--sketch-size", "4", *arguments])


def others(folder: Path) -> dict[str, torch.Tensor]:
    weights = open_weights(folder, "graft")
    return {name: weights.rows(name) for name in weights.shapes if SKETCH not in name}


def test_sketches_come_in_and_the_rest_stays(folder):
    before, tensors, told = snapshot(folder), others(folder), logits(BMojoForCausalLM.from_pretrained(folder), 4 * W)
    assert run(folder) == 0
    after = snapshot(folder)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == sorted(TOLD)
    assert json.loads(after["config.json"]) == {**json.loads(before["config.json"]), "storage_sketch_size": 4}
    now = others(folder)
    assert tensors.keys() == now.keys() and all(torch.equal(value, now[name]) for name, value in tensors.items())
    assert torch.equal(logits(BMojoForCausalLM.from_pretrained(folder), 4 * W), told)
    assert [path.name for path in folder.parent.iterdir()] == ["graft"]


def test_the_folder_loads_with_storage(folder):
    assert run(folder) == 0
    model, info = BMojoForCausalLM.from_pretrained(folder, **STORED, output_loading_info=True)
    assert not any(info.values()), info
    written = sketches_in(folder)
    assert len(written) == 8 and all(torch.equal(model.state_dict()[name], written[name]) for name in written)
    edit_json(folder / "config.json", storage_size=fit_storage.FETCHED)
    assert_same(written, refitted(folder))


def test_no_warning_where_nothing_is_stored(folder):
    assert run(folder) == 0
    found, handler = [], logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        model, info = BMojoForCausalLM.from_pretrained(folder, output_loading_info=True)
        model = BMojoForCausalLM.from_pretrained(folder, storage_size=3)  # by exact scores of all
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not any(info.values()) and not any("sketch" in message for message in found)
    assert logits(model, 4 * W).isfinite().all()


def test_the_report_tells_of_it(folder):
    parameters = read_report(folder)["counts"]["parameters"]
    assert run(folder) == 0
    report = read_report(folder)
    assert damage(folder, report) is None and changed_tensors(report, open_weights(folder, "graft")) == []
    added = sum(value.numel() for value in sketches_in(folder).values())
    assert report["counts"]["parameters"] == parameters + added
    assert report["sketches"]["size"] == 4 and report["sketches"]["tokens"] == 2048
    assert report["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size


def test_the_source_still_comes_back(folder, tmp_path):
    assert run(folder) == 0
    assert restore.main([str(folder), "--output", str(tmp_path / "restored")]) == 0
    ours, theirs = (open_weights(path, "x") for path in (tmp_path / "restored", tiny_graft().parent / "source"))
    assert all(torch.equal(ours.rows(name), theirs.rows(name)) for name in ours.shapes) and len(ours.shapes) > 10


def test_a_second_fit_replaces_the_first(folder, tmp_path):
    assert run(folder) == 0
    (tmp_path / "own.txt").write_text("j i h g f e d c b a " * 250)
    assert fit_storage.main([str(folder), "--sketch-size", "2", "--text", str(tmp_path / "own.txt")]) == 0
    report, card = read_report(folder), (folder / "README.md").read_text()
    assert damage(folder, report) is None and report["sketches"]["texts"] == ["own.txt"]
    assert {value.shape[-1] for name, value in sketches_in(folder).items() if "center" not in name} == {2}
    assert card.count("numbers per key") == 1 and "a sketch of 2 numbers" in card
    sizes = [torch.Size(entry["shape"]).numel() for entry in report["target_tensors"].values()]
    assert report["counts"]["parameters"] == sum(sizes)
    assert BMojoConfig.from_pretrained(folder).storage_sketch_size == 2


def test_what_the_config_stores_stays(tmp_path):
    folder = Path(shutil.copytree(tiny_graft(storage_size=5), tmp_path / "graft"))
    assert run(folder) == 0
    config = BMojoConfig.from_pretrained(folder)
    assert (config.storage_size, config.storage_candidates, config.storage_sketch_size) == (5, None, 4)
    assert_same(sketches_in(folder), refitted(folder))


def test_shards(tmp_path):
    folder = Path(shutil.copytree(tiny_graft(max_shard_size="40KB"), tmp_path / "graft"))
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert run(folder) == 0
    assert not (folder / "model.safetensors").exists() and damage(folder, read_report(folder)) is None
    _, info = BMojoForCausalLM.from_pretrained(folder, **STORED, output_loading_info=True)
    assert not any(info.values()), info


def test_after_training(tmp_path):
    """A trained folder is fitted, and can be trained again, with storage that only its settings ask for."""
    assert run_finetune(tmp_path, trainer={"max_steps": 1}) == 0
    folder = (tmp_path / "out").rename(tmp_path / "trained")
    assert run(folder) == 0
    report = read_report(folder)
    assert changed_tensors(report, open_weights(folder, "trained")) == [] and report["training"]
    assert run_finetune(tmp_path, source=str(folder), memory=STORED, trainer={"max_steps": 1}) == 0
    assert sketches_in(tmp_path / "out").keys() == sketches_in(folder).keys()


def test_training_asks_for_missing_sketches(tmp_path, capsys):
    memory = {**STORED, "storage_sketch_size": 4}
    assert run_finetune(tmp_path, memory=memory, trainer={"max_steps": 1}) == 2
    assert "python -m conversion.fit_storage" in capsys.readouterr().err


def broken(folder: Path, kind: str) -> tuple[list[str], list[str]]:
    """Makes the folder wrong; returns further arguments, and words of the message."""
    if kind == "no folder":
        shutil.rmtree(folder)
        return [], ["no such folder", "conversion.graft"]
    if kind == "no config":
        (folder / "config.json").unlink()
        return [], ["config.json cannot be read"]
    if kind == "other model":
        edit_json(folder / "config.json", model_type="llama")
        return [], ["a llama model", "conversion.graft"]
    if kind == "adapter":
        (folder / "config.json").unlink()
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/base"}')
        return [], ["an adapter", "'somewhere/base'", "base"]
    if kind == "large sketch":
        return ["--sketch-size", "9"], ["--sketch-size=9", "head_dim=8"]
    if kind == "no sketch":
        return ["--sketch-size", "0"], ["--sketch-size=0"]
    if kind == "no layer":
        edit_json(folder / "config.json", **dict.fromkeys(("layer_types", "layer_kinds"), ["sliding_attention"] * 2))
        return [], ["'bmojo' layer"]
    if kind == "no text":
        return ["--text", "none/*.txt"], ["--text=['none/*.txt']", "matches no file"]
    if kind == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).unlink()
        return [], ["tokenizer"]
    if kind == "other tensors":
        edit_json(folder / "config.json", mlp_bias=True)
        return [], ["tensors are not those", "mlp"]
    if kind == "no weights":
        (folder / "model.safetensors").unlink()
        return [], ["model.safetensors"]
    assert kind == "damaged report"
    (folder / "graft_report.json").write_text("{")
    return [], ["graft_report.json is damaged"]


KINDS = ["no folder", "no config", "other model", "adapter", "large sketch", "no sketch", "no layer", "no text"]
KINDS += ["no tokenizer", "other tensors", "no weights", "damaged report"]


@pytest.mark.parametrize("kind", KINDS)
def test_refused_before_the_work(kind, folder, capsys, monkeypatch):
    arguments, words = broken(folder, kind)
    before = snapshot(folder) if folder.exists() else None
    monkeypatch.setattr(fit_storage, "fit", lambda *arguments: pytest.fail("work was begun"))
    assert run(folder, *arguments) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words), told
    assert (snapshot(folder) if folder.exists() else None) == before
    assert not list(folder.parent.glob("graft.*"))


@pytest.mark.parametrize("place", ["write_model", "write_report"])
def test_interrupted_writes_leave_the_folder(place, folder, monkeypatch, capsys):
    before = snapshot(folder)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_storage, place, interrupt)
    assert run(folder) == 130
    assert "as it was" in capsys.readouterr().err
    assert snapshot(folder) == before and [path.name for path in folder.parent.iterdir()] == ["graft"]


def killed(folder: Path, patch) -> None:
    """Runs the program in a process that ends itself where `patch` says."""

    def work():
        patch()
        run(folder)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    assert process.exitcode == 9


def before_the_renames():
    staging._finish = lambda path: os._exit(9)


def between_the_renames():
    rename = staging.rename

    def one(path, to):
        rename(path, to)
        os._exit(9)

    staging.rename = one


def test_killed_while_it_writes(folder):
    before = snapshot(folder)
    killed(folder, before_the_renames)
    assert snapshot(folder) == before
    assert len(list(folder.parent.iterdir())) > 1  # it was killed at work
    assert run(folder) == 0
    assert [path.name for path in folder.parent.iterdir()] == ["graft"] and len(sketches_in(folder)) == 8


def test_killed_between_the_renames(folder):
    before = snapshot(folder)
    killed(folder, between_the_renames)
    (aside,) = folder.parent.glob("graft.replaced-*")
    assert not folder.exists() and snapshot(aside) == before
    assert run(folder) == 0
    assert [path.name for path in folder.parent.iterdir()] == ["graft"] and len(sketches_in(folder)) == 8
    assert damage(folder, read_report(folder)) is None
