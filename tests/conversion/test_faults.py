"""What conversion's programs do about damaged files, full disks, second writers and untrue reports: one message each.

Where a process is killed, and what is left then, is tried out by `make test-faults` (tests/faults/).
"""

import contextlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from conversion import evaluate, restore
from conversion.grafting.report import read_report
from conversion.training import trainer
from conversion.training.checkpoints import checkpoints, work_folder
from tests.conversion.graft_sources import edit_json, graft, save_source, snapshot, tiny_tokenizer
from tests.conversion.training_setup import log_of, recipe, run_align, run_finetune, tiny_graft


STEADY = {"max_steps": 3, "save_steps": 1, "save_total_limit": 3, "lr_scheduler_type": "constant", "warmup_steps": 0}
TRAINED = {"losses": {"mixer": 1.0}, "data": {"held_out": 0}, "trainer": STEADY}


def one_message(capsys, *words: str) -> str:
    """The one message of a refused run."""
    told = capsys.readouterr().err
    (message,) = (line for line in told.splitlines() if line.startswith("error: "))
    assert "Traceback" not in told
    for word in words:
        assert word in message, message
    return message


class AtStep(TrainerCallback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


@contextlib.contextmanager
def at_step(step, action):
    """The runs inside do this at the end of a step."""
    made = trainer.BMojoTrainer.__init__

    def build(self, *arguments, callbacks, **options):
        made(self, *arguments, callbacks=[AtStep(step, action), *callbacks], **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.BMojoTrainer, "__init__", build)
        yield


def fail():
    raise OSError("the disk is gone")


def in_a_fork(work) -> tuple[int, str]:
    """Exit status and messages of `work()` in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def run():
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
        status = work()
        theirs.send((status, sys.stderr.getvalue()))

    process = context.Process(target=run)
    process.start()
    assert ours.poll(120), "the process has ended without a status"
    found = ours.recv()
    process.join(60)
    return found


# One writer ----------------------------------------------------------------------------------------------------------
def test_a_second_run_on_the_same_output_is_refused(tmp_path):
    seen = []

    def second():
        for flags in (("--overwrite",), ("--resume",), ("--finish", "last")):
            seen.append(in_a_fork(lambda flags=flags: run_align(tmp_path, *flags, **{**TRAINED, "seed": 5})))

    with at_step(2, second):
        assert run_align(tmp_path, **TRAINED) == 0
    assert [status for status, _ in seen] == [2, 2, 2]
    assert all("another process is writing it" in said and str(tmp_path / "out") in said for _, said in seen)
    assert read_report(tmp_path / "out")["training"][0]["settings"]["seed"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "settings.yaml", "text"]


def test_a_run_with_nothing_left_to_train_trains_nothing(tmp_path, monkeypatch):
    """Interrupted while its result was written: the Trainer would run one more step."""
    assert run_align(tmp_path, output=str(tmp_path / "whole"), **TRAINED) == 0
    with monkeypatch.context() as patch:
        patch.setattr("conversion.training.run.write_log", lambda *given: fail())
        assert run_align(tmp_path, **TRAINED) == 2
    assert run_align(tmp_path, "--resume", **TRAINED) == 0
    assert log_of(tmp_path / "out") == log_of(tmp_path / "whole") and len(log_of(tmp_path / "out")) == 3
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# Checkpoints ---------------------------------------------------------------------------------------------------------
def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {"flipped": (flip, "has other contents"), "cut": (halve, "instead of"), "missing": (Path.unlink, "is missing")}
FILES = ("trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A folder with a run that failed after its second step."""
    folder = tmp_path_factory.mktemp("unfinished")
    with at_step(3, fail):
        assert run_align(folder, **TRAINED) == 2
    return folder


@pytest.fixture
def interrupted(unfinished, tmp_path):
    """A copy of it to damage: the last checkpoint; runs go by their output, which moves along."""
    shutil.copytree(work_folder(unfinished / "out"), work_folder(tmp_path / "out"))
    return checkpoints(work_folder(tmp_path / "out"))[-1]


def resumed(tmp_path, unfinished, *flags):
    """Data are read from where the run had them: the recipe names them."""
    files = recipe(unfinished)["data"]["files"]
    return run_align(tmp_path, *flags, **{**TRAINED, "data": {"held_out": 0, "files": files}})


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoints_are_refused_by_name(name, damage, interrupted, unfinished, tmp_path, capsys):
    act, problem = DAMAGE[damage]
    act(interrupted / name)
    for flags in (("--resume",), ("--finish", "last")):
        assert resumed(tmp_path, unfinished, *flags) == 2
        one_message(capsys, flags[0], str(interrupted), name, problem, "delete this folder to go on from checkpoint-1")
    assert interrupted.is_dir() and not (tmp_path / "out").exists()


def test_an_earlier_checkpoint_is_the_way_out(interrupted, unfinished, tmp_path):
    shutil.rmtree(interrupted)
    assert resumed(tmp_path, unfinished, "--resume") == 0
    assert len(log_of(tmp_path / "out")) == 3


def test_a_damaged_list_of_files_is_refused(interrupted, unfinished, tmp_path, capsys):
    for text in ("", "[]", "{}", '{"files": 3}', '{"files": {"a": 1}}'):
        (interrupted / "files.json").write_text(text)
        assert resumed(tmp_path, unfinished, "--resume") == 2
        one_message(capsys, "files.json", str(interrupted))


def test_a_checkpoint_of_another_recipe_is_refused(interrupted, unfinished, tmp_path, capsys):
    edit_json(work_folder(tmp_path / "out") / "recipe.json", seed=5)
    files = recipe(unfinished)["data"]["files"]
    other = {**TRAINED, "data": {"held_out": 0, "files": files}, "seed": 5}
    assert run_align(tmp_path, "--resume", **other) == 2
    one_message(capsys, "made by another recipe than recipe.json", str(interrupted))


def test_checkpoints_without_hashes_are_not_thrown_away(interrupted, unfinished, tmp_path, capsys):
    """As earlier versions wrote them, and as a run leaves one that is killed at the very end of saving."""
    for checkpoint in checkpoints(work_folder(tmp_path / "out")):
        (checkpoint / "files.json").unlink()
    for flags in ((), ("--resume",), ("--finish", "last")):
        assert resumed(tmp_path, unfinished, *flags) == 2
        one_message(capsys, str(interrupted), "files.json", "--overwrite starts anew")
    assert interrupted.is_dir()
    assert resumed(tmp_path, unfinished, "--overwrite") == 0


# Reuse ---------------------------------------------------------------------------------------------------------------
def sharded_graft(folder: Path) -> Path:
    save_source(folder / "source")
    assert graft(folder, max_shard_size="40KB") == 0
    return folder / "graft"


UNUSABLE = {
    "a missing shard": (lambda out: sorted(out.glob("*-of-*"))[0].unlink(), "model-00001-of"),
    "a shard of one byte": (lambda out: sorted(out.glob("*-of-*"))[-1].write_bytes(b"x"), "damaged or truncated"),
    "a shard cut short": (lambda out: halve(sorted(out.glob("*-of-*"))[0]), "damaged or truncated"),
    "another shard's file": (
        lambda out: shutil.copyfile(sorted(out.glob("*-of-*"))[0], sorted(out.glob("*-of-*"))[1]),
        "no shard holds",
    ),
    "a damaged config": (lambda out: halve(out / "config.json"), "config.json"),
    "code that is missing": (lambda out: (out / "modeling_bmojo.py").unlink(), "modeling_bmojo.py"),
    "code cut short": (lambda out: halve(out / "modeling_bmojo.py"), "modeling_bmojo.py"),
    "a damaged report": (lambda out: halve(out / "graft_report.json"), "graft_report.json"),
    "a report of another kind": (lambda out: (out / "graft_report.json").write_text("[]"), "graft_report.json"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_what_is_reused_was_looked_at(case, tmp_path, capsys):
    out = sharded_graft(tmp_path)
    before, (harm, word) = snapshot(out), UNUSABLE[case]
    harm(out)
    assert graft(tmp_path, "--reuse", max_shard_size="40KB") == 0
    told = capsys.readouterr().out
    assert "made again, because" in told and word in told
    assert snapshot(out) == before
    assert graft(tmp_path, "--reuse", max_shard_size="40KB") == 0
    assert "kept" in capsys.readouterr().out


# Weight maps ---------------------------------------------------------------------------------------------------------
def with_index(folder: Path, change) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    change(index)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def renamed(to: str):
    """An index that names its first shard so."""

    def change(index):
        first = min(index["weight_map"].values())
        index["weight_map"] = {name: to if file == first else file for name, file in index["weight_map"].items()}

    return change


def programs_on(tmp_path: Path, folder: Path, output: Path):
    """Every program that reads the weights of a B'MOJO folder, or of a source."""
    settings = tmp_path / "evaluate.yaml"
    values = {"source": str(tiny_graft().parent / "source"), "output": str(output), "grafts": [str(folder)]}
    values |= {"tokens": 40, "texts": 1, "passkey": False, "cost": False, "plot": False, "window_size": 16}
    (tmp_path / "words.txt").write_text("a b c d e f g h " * 40)
    settings.write_text(json.dumps({**values, "files": [str(tmp_path / "words.txt")], "rows": ["source"]}))
    source = {"source": str(folder), "output": str(output)}
    return {
        "align": lambda: run_align(tmp_path, **{**TRAINED, **source}),
        "finetune": lambda: run_finetune(tmp_path, **source),
        "restore": lambda: restore.main([str(folder), "--output", str(output)]),
        "evaluate": lambda: evaluate.main([str(settings)]),
    }


MAPS = {
    "above": renamed("../outside.safetensors"),
    "deeper and above": renamed("a/../../outside.safetensors"),
    "by the other separator": renamed("..\\outside.safetensors"),
    "a number": lambda index: index["weight_map"].update({next(iter(index["weight_map"])): 3}),
    "a list": lambda index: index["weight_map"].update({next(iter(index["weight_map"])): ["a"]}),
    "no map": lambda index: index.update(weight_map=["model-00001-of-00002.safetensors"]),
    "nothing": lambda index: index.update(weight_map={}),
}


@pytest.mark.parametrize("case", [*MAPS, "absolute"])
def test_weight_maps_stay_in_their_folder(case, tmp_path, capsys):
    out = sharded_graft(tmp_path)
    save_source(tmp_path / "sharded", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "sharded")
    for folder in (out, tmp_path / "sharded"):
        shutil.copyfile(min(folder.glob("*-of-*")), tmp_path / "outside.safetensors")
        with_index(folder, MAPS.get(case) or renamed(str(tmp_path / "outside.safetensors")))
    tiny_tokenizer().save_pretrained(out)
    for program in programs_on(tmp_path, out, tmp_path / "new").values():
        assert program() == 2
        one_message(capsys, "model.safetensors.index.json")
    assert graft(tmp_path, source="sharded", output="new") == 2
    one_message(capsys, "model.safetensors.index.json")
    assert run_align(tmp_path, teacher=str(tmp_path / "sharded"), output=str(tmp_path / "new")) == 2
    one_message(capsys, "teacher=", "model.safetensors.index.json")
    assert not (tmp_path / "new").exists()


def test_links_of_a_hub_cache_are_followed(tmp_path):
    """snapshots/ holds links to blobs/, by plain names."""
    save_source(tmp_path / "saved", max_shard_size="20KB")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "source").mkdir()
    for number, file in enumerate(sorted((tmp_path / "saved").iterdir())):
        file.rename(tmp_path / "blobs" / str(number))
        (tmp_path / "source" / file.name).symlink_to(Path("..") / "blobs" / str(number))
    assert graft(tmp_path) == 0


# Reports -------------------------------------------------------------------------------------------------------------
def test_weights_that_the_report_does_not_tell_of_are_refused(tmp_path, capsys):
    folder = tmp_path / "changed"
    shutil.copytree(tiny_graft(), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for program in (run_align, run_finetune):
        assert program(tmp_path, source=str(folder)) == 2
        one_message(capsys, "model.layers.1.mlp.up_proj.weight", "graft_report.json", "graft anew", "delete")
    (folder / "graft_report.json").unlink()
    assert run_finetune(tmp_path, source=str(folder)) == 0


def test_results_of_training_can_be_trained_again(tmp_path):
    """Also where their dtype is another than the graft's, and not where they were changed since."""
    narrow = {"dtype": "bfloat16", "trainer": {"bf16": True, "use_cpu": True}}
    assert run_align(tmp_path, losses={"mixer": 1.0}, output=str(tmp_path / "one"), **narrow) == 0
    assert run_align(tmp_path, losses={"mixer": 1.0}, source=str(tmp_path / "one"), **narrow) == 0
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    trained = next(name for name in tensors if name.endswith("fading.in_proj.weight"))
    tensors[trained][0, 0] += 1
    save_file(tensors, tmp_path / "one" / "model.safetensors", metadata={"format": "pt"})
    assert run_align(tmp_path, "--overwrite", losses={"mixer": 1.0}, source=str(tmp_path / "one"), **narrow) == 2


# Damaged files -------------------------------------------------------------------------------------------------------
RUINS = [b"", b"x", b"[]", b"null", b'{"a": [', b"\xff\xfe\x00\x01", b'"text"', b"{}", b'{"model_type": 3}']


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "graft_report.json"])
def test_damaged_json_files_are_told_of(name, tmp_path, capsys):
    folder = tmp_path / "graft"
    for ruin in [*RUINS, (tiny_graft() / name).read_bytes()[:-40]]:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_graft(), folder)
        (folder / name).write_bytes(ruin)
        for program, run in programs_on(tmp_path, folder, tmp_path / "new").items():
            if run() == 2:
                one_message(capsys)
            shutil.rmtree(tmp_path / "new", ignore_errors=True)
            if program == "align" and ruin[:2] != b"{}":
                assert not (tmp_path / "new.training").exists()
            shutil.rmtree(tmp_path / "new.training", ignore_errors=True)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_damaged_json_files_of_a_source_are_told_of(name, tmp_path, capsys):
    save_source(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    whole = (tmp_path / "source" / name).read_bytes()
    for ruin in [*RUINS, whole[:-40]]:
        (tmp_path / "source" / name).write_bytes(ruin)
        if graft(tmp_path) == 2:
            one_message(capsys)
        shutil.rmtree(tmp_path / "graft", ignore_errors=True)


def test_weights_cut_short_are_told_of_by_name(tmp_path, capsys):
    size = (tiny_graft() / "model.safetensors").stat().st_size
    for length in (0, 1, 7, 8, 100, size // 2, size - 1):
        folder = tmp_path / "cut"
        shutil.copytree(tiny_graft(), folder)
        os.truncate(folder / "model.safetensors", length)
        for run in programs_on(tmp_path, folder, tmp_path / "new").values():
            assert run() == 2
            one_message(capsys, "model.safetensors", "damaged or truncated")
        source = tmp_path / "source"
        shutil.copytree(tiny_graft().parent / "source", source)
        os.truncate(source / "model.safetensors", min(length, (source / "model.safetensors").stat().st_size - 1))
        assert graft(tmp_path, output="new") == 2
        one_message(capsys, "model.safetensors", "damaged or truncated")
        assert run_align(tmp_path, teacher=str(source), output=str(tmp_path / "new")) == 2
        one_message(capsys, "teacher=", "model.safetensors")
        shutil.rmtree(source)
        shutil.rmtree(folder)


def test_pickles_cut_short_are_told_of_by_name(tmp_path, capsys):
    save_source(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "model.safetensors").unlink()
    file = tmp_path / "source" / "pytorch_model.bin"
    torch.save(tensors, file)
    whole = file.read_bytes()
    for length in (*range(12), 100, 1000, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert graft(tmp_path, allow_pickle=True) == 2
        one_message(capsys, "pytorch_model.bin")
    for place in range(40, 4000, 97):  # the pickle itself
        file.write_bytes(whole[:place] + bytes(255 - byte for byte in whole[place : place + 3]) + whole[place + 3 :])
        if graft(tmp_path, allow_pickle=True) == 2:
            one_message(capsys)
        shutil.rmtree(tmp_path / "graft", ignore_errors=True)


@pytest.mark.parametrize(
    "text", ["a: [", "a: 2001-99-99", "!!python/object/apply:os.getcwd []", "\x00", "- 1", "&a [*a]"]
)
def test_damaged_settings_are_told_of(text, tmp_path, capsys):
    from conversion import align
    from conversion import graft as graft_program

    path = tmp_path / "settings.yaml"
    path.write_text(text)
    for program in (graft_program, align, evaluate):
        assert program.main([str(path)]) == 2
        one_message(capsys, "settings.yaml")


# Full disks ----------------------------------------------------------------------------------------------------------
def limited(size: int, work):
    """`work` in a process that can write files of this size at most: what a full disk does, by every library."""

    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return work()

    return in_a_fork(run)


@pytest.mark.parametrize("size", [300, 3000, 20_000])
def test_a_disk_that_is_full_is_told_of(size, tmp_path):
    save_source(tmp_path / "source")
    status, said = limited(size, lambda: graft(tmp_path))
    assert status == 2 and said.count("error: ") == 1 and "Traceback" not in said
    assert str(tmp_path / "graft") in said and "free some space" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["settings.yaml", "source"]


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tmp_path):
    """Of each library's errors: safetensors', torch's and Python's own, at the second checkpoint."""
    recipe(tmp_path)  # writes the text
    for size in (0, 2000, 40_000):

        def fill(size=size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        def run(fill=fill):
            with at_step(2, fill):
                return run_align(tmp_path, "--overwrite", **TRAINED)

        status, said = in_a_fork(run)
        assert status == 2 and said.count("error: ") == 1 and "Traceback" not in said
        assert "checkpoint-2" in said and "free some space" in said
        work = work_folder(tmp_path / "out")
        assert [path.name for path in sorted(work.glob("checkpoint-*"))] == ["checkpoint-1"]
    assert run_align(tmp_path, "--resume", **TRAINED) == 0
