"""conversion.evaluate end to end on a tiny model: the table, its store, interruptions, refusals."""

import json
import os
import shutil
import sys

import pytest
import torch
import yaml

from conversion.common.nll import mean_and_error
from conversion.evaluate import main
from conversion.evaluation import baselines
from conversion.evaluation import job as evaluation
from conversion.evaluation import store as evaluation_store
from conversion.evaluation.baselines import ROWS, Row
from conversion.evaluation.report import summarise
from conversion.evaluation.settings import KNOWN_KEYS, load_evaluation
from tests.conversion.evaluation_sources import READER, character_tokenizer, save_reader
from tests.conversion.graft_sources import graft, randomised


SETTINGS = {
    "tokens": 160,
    "texts": 2,
    "chunk": 64,
    "passkey_lengths": [180],
    "passkey_depths": [0.0, 1.0],
    "greedy_tokens": 4,
    "decode_tokens": 2,
    "window_size": 8,
    "eidetic_size": 4,
    "plot": False,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "source"
    save_reader(folder)
    return folder


def evaluate(tmp_path, given, *arguments: str, **settings) -> int:
    values = {"source": str(given), "output": str(tmp_path / "out"), **SETTINGS, **settings}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return main([str(tmp_path / "settings.yaml"), *arguments])


def stored(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "evaluation.json").read_text())


def refused(tmp_path, given, capsys, *arguments, **settings) -> str:
    capsys.readouterr()
    assert evaluate(tmp_path, given, *arguments, **settings) == 2
    assert not (tmp_path / "out").exists(), "nothing is written"
    return capsys.readouterr().err


