"""Packing: every token once, no row too long, nothing seen across documents, and what counts in the loss."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conversion.data.packing import IGNORED, Collator, concatenate, count_from, cut, pack_documents, single
from conversion.training.alignment import document_groups, run_teacher
from modeling_bmojo import BMojoConfig, BMojoForCausalLM
from tests.tiny import SIZES


def documents(sizes):
    """Documents of distinct tokens, all of them trained on."""
    start, found = 1, []
    for size in sizes:
        ids = list(range(start, start + size))
        found.append((ids, [IGNORED, *ids[1:]]))
        start += size
    return found


SIZES_OF_DOCUMENTS = st.lists(st.integers(1, 30), max_size=12)


@given(SIZES_OF_DOCUMENTS, st.integers(2, 12))
def test_packed_rows_hold_every_token_once_and_restart_at_documents(sizes, length):
    given_ids = [token for ids, _ in documents(sizes) for token in ids]
    rows = pack_documents(documents(sizes), length)
    packed = sorted(token for row in rows for token in row["input_ids"])
    # Only the single token that a cut leaves at the end of a document may go.
    dropped = set(given_ids) - set(packed)
    assert len(packed) == len(set(packed)) and set(packed) <= set(given_ids)
    assert len(dropped) == sum(size > length and size % length == 1 for size in sizes)
    for row in rows:
        assert len({len(value) for value in row.values()}) == 1 and 0 < len(row["input_ids"]) <= length
        for index, position in enumerate(row["position_ids"]):
            starts = position == 0
            # Within a document tokens follow each other, and the first is not predicted.
            assert row["labels"][index] == (IGNORED if starts else row["input_ids"][index])
            if not starts:
                assert position == row["position_ids"][index - 1] + 1
                assert row["input_ids"][index] == row["input_ids"][index - 1] + 1


@given(SIZES_OF_DOCUMENTS, st.integers(2, 12))
def test_two_packed_rows_would_not_fit_into_one(sizes, length):
    used = sorted(len(row["input_ids"]) for row in pack_documents(documents(sizes), length))
    assert len(used) < 2 or used[0] + used[1] > length


@given(SIZES_OF_DOCUMENTS, st.integers(2, 12))
def test_concatenated_rows_are_the_stream(sizes, length):
    stream = [token for ids, _ in documents(sizes) for token in ids]
    rows = concatenate(documents(sizes), length)
    assert [token for row in rows for token in row["input_ids"]] == stream[: len(stream) // length * length]
    firsts = {ids[0] for ids, _ in documents(sizes)}
    for row in rows:
        assert row["position_ids"] == list(range(length))
        expected = [IGNORED if place == 0 or token in firsts else token for place, token in enumerate(row["input_ids"])]
        assert row["labels"] == expected


def test_single_rows_and_cuts():
    assert single(documents([3, 9]), 5) == [
        {"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3], "position_ids": [0, 1, 2]},
        {"input_ids": [4, 5, 6, 7, 8], "labels": [IGNORED, 5, 6, 7, 8], "position_ids": [0, 1, 2, 3, 4]},
    ]
    assert cut(documents([5])[0], 4) == [([1, 2, 3, 4], [IGNORED, 2, 3, 4])]
    assert [ids for ids, _ in cut(documents([6])[0], 4)] == [[1, 2, 3, 4], [5, 6]]
    assert cut(documents([1])[0], 4) == [([1], [IGNORED])]


@pytest.mark.parametrize("first", range(5))
def test_a_label_counts_from_the_position_that_predicts_it(first):
    (row,) = pack_documents(documents([5, 3]), 8)
    counted = count_from(row, first)["labels"]
    predicted_at = [position - 1 for position, label in zip(row["position_ids"], counted) if label != IGNORED]
    assert predicted_at == [t for size in (5, 3) for t in range(size - 1) if t >= first]


def collated(rows):
    return Collator(pad=0)([{**row, "row": index} for index, row in enumerate(rows)])


def test_batches_are_padded_and_masked():
    batch = collated(pack_documents(documents([5, 3, 7]), 8))
    assert batch["input_ids"][0, -1] == 0 and batch["labels"][0, -1] == IGNORED
    assert batch["attention_mask"].tolist() == [[1] * 7 + [0], [1] * 8]
    assert batch["row"].tolist() == [0, 1]
    assert "attention_mask" not in collated(pack_documents(documents([8, 8]), 8))


@pytest.mark.parametrize("layers", [["bmojo", "bmojo"], ["full_attention", "full_attention"]])
def test_a_packed_batch_gives_every_document_alone(layers):
    """Through the model, pads and several documents per row: no attention and no state across documents."""
    torch.manual_seed(0)
    model = BMojoForCausalLM(BMojoConfig(**SIZES, layer_types=layers)).double().eval()
    sizes = [13, 1, 6, 17, 2, 9]
    texts = [([token % 61 for token in ids], labels) for ids, labels in documents(sizes)]
    batch = collated(pack_documents(texts, 20))
    assert "attention_mask" in batch and (batch["position_ids"][:, 1:] == 0).any()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}
    with torch.no_grad():
        together = run_teacher(model, inputs)
        index = document_groups(batch["position_ids"], batch["attention_mask"])
        assert sum(map(len, index)) == len(sizes)
        for places in [row for group in index for row in group]:
            places = places[places >= 0]
            alone = model.model(batch["input_ids"].flatten()[places][None], use_cache=False).last_hidden_state
            torch.testing.assert_close(together.flatten(0, 1)[places], alone[0], rtol=0, atol=1e-12)
