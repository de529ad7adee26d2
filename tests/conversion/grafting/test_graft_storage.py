"""Grafts with storage: sketches of keys are fitted on the way, accounted for, and loaded again as they were."""

import json

import pytest
import torch

from conversion.common.sketch_fit import fit_sketches
from conversion.common.weights import SKETCH, digest, open_weights
from conversion.grafting import pipeline
from conversion.grafting.pipeline import build_tensors, damage, prepare, with_measured_layers
from conversion.grafting.report import read_report
from conversion.grafting.settings import build_settings
from conversion.grafting.sketches import TOKENS, choosing_exactly, read_fitting_text
from conversion.grafting.sources import open_tokenizer
from modeling_bmojo import BMojoConfig, BMojoForCausalLM
from tests.conversion.evaluation_sources import save_reader
from tests.conversion.graft_sources import W, graft, logits, save_source, tiny_tokenizer
from tests.conversion.training_setup import run_finetune


STORAGE = {"storage_size": 3, "storage_candidates": 8, "storage_sketch_size": 4}
OTHERS = {
    "storage_decay": 0.25,
    "storage_limit": 90,
    "max_rope_distance": 40,
    "fading_mass": True,
    "fading_stride": 3,
}


def source(folder, name="llama"):
    model = save_source(folder / "source", name)
    tiny_tokenizer().save_pretrained(folder / "source")
    return model


def sketches_in(folder) -> dict[str, torch.Tensor]:
    weights = open_weights(folder, "graft")
    return {name: weights.rows(name) for name in weights.shapes if SKETCH in name}


def refitted(folder, files=None) -> dict[str, torch.Tensor]:
    """The sketches of a folder's model, fitted again by hand: it chooses exactly while it reads."""
    config = BMojoConfig.from_pretrained(folder)
    model = BMojoForCausalLM.from_pretrained(folder, config=choosing_exactly(config)).eval()
    text = read_fitting_text(open_tokenizer(folder, "graft"), config, files, "text")
    fitted = fit_sketches(model, text.rows, config.storage_sketch_size)
    return {f"model.layers.{i}{SKETCH}{name}": value for i, layer in fitted.items() for name, value in layer.items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys() and ours
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-4, msg=name)


def test_settings_reach_the_model_and_sketches_come_back(tmp_path):
    original = source(tmp_path)
    assert graft(tmp_path, **STORAGE, **OTHERS) == 0
    folder = tmp_path / "graft"
    model, info = BMojoForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert {name: getattr(model.config, name) for name in {**STORAGE, **OTHERS}} == {**STORAGE, **OTHERS}
    written = sketches_in(folder)
    loaded = {name: value for name, value in model.state_dict().items() if SKETCH in name}
    assert len(written) == 2 * 4 and loaded.keys() == written.keys()
    assert all(torch.equal(value, written[name]) for name, value in loaded.items())
    assert_same(written, refitted(folder))
    torch.testing.assert_close(logits(model), logits(original), atol=1e-5, rtol=1e-5)
    assert logits(model, 5 * W).isfinite().all()


def test_the_report_accounts_for_sketches(tmp_path):
    source(tmp_path)
    assert graft(tmp_path, **STORAGE) == 0
    folder = tmp_path / "graft"
    report, written = read_report(folder), sketches_in(folder)
    assert damage(folder, report) is None
    for name, value in written.items():
        entry = report["target_tensors"][name]
        assert entry["initialised-by"].startswith("fitted to") and entry["sha256"] == digest(value)
        assert entry["shape"] == list(value.shape) and entry["dtype"] == "float32"
    facts = report["sketches"]
    assert facts["tokens"] == TOKENS and facts["size"] == 4 and facts["layers"] == [0, 1]
    assert facts["texts"] == ["pydoc, training"] and facts["runtime_seconds"] > 0
    assert "a sketch of 4 numbers per key" in (folder / "README.md").read_text()
    everything = sum(torch.Size(shape).numel() for shape in open_weights(folder, "graft").shapes.values())
    assert report["counts"]["parameters"] == everything


def test_without_sketches_nothing_is_fitted(tmp_path, monkeypatch):
    source(tmp_path)
    monkeypatch.setattr(pipeline, "fit", lambda *arguments: pytest.fail("something is fitted"))
    assert graft(tmp_path, storage_size=3) == 0
    report = read_report(tmp_path / "graft")
    assert report["sketches"] is None and sketches_in(tmp_path / "graft") == {}
    model = BMojoForCausalLM.from_pretrained(tmp_path / "graft")
    assert model.config.storage_size == 3 and logits(model, 4 * W).isfinite().all()


def test_the_text_can_be_named(tmp_path):
    source(tmp_path)
    (tmp_path / "own.txt").write_text("j i h g f e d c b a " * 250)
    files = [str(tmp_path / "own.txt")]
    assert graft(tmp_path, **STORAGE, storage_text=files) == 0
    assert read_report(tmp_path / "graft")["sketches"]["texts"] == ["own.txt"]
    written = sketches_in(tmp_path / "graft")
    assert_same(written, refitted(tmp_path / "graft", files))
    of_others = refitted(tmp_path / "graft")
    assert not all(torch.allclose(value, of_others[name], rtol=0.01) for name, value in written.items())


