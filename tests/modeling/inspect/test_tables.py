"""The tables in the documentation are those of the classes, and what a stranger enters is in them."""

import re
from pathlib import Path

import pytest
import torch

from modeling_bmojo import BMojoConfig
from modeling_bmojo.configuration_bmojo import FADING_MEMORIES, INNOVATIONS, PARTS
from modeling_bmojo.fields_bmojo import fields_with, memory
from modeling_bmojo.inspect.tables import Size, fading_table, field_table, innovation_table, part_table


DOCS = Path(__file__).resolve().parents[3] / "docs"
SHOWN = [
    ("model.md", part_table),
    ("model.md", innovation_table),
    ("model.md", fading_table),
    ("configuration.md", field_table),
]


def written(file: str, name: str) -> str:
    text = (DOCS / file).read_text(encoding="utf-8")
    between = re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", text, re.DOTALL)
    assert between, f"docs/{file} has no place for it: <!-- {name} --> and <!-- /{name} --> on lines of their own"
    return between[1]


@pytest.mark.parametrize(("file", "table"), SHOWN, ids=lambda value: getattr(value, "__name__", value))
def test_the_documentation_shows_what_the_classes_say(file, table):
    name, now = table.__name__, table()
    assert written(file, name) == now, f"docs/{file}: put this between <!-- {name} --> and <!-- /{name} -->:\n\n{now}\n"


def test_the_test_notices_another_table(monkeypatch):
    monkeypatch.setattr(INNOVATIONS["key"], "about", "something else")
    with pytest.raises(AssertionError, match=r"put this between(.|\n)*`key` \| something else"):
        test_the_documentation_shows_what_the_classes_say("model.md", innovation_table)


def test_sizes_are_written_as_the_fields_that_they_are_made_of():
    a, b, c = (Size(value, name) for value, name in ((6, "a"), (3, "b"), (2, "c")))
    for size, number, text in [
        (a + b * c, 12, "a + b * c"),
        ((a + b) * c, 18, "(a + b) * c"),
        (2 * a - 1, 11, "2 * a - 1"),
        (a - (b - c), 5, "a - (b - c)"),
        (1 + a, 7, "a + 1"),
        (a // b + 0, 2, "a / b"),
        (sum([a, b]), 9, "a + b"),
    ]:
        assert size == number and size.text == text


def test_the_tables_know_every_entry():
    assert all(f"| `{name}` |" in innovation_table() for name in INNOVATIONS)
    assert all(f"| `{name}` |" in fading_table() for name in FADING_MEMORIES)
    assert all(f"| `{part.__name__}` |" in part_table() for part in PARTS)
    rows = [row.split(" | ") for row in field_table().splitlines()]
    assert {row[0].strip("| `") for row in rows if row[3] == "yes"} == set(fields_with(BMojoConfig, results=True))
    assert {row[0].strip("| `") for row in rows if row[4] == "yes |"} == set(fields_with(BMojoConfig, live=True))


class CountedConfig(BMojoConfig):
    counted: int = memory(7)


def test_a_field_of_a_subclass_is_in_its_table():
    assert field_table(CountedConfig).splitlines()[-1] == "| `counted` | `7` | memory | yes | no |"
    assert "`counted`" not in field_table()


@pytest.fixture
def added(monkeypatch):
    """What the code under "Adding to it" in docs/model.md adds: it runs, its own assertions hold."""
    for table in (INNOVATIONS, FADING_MEMORIES):
        for name, entry in table.items():  # so that undoing restores the order too
            monkeypatch.setitem(table, name, entry)
    before = dict(INNOVATIONS), dict(FADING_MEMORIES), list(PARTS)
    text = (DOCS / "model.md").read_text(encoding="utf-8").partition("\n## Adding to it\n")[2]
    names: dict = {"__name__": "docs.model"}
    torch.manual_seed(0)
    try:
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(blocks) == 3
        for block in blocks:
            exec(compile(block, "docs/model.md", "exec"), names)
        yield names
    finally:
        for table, entries in zip((INNOVATIONS, FADING_MEMORIES), before):
            table.clear()
            table.update(entries)
        PARTS[:] = before[2]


def test_what_the_documentation_adds_enters_the_tables(added):
    rows = {row.split(" | ")[0].strip("| `"): row for row in innovation_table().splitlines()}
    assert rows["loudness"] == (
        "| `loudness` | the key's length against the longest before it | keys without positions | "
        "`loudest`: `[B]`, fp32 at least |  |"
    )
    rows = {row.split(" | ")[0].strip("| `"): row for row in fading_table().splitlines()}
    assert rows["average"] == (
        "| `average` | a moving average of the layer's input | `in_proj`, `out_proj` | "
        "`average`: `[B, hidden_size]`, fp32 at least |  |"
    )
    rows = {row.split(" | ")[0].strip("| `"): row for row in part_table(added["OpeningConfig"]()).splitlines()}
    assert rows["Opening"] == (
        "| `Opening` | The first tokens of the text. | `bmojo` |  | "
        "`opening_keys`, `opening_values`: `[B, opening_size, num_key_value_heads, head_dim]`, the model's dtype; "
        "`opening_held`: `[B, opening_size]`, int64 |"
    )
    assert "| `Opening` | The first tokens of the text. |  |  |  |" in part_table(), "without its fields, in no layer"


def test_what_the_documentation_adds_reads_pads(added):
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :7], mask[1, 11:15] = 0, 0
    fields = dict(innovation="loudness", ssm_type="average")
    model = added["BMojoForCausalLM"](added["OpeningConfig"](**added["sizes"], **fields)).double()
    for pieces in ([17, 23], [1] * 40, [20, 1, 1, 18]):
        assert added["first_difference"](model, added["ids"], mask, pieces) is None
    model.train()(added["ids"], labels=added["ids"]).loss.backward()
