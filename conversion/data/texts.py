"""Real text for measurements: token sequences from CPython's own reference or from text files.

`pydoc` is `pydoc_data.topics`, English prose that every CPython ships (about 465,000 characters). Three long topics
are held out from all training (`HELD_OUT`); the others may be trained on. Topics quote each other at length (`compound`
holds `for`, `if` and `while` word for word), so a split by topic alone would leak: a paragraph belongs to the held-out
part if a held-out topic has it, and every paragraph is used once.

Not done here: reading data sets for training, chat templates, shuffling.
"""

import glob
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch


BUILTINS = ("pydoc",)
SPLITS = ("held_out", "training")
HELD_OUT = ("specialnames", "string-methods", "compound")


def pydoc_text(split: str) -> str:
    """Return the held-out or the training part of Python's reference, one string, the same on every call.

    Raises:
        ValueError: another split.
    """
    return "\n\n".join(pydoc_topics(split).values())


def pydoc_topics(split: str) -> dict[str, str]:
    """Return the same topic by topic, without topics of which nothing is left.

    Raises:
        ValueError: another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: must be one of {list(SPLITS)}.")
    wanted = HELD_OUT if split == "held_out" else [name for name in sorted(topics) if name not in HELD_OUT]
    used = set() if split == "held_out" else {key for name in HELD_OUT for key, _ in _paragraphs(topics[name])}
    kept: dict[str, list[str]] = {}
    for name in wanted:
        for key, paragraph in _paragraphs(topics[name]):
            if key not in used:
                used.add(key)
                kept.setdefault(name, []).append(paragraph)
    return {name: "\n\n".join(paragraphs) for name, paragraphs in kept.items()}


def _paragraphs(text: str) -> list[tuple[str, str]]:
    """Return paragraphs of a text, each with what makes it the same as another: its words, whatever the white space."""
    parts = [part.rstrip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    return [(" ".join(part.split()), part) for part in parts]


def read_texts(
    builtin: str | None = None,
    files: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    split: str = "held_out",
) -> dict[str, str]:
    """Return texts by name. Exactly one of `builtin` and `files` is given.

    Args:
        builtin: "pydoc": one long text, the part `split`. files: patterns such as `books/*.txt`; every file is a text.
        names: topics of pydoc that are read instead, each a text of its own, whatever split they are in.

    Raises:
        ValueError: neither or both given, an unknown topic, a pattern without a file, an unreadable or empty file.
    """
    if (builtin is None) == (files is None):
        raise ValueError(f"builtin={builtin!r}, files={files!r}: give exactly one of them; the other is null.")
    if files is not None:
        if names is not None:
            raise ValueError(f"topics={list(names)}: belong to builtin: pydoc; remove them or the files.")
        return _read_files(files)
    if builtin not in BUILTINS:
        raise ValueError(f"builtin={builtin!r}: must be one of {list(BUILTINS)}; files: reads text files.")
    if names is None:
        return {f"pydoc, {split.replace('_', ' ')}": pydoc_text(split)}
    unknown = [name for name in names if name not in topics]
    if unknown or not names:
        raise ValueError(
            f"topics={list(names)}: must be topics of pydoc_data.topics, at least one; unknown: {unknown}."
        )
    return {name: topics[name] for name in names}


def _read_files(patterns: Sequence[str]) -> dict[str, str]:
    texts = {}
    if isinstance(patterns, str) or not patterns:
        raise ValueError(f"files={patterns!r}: must be a list of paths or patterns, e.g. ['books/*.txt'].")
    for pattern in patterns:
        paths = glob.glob(str(Path(pattern).expanduser()), recursive=True)
        found = sorted(path for path in paths if Path(path).is_file())
        if not found:
            raise ValueError(f"files: {pattern!r} matches no file; give paths or patterns such as books/*.txt.")
        for path in found:
            try:
                texts[path] = Path(path).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"files: {path} is not UTF-8 text ({error}); convert it first.") from error
            if not texts[path].strip():
                raise ValueError(f"files: {path} is empty; remove it from the patterns.")
    return texts


def token_stream(tokenizer: Any, texts: dict[str, str]) -> torch.Tensor:
    """Return ids `[S]` of all texts, one after the other, a blank line between them; no special tokens."""
    return _ids(tokenizer, "\n\n".join(texts.values()))


def sequences(tokenizer: Any, texts: dict[str, str], tokens: int, count: int) -> list[torch.Tensor]:
    """`count` sequences of ids `[1, tokens]`, spread evenly over the stream of all texts, without overlap.

    Raises:
        ValueError: the texts hold fewer sequences of this length.
    """
    stream = token_stream(tokenizer, texts)
    whole = len(stream) // tokens
    if whole < count:
        raise ValueError(
            f"tokens={tokens}, texts={count}: the text ({_named(texts)}) has {len(stream):,} tokens, which is {whole} "
            f"sequences of {tokens:,}; give more text, fewer texts or shorter ones."
        )
    chosen = [0] if count == 1 else [round(index * (whole - 1) / (count - 1)) for index in range(count)]
    return [stream[None, first * tokens : (first + 1) * tokens].contiguous() for first in chosen]


def openings(tokenizer: Any, texts: dict[str, str], tokens: int) -> list[torch.Tensor]:
    """Return the first `tokens` ids `[1, tokens]` of every text.

    Raises:
        ValueError: a text is shorter.
    """
    found = []
    for name, text in texts.items():
        ids = _ids(tokenizer, text)[:tokens]
        if len(ids) < tokens:
            raise ValueError(f"tokens={tokens}: {name} has only {len(ids)} tokens; give longer text or fewer tokens.")
        found.append(ids[None])
    return found


def fingerprint(ids: Sequence[torch.Tensor]) -> str:
    """SHA-256 of token sequences: two measurements with the same one read the same tokens."""
    digest = hashlib.sha256()
    for row in ids:
        digest.update(row.to(torch.int64).cpu().numpy().tobytes() + b"|")
    return digest.hexdigest()


def _ids(tokenizer: Any, text: str) -> torch.Tensor:
    # verbose=False: no warning that the text is longer than the model; it is cut into sequences.
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)


def _named(texts: dict[str, str], most: int = 3) -> str:
    names = list(texts)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
