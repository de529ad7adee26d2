"""From tokenised documents to training rows of at most T tokens, without leaks between documents.

A document is `(ids, labels)`: labels repeat the ids where a token is trained on and are -100 elsewhere; the first label
is always -100, since nothing before it predicts it. A row is `{"input_ids", "labels", "position_ids"}`. Positions that
restart at 0 are how B'MOJO models (and TRL) mark packed sequences, which neither attend to each other nor hand on an
SSM state.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import Any

import torch


IGNORED = -100
Document = tuple[list[int], list[int]]
Row = dict[str, list[int]]


def cut(document: Document, length: int) -> list[Document]:
    """Return a document in pieces of at most `length` tokens, each a document of its own; a last single token is left
    out."""
    ids, labels = document
    pieces = []
    for start in range(0, len(ids), length):
        end = start + length
        if len(ids[start:end]) > 1 or len(ids) == 1:
            pieces.append((ids[start:end], [IGNORED, *labels[start + 1 : end]]))
    return pieces


def pack_documents(documents: Iterable[Document], length: int) -> list[Row]:
    """Whole documents in rows of at most `length` tokens, by best fit: the longest first, each into the fullest row
    that has room. Longer documents are cut."""
    pieces = [piece for document in documents for piece in cut(document, length)]
    rows: list[list[Document]] = []
    room: list[tuple[int, int]] = []  # (free places, row), sorted
    for piece in sorted(pieces, key=lambda item: -len(item[0])):
        size = len(piece[0])
        found = bisect_left(room, (size, -1))
        if found == len(room):
            rows.append([])
            free, index = length, len(rows) - 1
        else:
            free, index = room.pop(found)
        rows[index].append(piece)
        if free > size:
            insort(room, (free - size, index))
    return [_joined(row) for row in rows]


def _joined(documents: Sequence[Document]) -> Row:
    return {
        "input_ids": [token for ids, _ in documents for token in ids],
        "labels": [label for _, labels in documents for label in labels],
        "position_ids": [position for ids, _ in documents for position in range(len(ids))],
    }


def concatenate(documents: Iterable[Document], length: int) -> list[Row]:
    """One stream of all documents, cut every `length` tokens; what is left at the end is dropped.

    A row is one sequence: its positions run through, and a token sees those before it whatever document they are of.
    """
    ids = [token for document in documents for token in document[0]]
    labels = [label for document in documents for label in document[1]]
    starts = range(0, len(ids) - length + 1, length)
    return [
        {
            "input_ids": ids[start : start + length],
            "labels": [IGNORED, *labels[start + 1 : start + length]],
            "position_ids": list(range(length)),
        }
        for start in starts
    ]


def single(documents: Iterable[Document], length: int) -> list[Row]:
    """Every document a row, its end cut off beyond `length` tokens."""
    return [_joined([(ids[:length], [IGNORED, *labels[1:length]])]) for ids, labels in documents]


PACKERS = {"documents": pack_documents, "concatenate": concatenate, "none": single}


def count_from(row: Row, first: int) -> Row:
    """Return the row with only those labels that are predicted from position `first` of their document or later.

    The label of position t is predicted at t - 1; positions count within documents, from 0.
    """
    labels = [label if position > first else IGNORED for label, position in zip(row["labels"], row["position_ids"])]
    return {**row, "labels": labels}


class Collator:
    """Rows to a batch of tensors `[B, T]`, padded on the right to the longest row.

    Args:
        pad: the token at pads; they are masked, so any one will do.

    Returns (when called): input_ids, labels, position_ids, `row` `[B]` (the rows' numbers in the data set) and, where
    there are pads, attention_mask.
    """

    def __init__(self, pad: int):
        self.pad = pad

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad, "labels": IGNORED, "position_ids": 0}
        batch = {
            name: torch.tensor([list(row[name]) + [value] * (length - len(row[name])) for row in rows])
            for name, value in fill.items()
        }
        sizes = torch.tensor([len(row["input_ids"]) for row in rows])
        if int(sizes.min()) < length:
            batch["attention_mask"] = (torch.arange(length) < sizes[:, None]).to(torch.int64)
        batch["row"] = torch.tensor([row["row"] for row in rows])
        return batch
