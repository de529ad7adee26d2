"""conversion.demo end to end on a tiny random model: graft in a process of its own, load, read, answer, report."""

import pytest

from conversion.demo import excerpt, main, read_document
from conversion.grafting.report import REPORT_FILE
from tests.conversion.graft_sources import save_source, tiny_tokenizer


SETTINGS = ["--set", "window_size=16", "--set", "eidetic_size=4", "--max-new-tokens", "5"]


@pytest.fixture(autouse=True)
def folders(monkeypatch, tmp_path):
    """Where transformers would put downloads and copies of loaded code."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "home" / "modules"))


def test_demo_reads_answers_and_shows_its_memory(tmp_path, capfd):
    save_source(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text(" ".join("abcdefghij"[i * i % 10] for i in range(120)))
    arguments = ["--source", str(tmp_path / "source"), "--output", str(tmp_path / "graft")]
    arguments += ["--document", str(tmp_path / "text.txt"), "--question", "a b"]

    assert main([*arguments, *SETTINGS]) == 0
    shown = capfd.readouterr().out
    assert "times the window of 16" in shown and "Question: a b" in shown
    for figure in ("reading", "answering", "first word", "memory", "the source"):
        assert f"\n  {figure}" in shown
    assert "Layer 0 kept 4 tokens" in shown and "Layer 1 kept 4 tokens" in shown
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


def test_default_document_ends_with_what_the_question_asks_about():
    assert read_document(None).rindex('The "pass" statement') > read_document(None).rindex('The "break" statement')


def test_excerpt_marks_the_token_on_one_line():
    assert excerpt(["a", "b", "\n", "d"], 2, around=1) == "b>>\u23ce <<d"