@pytest.mark.parametrize("name", ["qwen3", "olmo2", "smollm3", "phi3_partial_tied", "granite"])
def test_families(name, tmp_path):
    source(tmp_path, name)
    assert graft(tmp_path, **STORAGE) == 0
    assert_same(sketches_in(tmp_path / "graft"), refitted(tmp_path / "graft"))


def test_sketches_stay_float32(tmp_path):
    source(tmp_path)
    assert graft(tmp_path, **STORAGE, dtype="bfloat16", check=False) == 0
    written = sketches_in(tmp_path / "graft")
    assert {value.dtype for value in written.values()} == {torch.float32}
    model = BMojoForCausalLM.from_pretrained(tmp_path / "graft", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(model.state_dict()[name], value) for name, value in written.items())


def test_only_bmojo_layers_have_sketches(tmp_path):
    source(tmp_path)
    assert graft(tmp_path, **STORAGE, layers=[1]) == 0
    assert {name.split(".")[2] for name in sketches_in(tmp_path / "graft")} == {"1"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"storage_text": ["none/*.txt"]}, ["storage_text=", "matches no file"]),
        ({"storage_text": ["short.txt"]}, ["storage_text=", "3 tokens", "2,048"]),
        ({"storage_text": "short.txt"}, ["storage_text='short.txt'", "must be a list"]),
        ({"storage_size": 0, "storage_candidates": None}, ["storage_sketch_size=4", "nothing is stored"]),
        ({"storage_sketch_size": None, "storage_candidates": None, "storage_text": ["a"]}, ["storage_text", "is null"]),
        ({"storage_sketch_size": 9}, ["storage_sketch_size=9", "head_dim=8"]),
    ],
)
def test_refused_before_the_work(fields, words, tmp_path, capsys, monkeypatch):
    source(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("a b c")
    monkeypatch.setattr(pipeline, "copied_tensor", lambda *arguments: pytest.fail("a tensor was read"))
    assert graft(tmp_path, **{**STORAGE, **fields}) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words), told
    assert not (tmp_path / "graft").exists()


def test_a_source_without_tokenizer_is_refused(tmp_path, capsys, monkeypatch):
    save_source(tmp_path / "source")
    monkeypatch.setattr(pipeline, "copied_tensor", lambda *arguments: pytest.fail("a tensor was read"))
    assert graft(tmp_path, **STORAGE) == 2
    told = capsys.readouterr().err
    assert "storage_text=None" in told and "no tokenizer" in told and "storage_sketch_size=null" in told
    assert not (tmp_path / "graft").exists()


def plan_of(tmp_path, **fields):
    paths = {"source": str(tmp_path / "source"), "output": str(tmp_path / "graft")}
    return prepare(build_settings({**paths, "window_size": W, "eidetic_size": 4, "fading_size": 2, **fields}), True)


def test_tensors_in_memory_hold_them_too(tmp_path):
    """Evaluation's fresh graft is the one that would be written."""
    source(tmp_path)
    assert graft(tmp_path, **STORAGE) == 0
    tensors = build_tensors(plan_of(tmp_path, **STORAGE))
    assert_same(sketches_in(tmp_path / "graft"), {name: value for name, value in tensors.items() if SKETCH in name})


def test_measured_layers_are_sketched_after_the_choice(tmp_path):
    save_reader(tmp_path / "source")
    measured = {"layers": "measured", "measured_layers": 1, "measured_tokens": 96}
    plan = with_measured_layers(plan_of(tmp_path, **measured, **STORAGE))
    chosen = plan.ranking["chosen"]
    assert {int(name.split(".")[2]) for name in plan.sketches[0]} == set(chosen) and len(chosen) == 1
    assert plan.shapes.keys() >= plan.sketches[0].keys()


def test_training_keeps_sketches_of_a_model_that_stores(tmp_path):
    source(tmp_path)
    assert graft(tmp_path, **STORAGE) == 0
    assert run_finetune(tmp_path, source=str(tmp_path / "graft"), trainer={"max_steps": 1}) == 0
    before, after = sketches_in(tmp_path / "graft"), sketches_in(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert read_report(tmp_path / "out")["sketches"]["size"] == 4


def test_training_without_storage_leaves_them_behind(tmp_path):
    source(tmp_path)
    assert graft(tmp_path, **STORAGE) == 0
    file = tmp_path / "graft" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "storage_size": 0, "storage_candidates": None}))
    assert run_finetune(tmp_path, source=str(tmp_path / "graft"), trainer={"max_steps": 1}) == 0
    report = read_report(tmp_path / "out")
    assert sketches_in(tmp_path / "out") == {} and "sketches" not in report
    assert not any(SKETCH in name for name in report["target_tensors"])
    assert damage(tmp_path / "out", {**report, "files": {}}) is None