def test_the_whole_table(tmp_path, source, capsys):
    assert graft(tmp_path, source=str(source), output="mine", window_size=16, eidetic_size=5) == 0
    capsys.readouterr()
    assert evaluate(tmp_path, source, "--graft", str(tmp_path / "mine"), plot=True) == 0
    shown, result = capsys.readouterr().out, stored(tmp_path)
    assert (tmp_path / "out" / "table.md").read_text() in shown
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    names = [row["model"] for row in result["summary"]]
    assert names[:3] == ["source", "sliding window of 8", "window + 4 sinks"] and names[-2:] == ["fresh graft", "mine"]
    assert len(names) == 9 and all("bytes of fresh graft" in name for name in names[3:5])
    assert all("bytes of mine" in name for name in names[5:7])
    window, slots = ([row[key] for row in result["summary"][3:7]] for key in ("window", "slots"))
    assert slots == [0, 4, 0, 4] and window[0] == window[1] + 4 and window[2] == window[3] + 4
    table = [line.split(" | ") for line in shown.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 9 and len({len(line) for line in table if "---" not in line[0]}) == 1
    headings = (
        "NLL inside W",
        "NLL W to 4W",
        "NLL 4W to 16W",
        "NLL beyond 16W",
        "above the source",
        "passkey beyond 4W",
    )
    assert all(heading in shown for heading in headings)
    assert result["finished"] and result["window"] == 8 and "--graft" in result["command"]
    by_name = {row["model"]: row for row in result["summary"]}
    # Inside the window all compute the same, and a window wider than the text is the source.
    inside = [row["nll"]["inside W"][0] for row in result["summary"]]
    assert inside == pytest.approx([inside[0]] * 9, abs=1e-5)
    assert by_name["mine"]["window"] == 16 and by_name["fresh graft"]["slots"] == 4
    assert by_name["source"]["equal"] is None and by_name["fresh graft"]["equal"]["inside W"][0] == 1.0
    assert by_name["fresh graft"]["passkey"]["beyond 4W"]["prompts"] == 2
    reading = result["measurements"]["fresh graft"]["reading"]["nll"]
    theirs = result["measurements"]["source"]["reading"]["nll"]
    pairs = [a["beyond W"] - b["beyond W"] for a, b in zip(reading, theirs)]
    assert by_name["fresh graft"]["above_source"] == pytest.approx(mean_and_error(pairs))


@pytest.mark.parametrize("on", ["nll", "agreement", "passkey", "cost"])
def test_each_section_alone(on, tmp_path, source, capsys):
    off = {name: name == on for name in ("nll", "agreement", "passkey", "cost")}
    assert evaluate(tmp_path, source, **off, rows=["source", "fresh"]) == 0
    shown = capsys.readouterr().out
    headings = {
        "nll": "NLL inside W",
        "agreement": "same text, of 4",
        "passkey": "passkey beyond",
        "cost": "memory, MB",
    }
    assert [name for name, heading in headings.items() if heading in shown] == [on]


def test_measuring_goes_on_where_it_stopped(tmp_path, source, capsys, monkeypatch):
    real, calls = evaluation._measure, []

    def until_the_third(job, row, model, section, store):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append((row.name, section))
        return real(job, row, model, section, store)

    options = {"passkey": False, "rows": ["source", "window", "fresh"]}
    monkeypatch.setattr(evaluation, "_measure", until_the_third)
    assert evaluate(tmp_path, source, **options) == 130
    assert "--reuse" in capsys.readouterr().err
    partial = stored(tmp_path)
    assert not partial["finished"] and set(partial["measurements"]) == {"source", "sliding window of 8"}

    again = []
    monkeypatch.setattr(evaluation, "_measure", lambda *a: again.append((a[1].name, a[3])) or real(*a))
    assert evaluate(tmp_path, source, **options) == 2, "an evaluation is not replaced unasked"
    assert "--reuse" in capsys.readouterr().err
    assert evaluate(tmp_path, source, "--reuse", **options) == 0
    assert again == [("sliding window of 8", "cost"), ("fresh graft", "reading"), ("fresh graft", "cost")]
    assert stored(tmp_path)["measurements"]["source"] == partial["measurements"]["source"]

    # Complete: nothing is measured, no model is built. A setting that matters: only what it touches.
    again.clear()
    monkeypatch.setattr(baselines, "assembled", None)
    assert evaluate(tmp_path, source, "--reuse", **options) == 0 and again == []
    monkeypatch.undo()
    monkeypatch.setattr(evaluation, "_measure", lambda *a: again.append((a[1].name, a[3])) or real(*a))
    assert evaluate(tmp_path, source, "--reuse", "--set", "decode_tokens=3", **options) == 0
    assert [section for _, section in again] == ["cost"] * 3
    again.clear()
    assert evaluate(tmp_path, source, "--reuse", "--set", "eidetic_size=5", "--set", "decode_tokens=3", **options) == 0
    assert again == [("fresh graft", "reading"), ("fresh graft", "cost")]


def test_agreement_is_measured_again_with_another_source(tmp_path, source):
    """The row of a graft is made of its own folder only, but what it is compared with is the source."""
    assert graft(tmp_path, source=str(source), output="mine", window_size=8, eidetic_size=4) == 0
    options = {"rows": ["source"], "grafts": [str(tmp_path / "mine")], "passkey": False, "cost": False, "texts": 1}
    assert evaluate(tmp_path, source, **options) == 0
    before = stored(tmp_path)
    assert before["summary"][1]["equal"]["inside W"][0] == 1.0
    shutil.copytree(source, tmp_path / "other")
    other = randomised(READER)
    other.lm_head.weight.data.neg_()  # what the source finds likeliest, this one finds least likely
    other.save_pretrained(tmp_path / "other")
    assert evaluate(tmp_path, tmp_path / "other", "--reuse", **options) == 0
    after = stored(tmp_path)
    assert after["summary"][1]["equal"]["inside W"][0] == 0.0
    assert after["measurements"]["mine"]["reading"]["nll"] == before["measurements"]["mine"]["reading"]["nll"]
    # Without agreement nothing of the source is in a graft's reading.
    assert evaluate(tmp_path, source, "--overwrite", "--set", "agreement=false", **options) == 0
    key = stored(tmp_path)["measurements"]["mine"]["reading"]["key"]
    assert evaluate(tmp_path, tmp_path / "other", "--reuse", "--set", "agreement=false", **options) == 0
    assert stored(tmp_path)["measurements"]["mine"]["reading"]["key"] == key


def test_costs_of_another_machine_are_measured_again(tmp_path, source, monkeypatch):
    real, again = evaluation._measure, []
    monkeypatch.setattr(evaluation, "_measure", lambda *a: again.append(a[3]) or real(*a))
    options = {"rows": ["source"], "agreement": False, "passkey": False, "texts": 1}
    assert evaluate(tmp_path, source, **options) == 0
    assert evaluate(tmp_path, source, "--reuse", **options) == 0 and again == ["reading", "cost"]
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert evaluate(tmp_path, source, "--reuse", **options) == 0 and again[2:] == ["cost"]
    monkeypatch.setattr(evaluation_store, "_processor", lambda: "another processor")
    assert evaluate(tmp_path, source, "--reuse", **options) == 0 and again[2:] == ["cost", "cost"]
    result = stored(tmp_path)
    measured = result["measurements"]["source"]
    assert measured["cost"]["machine"] == result["machine"] and result["machine"]["threads"] == threads + 1
    assert measured["reading"]["machine"]["threads"] == threads, "which was made before"


def test_chunks_change_no_figure(tmp_path, source):
    summaries = []
    for chunk in (16, 512):
        assert evaluate(tmp_path, source, "--overwrite", chunk=chunk, cost=False) == 0
        summaries.append(stored(tmp_path)["summary"])
    for one, other in zip(*summaries):
        assert one["nll"]["beyond W"] == pytest.approx(other["nll"]["beyond W"], abs=1e-5)
        assert one["passkey"]["beyond 4W"]["nll"] == pytest.approx(other["passkey"]["beyond 4W"]["nll"], abs=1e-4)
        assert one["equal"] == other["equal"]


def test_a_graft_may_be_evaluated_with_other_memories(tmp_path, source):
    assert graft(tmp_path, source=str(source), output="mine", window_size=16) == 0
    entry = {"folder": str(tmp_path / "mine"), "name": "narrow", "window_size": 8, "eidetic_size": 4, "fading_size": 1}
    options = {"grafts": [entry], "passkey": False, "cost": False, "rows": ["source", "fresh"]}
    assert evaluate(tmp_path, source, **options) == 0
    card = (tmp_path / "mine" / "README.md").read_text()
    assert evaluate(tmp_path, source, "--reuse", cards=True, **options) == 0
    told, table = (tmp_path / "mine" / "README.md").read_text(), (tmp_path / "out" / "table.md").read_text()
    assert told.startswith(card.rstrip()) and told.count("## Measured") == told.count(table.strip()) == 1
    assert evaluate(tmp_path, source, "--overwrite", "--set", "texts=1", cards=True, **options) == 0
    again = (tmp_path / "mine" / "README.md").read_text()
    assert again.count("## Measured") == 1 and table.strip() not in again
    fresh, narrow = stored(tmp_path)["summary"][1:]
    assert narrow["model"] == "narrow" and narrow["window"] == 8
    assert narrow["nll"]["beyond W"] == pytest.approx(fresh["nll"]["beyond W"], abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tokenz": 8}, ["tokenz", "did you mean 'tokens'"]),
        ({"hidden_size": 8}, ["hidden_size", "no such setting"]),
        ({"tokens": 510}, ["tokens=510", "512 positions"]),
        ({"passkey_lengths": [600]}, ["passkey_lengths", "512 positions"]),
        ({"passkey_lengths": [40]}, ["no room"]),
        ({"passkey_depths": [1.5]}, ["passkey_depths=[1.5]"]),
        ({"texts": 10**7}, ["texts=10000000", "sequences of 160"]),
        ({"files": ["absent*.txt"]}, ["absent*.txt", "no file"]),
        ({"files": ["x"], "builtin": "pydoc"}, ["exactly one"]),
        ({"topics": ["pass"], "tokens": 400}, ["pass has only"]),
        ({"rows": ["source", "magic"]}, ["'magic'", *ROWS]),
        ({"rows": []}, ["nothing to compare"]),
        ({"sinks": 500}, ["sinks=500", "no window is left"]),
        ({"rows": ["fresh"]}, ["agreement is with the source"]),
        ({"nll": False, "agreement": False, "passkey": False, "cost": False}, ["nothing to measure"]),
        ({"nll": "yes"}, ["nll='yes'", "bool"]),
        ({"chunk": 0}, ["chunk=0"]),
        ({"texts": 1.5}, ["texts=1.5", "int"]),
        ({"dtype": "int8"}, ["dtype='int8'"]),
        ({"device": "tpu"}, ["device='tpu'"]),
        ({"layers": "measured"}, ["layers='measured'", "conversion.graft"]),
        ({"layers": [7]}, ["layers=[7]"]),
        ({"ssm_init": "magic"}, ["ssm_init='magic'", "attention"]),
        ({"window_size": 0}, ["window_size=0"]),
        ({"source": "absent"}, ["absent"]),
        ({"grafts": "x"}, ["grafts='x'", "list"]),
        ({"grafts": ["absent"]}, ["'absent'", "no config.json"]),
        ({"grafts": [{"folder": "x", "hidden_size": 3}]}, ["hidden_size"]),
        ({"grafts": [{"name": "x"}]}, ["folder"]),
        ({"grafts": ["a/x", "b/x"]}, ["distinct"]),
    ],
    ids=str,
)
def test_bad_settings_are_refused_before_any_work(settings, words, tmp_path, source, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "run", None)
    message = refused(tmp_path, source, capsys, **settings)
    assert all(word in message for word in words), message


