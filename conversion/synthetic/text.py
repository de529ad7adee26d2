"""Length generalisation on real text: bytes of Python's own reference or of files, trained at T, tested far beyond.

Trained on the training part, tested on the held-out part (`data/texts.py`), scored by position in the text.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch

from ..data.texts import BUILTINS, read_texts
from .samples import Samples, Task, tokens


@dataclass(frozen=True, kw_only=True)
class Text(Task):
    """The next byte of real text, everywhere.

    train_files, test_files: text files, by path or pattern; None: Python's reference, whose held-out part is tested.
    """

    about = "length generalisation: the next byte of real text, trained at T and read beyond"

    length: int = 512
    vocabulary: int = 256
    stretch: tuple[int, ...] = (8,)
    train_files: tuple[str, ...] | None = None
    test_files: tuple[str, ...] | None = None

    def check(self) -> None:
        if self.vocabulary != 256:
            self.refuse("vocabulary", "must be 256: text is read byte by byte")
        if (self.train_files is None) != (self.test_files is None):
            self.refuse("test_files", "must be given together with train_files, which are other texts")
        need = {"train": self.length + 1, "test": self.length * max(self.stretch) + 1}
        for split, least in need.items():
            held = len(corpus(split, getattr(self, f"{split}_files")))
            if held < least:
                self.refuse("length", f"a {split} sample is {least:,} bytes, and the text has {held:,}; give fewer, "
                            "or more text")  # fmt: skip

    def facts(self) -> list[str]:
        pieces = [corpus(split, getattr(self, f"{split}_files")) for split in ("train", "test")]
        return [hashlib.sha256(piece.numpy().tobytes()).hexdigest() for piece in pieces]

    def sample(self, count: int, generator: torch.Generator) -> Samples:
        text = corpus("train", self.train_files)
        start = tokens(count, 1, 0, len(text) - self.length, generator)
        return _cut(text, start, self.length)

    def test(self, count: int, seed: int) -> list[tuple[str, Samples, slice]]:
        """Return the held-out text in at most `count` pieces of the longest length, scored by doubling positions."""
        text, longest = corpus("test", self.test_files), self.length * max(self.stretch)
        pieces = min(count, (len(text) - 1) // longest)
        found = _cut(text, torch.arange(pieces)[:, None] * longest, longest)
        edges = [0, self.length]
        while edges[-1] < longest:
            edges.append(min(2 * edges[-1], longest))
        return [(f"{first:,} to {last:,}", found, slice(first, last)) for first, last in pairwise(edges)]


def _cut(text: torch.Tensor, start: torch.Tensor, length: int) -> Samples:
    pieces = text[start + torch.arange(length + 1)].long()
    return Samples(pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous())


@lru_cache(maxsize=8)
def corpus(split: str, files: tuple[str, ...] | None) -> torch.Tensor:
    """Return the bytes of a text `[S]`, uint8 (ValueError: no such files)."""
    part = "training" if split == "train" else "held_out"
    texts = read_texts(BUILTINS[0], None, split=part) if files is None else read_texts(None, files)
    text = "\n\n".join(texts.values())
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
