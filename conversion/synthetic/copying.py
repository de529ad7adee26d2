"""Tasks that keep or find tokens: selective copying, induction, compression.

Sources: selective copying and compression as in MAD (arXiv 2403.17844), induction as in Mamba (arXiv 2312.00752).
"""

from dataclasses import dataclass

import torch

from .samples import IGNORED, Samples, Task, distinct, tokens


@dataclass(frozen=True, kw_only=True)
class SelectiveCopying(Task):
    """`copied` tokens scattered among blanks, then a marker: say the tokens in their order, one behind the other.

    The last token of the vocabulary is the marker, the one before it the blank. The answer is not read back in: behind
    the marker stand blanks.
    """

    about = "selective copying: tokens scattered among blanks, to be said in order"

    length: int = 256
    copied: int = 16

    def check(self) -> None:
        if self.copied < 1:
            self.refuse("copied", "must be at least 1")
        if self.vocabulary < 4:
            self.refuse("vocabulary", "must be at least 4: two tokens to copy, the blank and the marker")
        if self.length < 2 * self.copied:
            self.refuse("length", f"must hold {self.copied} tokens twice: {2 * self.copied} at least")

    def sample(self, count: int, generator: torch.Generator) -> Samples:
        blank, size = self.vocabulary - 2, self.copied
        copied = tokens(count, size, 0, blank, generator)
        places = distinct(count, 0, self.length - size, size, generator).sort(dim=1).values
        ids = torch.full((count, self.length), blank).scatter(1, places, copied)
        ids[:, self.length - size] = self.vocabulary - 1
        labels = torch.full_like(ids, IGNORED)
        labels[:, self.length - size :] = copied
        return Samples(ids, labels)


@dataclass(frozen=True, kw_only=True)
class Induction(Task):
    """Random tokens in which a special one stands once, and once more at the end: say what stood behind it."""

    about = "induction: what stood behind the special token"

    length: int = 256

    def check(self) -> None:
        if self.length < 3:
            self.refuse("length", "must be at least 3: the special token, the one behind it, and the question")
        if self.vocabulary < 3:
            self.refuse("vocabulary", "must be at least 3: two tokens and the special one")

    def sample(self, count: int, generator: torch.Generator) -> Samples:
        special = self.vocabulary - 1
        ids = tokens(count, self.length, 0, special, generator)
        place = tokens(count, 1, 0, self.length - 2, generator)
        ids = ids.scatter(1, place, special)
        ids[:, -1] = special
        labels = torch.full_like(ids, IGNORED)
        labels[:, -1:] = ids.gather(1, place + 1)
        return Samples(ids, labels)


@dataclass(frozen=True, kw_only=True)
class Compression(Task):
    """Random tokens and a marker; from the output at the marker alone, all of them are to be said.

    The last token of the vocabulary is the marker. Token j is read out of that output and a vector of place j
    (`training.Reader`), so `labels` are the tokens themselves.
    """

    about = "compression: all tokens from one output"
    whole = True

    length: int = 32

    def check(self) -> None:
        if self.length < 2:
            self.refuse("length", "must be at least 2: a token and the marker")
        if self.vocabulary < 3:
            self.refuse("vocabulary", "must be at least 3: two tokens and the marker")

    def sample(self, count: int, generator: torch.Generator) -> Samples:
        labels = tokens(count, self.length, 0, self.vocabulary - 1, generator)
        ids = labels.clone()
        ids[:, -1] = self.vocabulary - 1
        labels[:, -1] = IGNORED
        return Samples(ids, labels)
