"""Training and held-out rows from local files, a data set of the hub, or the built-in text, through `datasets`.

Documents are tokenised (chat.py), packed into rows of at most T tokens (packing.py), and numbered, so that a message
about a batch can say which rows it held. Held-out documents are set aside before anything is packed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase

from .chat import reader_for
from .packing import IGNORED, PACKERS, count_from
from .reading import NUMBER, AnyDataset, Place, read_files, read_hub
from .settings import DataSettings
from .texts import pydoc_topics


FEATURES = Features(
    {
        "input_ids": [Value("int32")],
        "labels": [Value("int32")],
        "position_ids": [Value("int32")],
        "counted": Value("int32"),
    }
)
GROUP = 1000  # documents that are packed together, at most,
GROUP_BYTES = 2**22  # and their size, about: a million tokens of plain text
SAMPLE = 16  # first documents of a stream that tell how large its documents are


@dataclass(frozen=True)
class TrainingData:
    """Rows to train on and, unless nothing is held out, to evaluate on; `files` tells later whether they changed."""

    train: AnyDataset
    evaluation: Dataset | None
    files: list[list[str]]


def build_data(data: DataSettings, tokenizer: PreTrainedTokenizerBase, loss_from: int, seed: int) -> TrainingData:
    """Read, tokenise and pack everything (while streaming: as it is asked for).

    Args:
        loss_from: first position of a document that counts; labels before it become -100.

    Raises:
        ValueError: files or data sets that are missing, empty or unreadable, unknown columns, rows without the needed
            field, or too little text for one row that counts.
    """
    if loss_from >= data.sequence_length - 1:
        raise ValueError(
            f"data.sequence_length={data.sequence_length}: no position of a sequence would count, the first is "
            f"loss_from={loss_from}; give longer sequences or a smaller loss_from."
        )
    rows = _Rows(data, tokenizer, loss_from)
    if data.streaming:
        return _build_stream(data, rows, seed)
    documents, held_out, files = _split(data, seed)
    train = rows.build(documents, "training")
    evaluation = None if held_out is None else rows.build(held_out, "held-out")
    if held_out is None and _wants_rows_held_out(data):
        train, evaluation = _split_rows(train, data.held_out)
    if evaluation is not None:
        evaluation = _spread(evaluation, data.eval_sequences)
    return TrainingData(train, evaluation, files)


def _build_stream(data: DataSettings, rows: "_Rows", seed: int) -> TrainingData:
    """Return a stream's rows are made as training asks for them: before it, its first documents are read, and once.

    These are the held-out ones, and behind them as many as it takes to see a row that counts.
    """
    documents, held_out, files = read_hub(data), None, []
    reader, count = iter(documents), 0 if data.eval_files is not None else int(data.held_out)
    if data.eval_files is not None:
        held_out, files = read_files(data.eval_files, data.text_column)
    elif count:
        held_out = Dataset.from_list(list(islice(reader, count)))
    train = rows.build_stream(documents.skip(count) if count else documents, reader, count)
    evaluation = None if held_out is None else _spread(rows.build(held_out, "held-out"), data.eval_sequences)
    return TrainingData(train.shuffle(seed=seed, buffer_size=data.shuffle_buffer), evaluation, files)


def _split(data: DataSettings, seed: int) -> tuple[Dataset, Dataset | None, list[list[str]]]:
    """Training documents, held-out documents or None, and the local files read; for what is no stream."""
    if data.builtin is not None:
        texts = [Dataset.from_dict({"text": list(pydoc_topics(split).values())}) for split in ("training", "held_out")]
        texts = [text.rename_column("text", data.text_column) if data.text_column != "text" else text for text in texts]
        return texts[0], texts[1] if data.held_out else None, []
    if data.hub is not None:
        documents, files = read_hub(data), []
    else:
        documents, files = read_files(data.files, data.text_column)
    if data.eval_files is not None:
        held_out, more = read_files(data.eval_files, data.text_column)
        return documents, held_out, files + more
    if not data.held_out or len(documents) < 2:
        return documents, None, files
    parts = documents.train_test_split(test_size=max(1, round(data.held_out * len(documents))), seed=seed)
    return parts["train"], parts["test"], files


def _wants_rows_held_out(data: DataSettings) -> bool:
    """Return a single document cannot be set aside whole: the last rows of it are."""
    return bool(data.held_out) and data.builtin is None


def _split_rows(rows: Dataset, share: float) -> tuple[Dataset, Dataset]:
    if len(rows) < 2:
        raise ValueError(
            "data: one document that makes one row leaves nothing to hold out; give more text, or data.held_out: 0."
        )
    count = max(1, round(share * len(rows)))
    return rows.select(range(len(rows) - count)), rows.select(range(len(rows) - count, len(rows)))


def _spread(rows: Dataset, count: int) -> Dataset:
    """At most `count` rows, evenly over all of them."""
    if len(rows) <= count:
        return rows
    return rows.select(np.linspace(0, len(rows) - 1, count).round().astype(int))


class _Rows:
    """Documents to rows: tokenise, pack, count."""

    def __init__(self, data: DataSettings, tokenizer: PreTrainedTokenizerBase, loss_from: int):
        self.data, self.loss_from = data, loss_from
        self.read, self.columns = reader_for(tokenizer, data)
        self.pack: Callable = PACKERS[data.packing]

    def build(self, documents: Dataset, kind: str) -> Dataset:
        """Return rows with input_ids, labels, position_ids and their number, `row`; see `build_data` for what is
        refused."""
        self._check_columns(documents.column_names if len(documents) else [], kind)
        table = documents.select_columns(self.columns).data
        size = table.nbytes / table.num_rows
        options = self._options(documents.column_names, size)
        # Rows cached by an earlier version of this code would be taken for current ones.
        pack = partial(self._pack, source=self._source(kind))
        rows = documents.map(pack, desc=f"Reading {kind} text", load_from_cache_file=False, **options)
        if not len(rows):
            raise self._too_short(kind)
        counted = [index for index, count in enumerate(rows["counted"]) if count]
        if not counted:
            raise self._none_counts(kind)
        rows = rows.select(counted).remove_columns("counted")
        return rows.add_column("row", list(range(len(rows))))

    def build_stream(
        self, documents: IterableDataset, reader: Iterator[dict[str, Any]], skipped: int
    ) -> IterableDataset:
        """Return the same as a stream.

        Args:
            reader: over these documents; it is read until a row counts, so that what is refused is refused now.
            skipped: documents of the data set before these.
        """
        sample = list(islice(reader, SAMPLE))
        columns = list(sample[0]) if sample else []
        self._check_columns(columns, "training")
        size = sum(len(str(document.get(column))) for document in sample for column in self.columns) / len(sample)
        options = self._options(columns, size)
        pack = partial(self._pack, source=None, skipped=skipped)
        self._check_stream(pack, chain(sample, reader), columns, options["batch_size"])
        rows = documents.map(pack, **options)
        rows = rows.filter(lambda row: row["counted"] > 0).remove_columns("counted")
        return rows.map(_numbered, with_indices=True)

    def _options(self, columns: list[str], size: float) -> dict[str, Any]:
        """How documents of `size` bytes on average are mapped to rows: in groups that stay small in memory."""
        group = int(min(GROUP, max(1, GROUP_BYTES // max(size, 1))))
        return {
            "batched": True,
            "with_indices": True,
            "batch_size": group,
            "remove_columns": columns,
            "features": FEATURES,
        }

    def _check_columns(self, columns: list[str], kind: str) -> None:
        if not columns:
            raise ValueError(f"data: the {kind} data is empty; give at least one document.")
        absent = [column for column in self.columns if column not in columns]
        if absent:
            source = self._source(kind) or self.data.hub
            raise ValueError(
                f"data: no column {', '.join(map(repr, absent))}; the {kind} data ({source}) has "
                f"{', '.join(column for column in columns if column != NUMBER)}. Set text_column, messages, or prompt "
                "and completion."
            )

    def _check_stream(
        self, pack: Callable, documents: Iterator[dict[str, Any]], columns: list[str], group: int
    ) -> None:
        """Refuse a stream of which no row counts."""
        found, start = False, 0
        while batch := list(islice(documents, group)):
            packed = pack(
                {column: [document.get(column) for document in batch] for column in columns},
                list(range(start, start + len(batch))),
            )
            if any(packed["counted"]):
                return
            found, start = found or bool(packed["counted"]), start + len(batch)
        raise self._none_counts("training") if found else self._too_short("training")

    def _source(self, kind: str) -> str | list[str] | None:
        """Return patterns of the files that these rows are of."""
        held_out_elsewhere = kind == "held-out" and self.data.eval_files is not None
        return self.data.eval_files if held_out_elsewhere else self.data.files

    def _pack(
        self, batch: dict[str, list], indices: list[int], source: str | list[str] | None, skipped: int = 0
    ) -> dict[str, list]:
        documents = []
        numbers = batch[NUMBER] if NUMBER in batch else [skipped + index for index in indices]
        for place, number in enumerate(numbers):
            row = {column: values[place] for column, values in batch.items() if column != NUMBER}
            document = self.read(row, Place(source, number))
            if document is not None:
                documents.append(document)
        rows = [count_from(row, self.loss_from) for row in self.pack(documents, self.data.sequence_length)]
        packed = {name: [row[name] for row in rows] for name in ("input_ids", "labels", "position_ids")}
        return {**packed, "counted": [sum(label != IGNORED for label in row["labels"]) for row in rows]}

    def _too_short(self, kind: str) -> ValueError:
        hint = "." if kind == "training" else "; or hold out more, or nothing (data.held_out: 0)."
        return ValueError(
            f"data: the {kind} text is shorter than one sequence of {self.data.sequence_length} tokens; give more "
            f"text, a smaller data.sequence_length, or packing: documents, which pads{hint}"
        )

    def _none_counts(self, kind: str) -> ValueError:
        return ValueError(
            f"data: no token of the {kind} text counts in the loss (loss_from={self.loss_from}, "
            f"loss_on={self.data.loss_on!r}); give longer documents, packing: concatenate, or a smaller loss_from."
        )


def _numbered(row: dict[str, list], index: int) -> dict[str, Any]:
    return {**row, "row": index}
