"""conversion.demo end to end on a tiny random model: graft in a process of its own, load, read, answer, report."""

import re

import pytest

from conversion.demo import SENTENCES, main, read_document
from conversion.grafting.report import REPORT_FILE
from modeling_bmojo import BMojoForCausalLM
from tests.conversion.graft_sources import save_source, tiny_tokenizer


MEMORY = ("window_size=16", "fading_size=2", "fading_stride=4", "storage_size=4", "storage_candidates=8")
SETTINGS = [word for field in (*MEMORY, "storage_sketch_size=2") for word in ("--set", field)]
SETTINGS += ["--max-new-tokens", "5"]
NO_STORAGE = ("storage_size=0", "storage_candidates=null", "storage_sketch_size=null", "fading_mass=false")


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    """Where transformers would put downloads and copies of loaded code."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "home" / "modules"))


def test_demo_reads_answers_and_shows_what_it_drew_on(tmp_path, capfd):
    save_source(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text(" ".join("abcdefghij"[i * i % 10] for i in range(120)))
    arguments = ["--source", str(tmp_path / "source"), "--output", str(tmp_path / "graft")]
    arguments += ["--document", str(tmp_path / "text.txt"), "--question", "a b"]

    assert main([*arguments, *SETTINGS]) == 0
    shown = capfd.readouterr().out
    assert "times the window of 16" in shown and shown.count("Question: a b") == shown.count("Answer:") == 2
    assert "each key/value head fetches 4 of them" in shown and "of the votes, first of" in shown
    assert "beyond the window of 16 tokens" in shown and "do not belong there" not in shown
    window = int(re.search(r"A window of ([\d,]+) tokens", shown)[1].replace(",", ""))
    rows = [re.search(rf"\n  {name} +(.*)", shown)[1] for name in ("B'MOJO", "sliding window", "the source")]
    fast, plain, stored = (float(re.findall(r"([\d.]+) MB", row)[i]) for row, i in zip(rows, (0, 0, 1)))
    assert window > 16 and 0.8 * fast <= plain <= fast and stored == 0
    stamp = (tmp_path / "graft" / REPORT_FILE).stat().st_mtime_ns

    assert main([*arguments, *SETTINGS]) == 0
    assert (tmp_path / "graft" / REPORT_FILE).stat().st_mtime_ns == stamp, "the second run grafts again"


def test_bad_document_and_failing_graft_end_with_a_message(tmp_path, capfd):
    assert main(["--document", str(tmp_path / "absent.txt")]) == 2
    assert "absent.txt" in capfd.readouterr().err
    (tmp_path / "empty.txt").write_text(" \n")
    assert main(["--document", str(tmp_path / "empty.txt")]) == 2
    assert "is empty" in capfd.readouterr().err
    (tmp_path / "not_a_model").mkdir()
    assert main(["--source", str(tmp_path / "not_a_model"), "--output", str(tmp_path / "graft")]) == 2
    assert "config.json" in capfd.readouterr().err
    assert not (tmp_path / "graft").exists()


def test_source_without_a_chat_template_is_refused(tmp_path, capfd):
    save_source(tmp_path / "source")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "source")
    arguments = ["--source", str(tmp_path / "source"), "--output", str(tmp_path / "graft")]
    assert main([*arguments, *SETTINGS]) == 2
    assert "chat template" in capfd.readouterr().err


def test_sentences_stand_between_paragraphs_of_the_default_document_in_their_order():
    document = read_document(None)
    places = [document.index(f"\n\n{sentence}\n\n") / len(document) for sentence in SENTENCES.values()]
    assert places == sorted(places) and places[0] < 0.35 and places[-1] > 0.8
    assert document.index('The "pass" statement') > document.index('The "break" statement')


def test_without_a_storage_it_compares_all_the_same(tmp_path, capfd):
    save_source(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text(" ".join("abcdefghij"[i * i % 10] for i in range(120)))
    arguments = ["--source", str(tmp_path / "source"), "--output", str(tmp_path / "graft"), *SETTINGS]
    arguments += [word for field in (*NO_STORAGE, "eidetic_size=4") for word in ("--set", field)]
    assert main([*arguments, "--document", str(tmp_path / "text.txt"), "--question", "a b"]) == 0
    shown = capfd.readouterr().out
    assert "each key/value head fetches" not in shown
    assert "sliding window" in shown and "beyond the window of 16 tokens" in shown


def test_compiled_steps_go_without_a_storage(tmp_path, capfd, monkeypatch):
    """The words are those of plain steps; a storage is asked for in vain."""
    save_source(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text(" ".join("abcdefghij"[i * i % 10] for i in range(120)))
    arguments = ["--source", str(tmp_path / "source"), "--output", str(tmp_path / "graft"), "--max-new-tokens", "5"]
    arguments += ["--document", str(tmp_path / "text.txt"), "--question", "a b", "--set", "window_size=16", "--compile"]
    compiled, compile_regions = [], BMojoForCausalLM.compile_regions

    def by_the_plain_backend(model):
        compiled.append(model)
        compile_regions(model, backend="eager")

    monkeypatch.setattr(BMojoForCausalLM, "compile_regions", by_the_plain_backend)
    assert main(arguments) == 0
    shown = capfd.readouterr().out
    assert "There is no store" in shown and shown.count("Steps are compiled") == 2
    assert len(compiled) == 2 and compiled[0].model._regions.programs.keys() == {"bmojo", "head"}
    monkeypatch.setattr(BMojoForCausalLM, "compile_regions", lambda model: None)
    assert main(arguments) == 0
    plain = capfd.readouterr().out
    assert re.findall("Answer: .*", plain) == re.findall("Answer: .*", shown)
    assert main([*arguments[:2], "--output", str(tmp_path / "stored"), *arguments[4:], "--set", "storage_size=4"]) == 2
    assert "cannot be compiled; leave out --set storage_size=4" in capfd.readouterr().err
    assert not (tmp_path / "stored").exists()
