"""Settings of what is read to train on: the section `data:`, and what of it contradicts itself."""

from dataclasses import dataclass

from ..common.settings import check_choice


PACKINGS = ("documents", "concatenate", "none")
BUILTIN = ("pydoc",)


@dataclass(frozen=True)
class DataSettings:
    """What is read, and how it becomes sequences. Exactly one of `files`, `hub` and `builtin` is given.

    files: globs of .txt, .md, .jsonl, .json, .parquet and .csv; a text file is one document. hub: a data set's id, with
    `config` and `split`; `streaming` reads it as it comes and needs `trainer.max_steps`. builtin: "pydoc", English text
    that every CPython carries.
    text_column: the column of plain text. messages: a column of chats. prompt, completion: a pair of columns. Chats and
    pairs replace the text column.
    sequence_length: T, tokens per row. packing: "documents" fills rows with whole documents that do not see each other;
    "concatenate" cuts one stream of all documents; "none" makes every document a row, cut at T.
    loss_on: "completion" trains on the answers of chats and pairs only, "all" on everything.
    append_eos: end documents with the end-of-sequence token.
    held_out: share of the documents kept for evaluation (streaming: number of first documents). The built-in text has a
    split of its own. eval_files: globs to evaluate on instead. eval_sequences: rows to evaluate on, at most.
    shuffle_buffer: rows to shuffle among while streaming.
    """

    files: str | list[str] | None = None
    hub: str | None = None
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    builtin: str | None = None
    text_column: str = "text"
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    sequence_length: int = 1024
    packing: str = "documents"
    loss_on: str = "completion"
    append_eos: bool = True
    held_out: float = 0.05
    eval_files: str | list[str] | None = None
    eval_sequences: int = 16
    shuffle_buffer: int = 1000


def check_data(data: DataSettings) -> None:
    """Refuse contradictory data settings (ValueError)."""
    given = [name for name in ("files", "hub", "builtin") if getattr(data, name) is not None]
    if len(given) != 1:
        raise ValueError(f"data: give exactly one of files, hub, builtin; found {given or 'none'}.")
    check_choice("data.builtin", data.builtin, (None, *BUILTIN))
    check_choice("data.packing", data.packing, PACKINGS)
    check_choice("data.loss_on", data.loss_on, ("completion", "all"))
    if (data.prompt is None) != (data.completion is None):
        raise ValueError("data: prompt and completion are a pair of columns; give both or neither.")
    if data.messages is not None and data.prompt is not None:
        raise ValueError("data: messages and prompt/completion are two forms of chats; give one of them.")
    if data.streaming and data.hub is None:
        raise ValueError(
            "data.streaming=True: is for a data set of the hub; remove it, local files are read as a whole."
        )
    if data.sequence_length < 2:
        raise ValueError(f"data.sequence_length={data.sequence_length!r}: must be a number of tokens >= 2.")
    if data.eval_sequences < 1:
        raise ValueError(f"data.eval_sequences={data.eval_sequences!r}: must be >= 1; held_out: 0 evaluates nothing.")
    check_held_out(data)


def check_held_out(data: DataSettings) -> None:
    """`held_out` is a share, or a number of documents while streaming (ValueError)."""
    if data.streaming and (data.held_out < 0 or data.held_out != int(data.held_out)):
        raise ValueError(
            f"data.held_out={data.held_out!r}: a stream has no known length; give the number of first documents to "
            "hold out, e.g. 16, or 0."
        )
    if not data.streaming and not 0 <= data.held_out < 1:
        raise ValueError(f"data.held_out={data.held_out!r}: must be a share of the documents in [0, 1).")
