"""configs/peft/data: the shipped chats are what their README says, and nothing held out was trained on."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest


FOLDER = Path(__file__).resolve().parents[3] / "configs" / "peft" / "data"
WINDOW = 512  # of the default graft
FORM = re.compile(r"(?P<body>.+) In short: (?P<gist>[^.]+)\.")
# A sentence ends with a full stop that no digit follows (3.14), maybe behind a quotation mark.
SENTENCE_END = re.compile(r"\.(?!\d)")


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"short-answers-{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("train", {"question": 163, "two questions": 25, "notes": 24}), ("held-out", {"question": 24, "notes": 4})],
)
def test_rows(name, kinds):
    found = rows(name)
    assert Counter(row["kind"] for row in found) == kinds
    for row in found:
        assert set(row) == {"kind", "topics", "messages"}
        turns = 2 if row["kind"] == "two questions" else 1
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * turns
        assert len(row["topics"]) == turns
        for message in row["messages"][1::2]:
            form = FORM.fullmatch(message["content"])
            assert form and len(SENTENCE_END.findall(form["body"])) == 2, message
            assert form["body"].endswith(".") and len(form["gist"].split()) <= 7, message
    text = (FOLDER / "README.md").read_text()
    assert f"`short-answers-{name}.jsonl` | {len(found)} |" in text and "CC0" in text


def test_no_topic_is_in_both_files():
    train, held_out = ({topic for row in rows(name) for topic in row["topics"]} for name in ("train", "held-out"))
    assert (len(train), len(held_out)) == (163, 24) and not train & held_out
    answers = [
        {message["content"] for row in rows(name) for message in row["messages"]} for name in ("train", "held-out")
    ]
    assert not answers[0] & answers[1]


def test_pages_of_notes_hold_the_answer_and_do_not_fit_the_window():
    for row in rows("train") + rows("held-out"):
        if row["kind"] != "notes":
            continue
        page, answer = (message["content"] for message in row["messages"])
        assert FORM.fullmatch(answer)["body"] in page
        # A token is a word, a part of one or a mark, never more than a word.
        assert len(re.findall(r"\w+|[^\w\s]", page)) > WINDOW


def test_it_is_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 200_000
