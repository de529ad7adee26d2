"""Texts for measurements: a split that does not leak, sequences that do not overlap, clear refusals."""

from pydoc_data.topics import topics

import pytest
import torch

from conversion.data.texts import HELD_OUT, fingerprint, openings, pydoc_text, read_texts, sequences, token_stream
from tests.conversion.evaluation_sources import character_tokenizer


TOKENIZER = character_tokenizer()


def words_of(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def test_no_paragraph_is_in_both_parts_or_twice():
    held_out, training = words_of(pydoc_text("held_out")), words_of(pydoc_text("training"))
    assert not set(held_out) & set(training)
    assert len(set(held_out)) == len(held_out) and len(set(training)) == len(training)
    everything = {part for topic in topics.values() for part in words_of(topic)}
    assert set(held_out) | set(training) == everything
    leaks = {part for name in ("for", "while", "if") for part in words_of(topics[name])} & set(held_out)
    assert leaks, "topics quote each other: a split by topic alone would leak"
    assert pydoc_text("held_out") == pydoc_text("held_out")
    assert sum(map(len, held_out)) > 100_000 and sum(map(len, training)) > 150_000


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_topics_are_in_the_held_out_part(name):
    assert words_of(topics[name])[0] in words_of(pydoc_text("held_out"))


@pytest.mark.parametrize(("count", "firsts"), [(1, [0]), (2, [0, 9]), (3, [0, 4, 9]), (10, list(range(10)))])
def test_sequences_are_spread_over_the_stream_without_overlap(count, firsts):
    text = "".join(chr(33 + index % 90) for index in range(75))
    found = sequences(TOKENIZER, {"a": text[:40], "b": text[40:]}, 7, count)
    stream = token_stream(TOKENIZER, {"a": text[:40], "b": text[40:]})
    assert TOKENIZER.decode(stream) == text[:40] + "\n\n" + text[40:]  # 77 tokens: 11 sequences
    assert len(found) == count and all(ids.shape == (1, 7) for ids in found)
    starts = [next(i for i in range(0, 77, 7) if torch.equal(stream[i : i + 7], ids[0])) for ids in found]
    whole = [0] if count == 1 else [7 * round(index * 10 / (count - 1)) for index in range(count)]
    assert starts == whole and len(set(starts)) == count


def test_openings_are_the_first_tokens_of_each_text():
    found = openings(TOKENIZER, {"a": "abcdef", "b": "uvwxyz"}, 4)
    assert [TOKENIZER.decode(ids[0]) for ids in found] == ["abcd", "uvwx"]
    with pytest.raises(ValueError, match=r"tokens=7: a has only 6 tokens"):
        openings(TOKENIZER, {"a": "abcdef"}, 7)


def test_fingerprints_tell_texts_apart():
    one, two = torch.tensor([[1, 2, 3]]), torch.tensor([[1], [2]])
    assert fingerprint([one]) == fingerprint([one.int()]) != fingerprint([one, one])
    assert fingerprint([one[:, :1], one[:, 1:]]) != fingerprint([one]) and fingerprint([two]) != fingerprint([one])


def test_files_are_read_by_pattern(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"text {name}", encoding="utf-8")
    found = read_texts(files=[str(tmp_path / "*.txt")])
    assert list(found.values()) == ["text a", "text b"]
    assert read_texts("pydoc", names=["pass"]) == {"pass": topics["pass"]}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["builtin=None", "exactly one"]),
        ({"builtin": "pydoc", "files": ["x"]}, ["exactly one"]),
        ({"builtin": "shakespeare"}, ["'shakespeare'", "pydoc"]),
        ({"builtin": "pydoc", "names": ["pass", "ghost"]}, ["ghost"]),
        ({"builtin": "pydoc", "names": []}, ["at least one"]),
        ({"builtin": "pydoc", "split": "validation"}, ["split='validation'", "held_out"]),
        ({"files": "book.txt"}, ["must be a list"]),
        ({"files": []}, ["must be a list"]),
        ({"files": ["absent*.txt"]}, ["absent*.txt", "no file"]),
        ({"files": ["absent.txt"], "names": ["pass"]}, ["topics", "builtin"]),
        ({"files": ["empty.txt"]}, ["empty.txt", "is empty"]),
        ({"files": ["latin.txt"]}, ["latin.txt", "UTF-8"]),
    ],
)
def test_bad_texts_are_refused(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError) as error:
        read_texts(**options)
    assert all(word in str(error.value) for word in words), error.value


def test_too_little_text_says_how_much_there_is():
    with pytest.raises(ValueError, match=r"has 20 tokens, which is 2 sequences of 8"):
        sequences(TOKENIZER, {"a": "x" * 20}, 8, 3)