def test_grafts_that_do_not_fit_are_refused(tmp_path, source, capsys):
    message = refused(tmp_path, source, capsys, grafts=[str(source)])
    assert "'llama' model" in message
    wide = tmp_path / "wide"
    save_reader(wide, type(READER)(**{**READER.to_dict(), "vocab_size": 128}))
    assert graft(tmp_path, source=str(wide), output="other") == 0
    assert "vocabulary of 128 tokens" in refused(tmp_path, source, capsys, grafts=[str(tmp_path / "other")])
    assert graft(tmp_path, source=str(source), output="mine") == 0
    tokenizer = character_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "mine")
    assert "other tokens" in refused(tmp_path, source, capsys, grafts=[str(tmp_path / "mine")])
    (tmp_path / "mine" / "model.safetensors").unlink()
    assert "no safetensors weights" in refused(tmp_path, source, capsys, grafts=[str(tmp_path / "mine")])


def test_a_source_that_cannot_read_is_refused(tmp_path, source, capsys):
    shutil.copytree(source, tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mute" / name).unlink()
    assert "no tokenizer" in refused(tmp_path, tmp_path / "mute", capsys)


def test_no_matplotlib_no_diagram(tmp_path, source, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refused(tmp_path, source, capsys, plot=True)
    assert evaluate(tmp_path, source, rows=["source"], passkey=False, cost=False) == 0
    assert not (tmp_path / "out" / "evaluation.png").exists()


def test_outputs_of_others_are_left_alone(tmp_path, source, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert evaluate(tmp_path, source, "--overwrite") == 2
    assert "is no evaluation" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    assert evaluate(tmp_path, source, "--output", str(tmp_path / "settings.yaml")) == 2
    assert "is a file" in capsys.readouterr().err


def test_a_single_text_has_no_standard_error(tmp_path, source, capsys):
    assert evaluate(tmp_path, source, texts=1, rows=["source", "sinks"], passkey=False, cost=False) == 0
    assert "\u00b1" not in capsys.readouterr().out.split("NLL in nats")[0]


def summary_of(nll: dict[str, list[float]]) -> dict[str, dict]:
    """Figures by kind from the NLL beyond W of each text."""
    rows = [Row(f"row {kind}", kind, 8, 0, {}, None) for kind in nll]
    measured = {f"row {kind}": {"reading": {"nll": [{"beyond W": x} for x in values]}} for kind, values in nll.items()}
    sections = {"nll": True, "agreement": False, "passkey": False, "cost": False}
    return {row["kind"]: row for row in summarise(rows, measured, 8, sections)}


def test_gap_closed_is_a_share_of_the_way_from_sinks_to_source():
    figures = summary_of({"source": [2.0, 3.0], "window": [2.8, 3.8], "sinks": [2.4, 3.4], "fresh": [2.1, 3.1]})
    shares = {kind: row["gap_closed"] for kind, row in figures.items()}
    assert shares == pytest.approx({"source": 1.0, "window": -1.0, "sinks": 0.0, "fresh": 0.75})
    assert figures["fresh"]["above_source"] == pytest.approx((0.1, 0.0))
    assert figures["fresh"]["nll"]["beyond W"] == pytest.approx((2.6, 0.5))
    assert summary_of({"source": [2.0], "sinks": [2.0], "fresh": [1.0]})["fresh"]["gap_closed"] is None
    assert "gap_closed" not in summary_of({"source": [2.0], "fresh": [1.0]})["fresh"]
    assert "above_source" not in summary_of({"sinks": [2.0], "fresh": [1.0]})["fresh"]


def test_settings_are_known_and_documented(source, tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"source": str(source), "output": "x"}))
    settings = load_evaluation(tmp_path / "s.yaml")
    assert settings.builtin == "pydoc" and settings.rows == list(ROWS)
    assert set(settings.as_dict()) - {"memory"} <= set(KNOWN_KEYS)


def test_weights_that_were_made_anew_are_the_same(tmp_path, source, monkeypatch):
    """A result that came with the documentation goes on wherever source and graft can be made again."""
    assert graft(tmp_path, source=str(source), output="mine", window_size=8, eidetic_size=4) == 0
    options = {"rows": ["source"], "grafts": [str(tmp_path / "mine")], "agreement": False, "passkey": False, "texts": 1}
    options["cost"] = False
    assert evaluate(tmp_path, source, **options) == 0
    shutil.rmtree(tmp_path / "mine")
    assert graft(tmp_path, source=str(source), output="mine", window_size=8, eidetic_size=4) == 0
    for file in source.iterdir():
        os.utime(file, (1, 1))
    real, again = evaluation._measure, []
    monkeypatch.setattr(evaluation, "_measure", lambda *a: again.append(a[1].name) or real(*a))
    assert evaluate(tmp_path, source, "--reuse", **options) == 0 and again == []
    # Weights of the same size and date that say something else are others.
    assert graft(tmp_path, source=str(source), output="other", window_size=8, eidetic_size=4, seed=1) == 0
    before, after = (next((tmp_path / name).glob("*.safetensors")) for name in ("mine", "other"))
    date = before.stat().st_mtime_ns
    assert before.stat().st_size == after.stat().st_size and before.read_bytes() != after.read_bytes()
    before.write_bytes(after.read_bytes())
    os.utime(before, ns=(date, date))
    assert evaluate(tmp_path, source, "--reuse", **options) == 0 and again == ["mine"]
