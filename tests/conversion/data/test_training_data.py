"""Data for training: every kind of source, what of it is trained on, what is held out, and what is refused."""

import json

import datasets
import pytest

from conversion.common.files import sha256
from conversion.data import rows as training_data
from conversion.data.packing import IGNORED
from conversion.data.rows import SAMPLE, _Rows, build_data
from conversion.data.settings import DataSettings
from tests.conversion.graft_sources import tiny_tokenizer
from tests.conversion.training_setup import letters, write_rows, write_text


TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
MARKED = (
    "{% for message in messages %}<s> {{ message['role'] }} {% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] }} </s>{% endgeneration %} {% else %}{{ message['content'] }} </s> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
CHAT = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c d"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "f"},
]


@pytest.fixture(autouse=True)
def caches_vanish(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def build(loss_from=0, tokenizer=TOKENIZER, seed=0, **settings):
    return build_data(DataSettings(**{"sequence_length": 16, "held_out": 0, **settings}), tokenizer, loss_from, seed)


def words(row, key="input_ids"):
    """A row as text; tokens that are not trained on as dots."""
    return " ".join("." if value == IGNORED else TOKENIZER.convert_ids_to_tokens(value) for value in row[key])


# Sources -----------------------------------------------------------------------------------------------------------
def test_files_of_every_kind_give_the_same_rows(tmp_path):
    texts = [letters(20 + index, seed=index) for index in range(5)]
    (tmp_path / "texts").mkdir()
    for index, text in enumerate(texts):
        (tmp_path / "texts" / f"{index}.{'md' if index % 2 else 'txt'}").write_text(text)
    table = datasets.Dataset.from_dict({"number": list(range(5)), "body": texts})
    table.to_parquet(str(tmp_path / "table.parquet"))
    table.to_csv(str(tmp_path / "table.csv"))
    table.to_json(str(tmp_path / "table.jsonl"))
    expected = build(files=str(tmp_path / "texts" / "*"), packing="concatenate").train
    assert len(expected) == (sum(20 + index for index in range(5)) + 5) // 16
    for name in ("table.parquet", "table.csv", "table.jsonl"):
        found = build(files=[str(tmp_path / name)], text_column="body", packing="concatenate").train
        assert found.to_list() == expected.to_list()
    mixed = build(files=[str(tmp_path / "texts" / "0.txt"), str(tmp_path / "table.csv")], text_column="body").train
    assert sum(len(row["input_ids"]) for row in mixed) == 21 + sum(21 + index for index in range(5))


def test_hub_data_sets_also_as_a_stream(tmp_path):
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "train.jsonl", [{"text": letters(30, seed)} for seed in range(8)])
    whole = build(hub=str(tmp_path / "set"), packing="concatenate").train
    data = build(hub=str(tmp_path / "set"), packing="concatenate", streaming=True, held_out=2)
    streamed = list(data.train)
    assert {row["row"] for row in streamed} == set(range(6 * 31 // 16))
    assert len(data.evaluation) == 2 * 31 // 16
    rows = [row["input_ids"] for row in whole]
    assert data.evaluation[0]["input_ids"] == rows[0] and streamed[0].keys() == whole[0].keys()
    again = build(hub=str(tmp_path / "set"), packing="concatenate", streaming=True, held_out=2)
    assert list(again.train) == streamed


@pytest.fixture
def small_groups(monkeypatch):
    """Documents of 1,000 tokens that are packed together ten at a time; yields the sizes of the groups."""
    sizes, pack = [], _Rows._pack
    monkeypatch.setattr(training_data, "GROUP_BYTES", 20_200)
    monkeypatch.setattr(
        _Rows, "_pack", lambda self, *given, **more: sizes.append(len(given[1])) or pack(self, *given, **more)
    )
    return sizes


def test_of_a_stream_little_is_read_before_training_and_nothing_twice(monkeypatch, small_groups):
    read = []

    def books():
        for seed in range(300):
            read.append(seed)
            yield {"text": letters(1000, seed)}

    stream = datasets.IterableDataset.from_generator(books)
    monkeypatch.setattr(training_data, "read_hub", lambda data: stream)
    data = build(hub="books", packing="concatenate", streaming=True, held_out=3, shuffle_buffer=1)
    assert read == list(range(3 + SAMPLE)) and small_groups == [10, 3]
    assert next(iter(data.train))["row"] == 0
    assert len(read) < 3 + SAMPLE + 25 and small_groups == [10, 3, 10]


def test_a_stream_is_read_until_a_row_counts(tmp_path):
    (tmp_path / "set").mkdir()
    rows = [{"text": letters(size, size)} for size in [3] * 20 + [15]]
    write_rows(tmp_path / "set" / "train.jsonl", rows)
    options = dict(hub=str(tmp_path / "set"), packing="none", streaming=True)
    (row,) = build(8, **options).train
    assert len(row["input_ids"]) == 16
    write_rows(tmp_path / "set" / "train.jsonl", rows[:-1])
    refuse("no token of the training text counts", loss_from=8, **options)
    refuse("shorter than one sequence", sequence_length=100, **{**options, "packing": "concatenate"})


def test_large_documents_are_packed_few_at_a_time(tmp_path, small_groups):
    write_rows(tmp_path / "a.jsonl", [{"text": letters(1000, seed), "other": "x" * 9000} for seed in range(25)])
    rows = build(files=str(tmp_path / "a.jsonl"), packing="concatenate").train
    assert max(small_groups) == 10 and sum(small_groups) == 25
    assert len(rows) == 2 * (10 * 1001 // 16) + 5 * 1001 // 16


def test_a_change_in_the_middle_of_a_large_file_is_noticed(tmp_path):
    text = bytearray(b"a b c d " * 2**19)
    prints = []
    for letter in b"ae":
        text[len(text) // 2] = letter
        (tmp_path / "a.txt").write_bytes(text)
        prints.append(sha256(tmp_path / "a.txt"))
    assert prints[0] != prints[1]


def test_rows_are_numbered_and_end_with_the_end_token(tmp_path):
    (tmp_path / "a.txt").write_text("a b c")
    rows = build(files=str(tmp_path / "a.txt")).train.to_list()
    assert [row["row"] for row in rows] == [0]
    assert words(rows[0]) == "a b c </s>" and words(rows[0], "labels") == ". b c </s>"
    assert words(build(files=str(tmp_path / "a.txt"), append_eos=False).train[0]) == "a b c"


@pytest.mark.parametrize("loss_from", [0, 1, 5, 14])
@pytest.mark.parametrize("packing", ["documents", "concatenate", "none"])
def test_only_positions_that_count_have_labels(packing, loss_from, tmp_path):
    files = write_text(tmp_path, documents=3, tokens=40)
    rows = build(loss_from, files=files, packing=packing).train
    assert len(rows)
    for row in rows:
        counted = [position - 1 for position, label in zip(row["position_ids"], row["labels"]) if label != IGNORED]
        assert counted and min(counted) >= loss_from


def test_rows_in_which_nothing_counts_are_left_out(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": letters(size, size)} for size in (3, 12, 5, 15)])
    kept = build(8, files=str(tmp_path / "a.jsonl"), packing="none").train
    assert [len(row["input_ids"]) for row in kept] == [13, 16] and [row["row"] for row in kept] == [0, 1]


# Held-out text -----------------------------------------------------------------------------------------------------
def test_documents_are_held_out_whole_and_the_same_ones_every_time(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"text": letters(12, seed)} for seed in range(20)])
    data = build(files=str(tmp_path / "a.jsonl"), packing="none", held_out=0.25)
    train, held_out = ({tuple(row["input_ids"]) for row in rows} for rows in (data.train, data.evaluation))
    assert (len(train), len(held_out)) == (15, 5) and not train & held_out
    again = build(files=str(tmp_path / "a.jsonl"), packing="none", held_out=0.25)
    assert again.evaluation.to_list() == data.evaluation.to_list()
    other = build(files=str(tmp_path / "a.jsonl"), packing="none", held_out=0.25, seed=1)
    assert other.evaluation.to_list() != data.evaluation.to_list()


def test_of_a_single_document_the_last_rows_are_held_out(tmp_path):
    files = write_text(tmp_path, documents=1, tokens=159)
    data = build(files=files, packing="concatenate", held_out=0.2)
    assert (len(data.train), len(data.evaluation)) == (8, 2)
    (text,) = TOKENIZER([letters(159)])["input_ids"]
    assert [token for row in data.evaluation for token in row["input_ids"]] == [*text, EOS][128:]


def test_eval_files_and_the_number_of_rows_to_evaluate(tmp_path):
    train, other = write_text(tmp_path / "a"), write_text(tmp_path / "b", documents=1, tokens=300)
    data = build(files=train, eval_files=other, packing="concatenate", eval_sequences=4)
    assert len(data.evaluation) == 4 and len(data.files) == 7
    assert data.evaluation["row"][0] == 0 and data.evaluation["row"][3] == 17  # spread over all 18 rows


def paragraphs(texts):
    blocks = (" ".join(block.split()) for text in texts for block in text.split("\n\n"))
    return {block for block in blocks if block}


def test_built_in_text_is_never_evaluated_on_what_was_trained_on(monkeypatch):
    """By paragraphs, because Python's topics quote each other."""
    seen = []
    build_rows = _Rows.build
    monkeypatch.setattr(
        _Rows, "build", lambda self, rows, kind: seen.append(rows["text"]) or build_rows(self, rows, kind)
    )
    data = build(builtin="pydoc", held_out=0.05, eval_sequences=3)
    assert len(data.evaluation) == 3 and len(seen[0]) > 20
    assert not paragraphs(seen[0]) & paragraphs(seen[1])
    assert build(builtin="pydoc").evaluation is None


# Chats -------------------------------------------------------------------------------------------------------------
def chat_file(tmp_path, *chats):
    return write_rows(tmp_path / "chat.jsonl", [{"talk": chat} for chat in chats])


def with_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [TOKENIZER.chat_template, MARKED], ids=["by prefix", "marked"])
def test_only_answers_are_trained_on(template, tmp_path):
    options = dict(files=chat_file(tmp_path, CHAT), messages="talk", packing="none", sequence_length=32)
    row = build(tokenizer=with_template(template), **options).train[0]
    assert words(row) == "<s> user a b </s> <s> assistant c d </s> <s> user e </s> <s> assistant f </s>"
    assert words(row, "labels") == ". . . . . . . c d </s> . . . . . . f </s>"
    everything = build(tokenizer=with_template(template), loss_on="all", **options).train[0]
    assert words(everything, "labels") == ". " + words(row).partition(" ")[2]


def test_prompts_and_completions(tmp_path):
    files = write_rows(tmp_path / "pairs.jsonl", [{"q": "a b", "r": "c d"}, {"q": "e", "r": ""}])
    options = dict(files=files, prompt="q", completion="r", packing="none")
    (row,) = build(**options).train
    assert (words(row), words(row, "labels")) == ("a b c d </s>", ". . c d </s>")
    assert words(build(loss_on="all", **options).train[0], "labels") == ". b c d </s>"
    chats = write_rows(tmp_path / "chats.jsonl", [{"q": CHAT[:3], "r": CHAT[3:]}])
    (row,) = build(files=chats, prompt="q", completion="r", packing="none", sequence_length=32).train
    assert words(row, "labels").replace(". ", "") == "f </s>"


def test_chats_are_packed_like_other_documents(tmp_path):
    files = chat_file(tmp_path, CHAT[:2], CHAT[2:], CHAT[:2])
    rows = build(files=files, messages="talk", sequence_length=32).train.to_list()
    assert len(rows) == 1 and [p for p in rows[0]["position_ids"] if p == 0] == [0, 0, 0]


# Refusals ------------------------------------------------------------------------------------------------------------
def refuse(pattern, **settings):
    with pytest.raises(ValueError, match=pattern):
        build(**settings)


def test_files_that_are_missing_or_of_no_known_kind(tmp_path):
    refuse("matches no file", files=str(tmp_path / "*.txt"))
    (tmp_path / "a.pdf").write_text("a")
    refuse(r"'.*a\.pdf' is of no kind that is read; known: \.txt", files=str(tmp_path / "a.pdf"))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"\n{{{')
    refuse(r"bad\.jsonl cannot be read", files=str(tmp_path / "bad.jsonl"))
    refuse("nowhere/at-all' cannot be read", hub="nowhere/at-all")


def test_empty_files(tmp_path):
    (tmp_path / "a.txt").write_text("   \n")
    refuse("shorter than one sequence|is empty", files=str(tmp_path / "a.txt"))
    (tmp_path / "b.csv").write_text("text\n")
    refuse(r"b\.csv cannot be read, or is empty", files=str(tmp_path / "b.csv"))


def test_unknown_columns(tmp_path):
    files = write_rows(tmp_path / "a.jsonl", [{"body": "a b", "id": 1}])
    refuse(r"no column 'text'; the training data \(.*a\.jsonl\) has body, id\.", files=files)
    refuse("no column 'talk'", files=files, messages="talk")
    refuse("no column 'q', 'r'", files=files, prompt="q", completion="r")
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "train.jsonl", [{"body": "a b"}])
    refuse(r"no column 'text'; the training data \(.*set\) has body\.", hub=str(tmp_path / "set"), streaming=True)
    other = write_rows(tmp_path / "b.jsonl", [{"text": "a b"}])
    refuse(r"the held-out data \(.*a\.jsonl\) has body, id\.", files=other, eval_files=files)


def test_too_little_text(tmp_path):
    files = write_text(tmp_path, documents=1, tokens=10)
    refuse("shorter than one sequence of 16 tokens", files=files, packing="concatenate")
    assert len(build(files=files).train) == 1
    refuse("no token of the training text counts", files=files, loss_from=12)
    refuse("no position of a sequence would count", files=files, loss_from=15)
    long = write_text(tmp_path / "long", documents=1, tokens=100)
    refuse("the held-out text is shorter", files=long, eval_files=files, packing="concatenate")
    refuse("leaves nothing to hold out", files=write_text(tmp_path / "one", 1, 16), packing="concatenate", held_out=0.1)


@pytest.mark.parametrize("value", [None, 3, ["a"]])
def test_rows_without_the_needed_field_are_named(value, tmp_path):
    table = [{"text": "a b", "other": "x"}, {"text": None, "other": "y"}]
    files = write_rows(tmp_path / "a.jsonl", table)
    refuse(r"row 2 of '.*a\.jsonl' .*: its 'text' is missing, must be str; the row has other\. Correct", files=files)
    if value is not None:
        refuse(
            r"row 1 of '.*b\.jsonl' \(the first is 1\): its 'text' is (int|list), must be str; the row has text\.",
            files=write_rows(tmp_path / "b.jsonl", [{"text": value}]),
        )


@pytest.mark.parametrize("bad", range(0, 9, 2))
def test_a_faulty_row_is_named_by_its_file_wherever_the_split_puts_it(bad, tmp_path):
    """Held-out rows are drawn at random, and rows of other files come before."""
    rows = [{"text": letters(12, seed), "id": seed} for seed in range(9)]
    rows[bad]["text"] = None
    (tmp_path / "0.txt").write_text("a b")
    parts = {"1.jsonl": rows[:4], "2.jsonl": rows[4:]}
    files = [str(tmp_path / "*.txt"), *(write_rows(tmp_path / name, part) for name, part in parts.items())]
    name, number = ("1.jsonl", bad + 1) if bad < 4 else ("2.jsonl", bad - 3)
    refuse(rf"row {number} of '.*{name}' .*: its 'text' is missing", files=files[1:], held_out=0.4)
    refuse(rf"row {number} of '.*{name}' ", files=files[:1], eval_files=files[1:])


def test_a_faulty_row_of_a_stream_is_named_by_its_number(tmp_path):
    (tmp_path / "set").mkdir()
    table = [{"text": None if index == 5 else letters(12, index)} for index in range(8)]
    write_rows(tmp_path / "set" / "train.jsonl", table)
    for held_out in (0, 2):
        with pytest.raises(ValueError, match=r"data row 6 \(the first is 1\): its 'text' is missing"):
            list(build(hub=str(tmp_path / "set"), streaming=True, held_out=held_out).train)
    refuse(r"data row 6 \(the first is 1\)", hub=str(tmp_path / "set"), streaming=True, held_out=7)
    refuse(r"data row 6 \(the first is 1\)", hub=str(tmp_path / "set"), held_out=0.5)


def test_chats_that_are_none(tmp_path):
    refuse(r"row 1 of .*: its 'talk' is str, must be list", files=chat_file(tmp_path, "hello"), messages="talk")
    files = chat_file(tmp_path, [{"role": "user", "text": "a"}])
    refuse("is no message; each needs a role and a content", files=files, messages="talk")
    files = chat_file(tmp_path, CHAT, [{"role": "user"}])  # Arrow fills in the content: None
    refuse(r"row 2 of .*is no message; each needs a role and a content", files=files, messages="talk")
    tokenizer = with_template(None)
    refuse("has no chat template", files=chat_file(tmp_path, CHAT), messages="talk", tokenizer=tokenizer)
    moody = with_template("{{ messages | length }} {% for m in messages %}{{ m['content'] }} {% endfor %}")
    moody.add_tokens(["2", "4"])
    refuse("changes what it wrote before", files=chat_file(tmp_path, CHAT), messages="talk", tokenizer=moody)
    assert json.dumps(CHAT)
