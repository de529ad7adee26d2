"""show_passages: the passages that an answer drew on, in notebooks (HTML) and terminals (text).

Tokens that were voted for are coloured, the darker the more of their passage's votes they have; what stands around them
is grey. Text without colours marks those with more than a quarter of the votes of the passage's first token by votes.
"""

import html
import math
import os
import sys
from itertools import groupby
from typing import NamedTuple

from .attribution import Attribution, Passage
from .pieces import token_pieces, visible
from .show import LEVELS, html_text, paint, style


class ShownPassage(NamedTuple):
    """A passage as text. heading: what is known of it. pieces: (level, text), level 0 for what was not voted for, else
    1 to `LEVELS`."""

    passage: Passage
    heading: str
    pieces: list[tuple[int, str]]


def show_passages(
    attribution: Attribution, tokenizer, *, count: int = 3, token: int | None = None, around: int = 12
) -> "PassagesView":
    """Return the passages that an answer drew on, as an object that shows itself: HTML in a notebook, else text.

    Args:
        attribution: what `attribute` returned. tokenizer: the model's.
        count: passages at most. token: of the answer, by its index there; None: all of it.
        around: tokens shown on either side of a passage.

    Raises:
        ValueError: if count is no positive integer, around a negative number, or the answer has no such token.
    """
    if type(around) is not int or around < 0:
        raise ValueError(f"around={around!r}: must be an integer of at least 0; say how many tokens to show besides.")
    found = attribution.passages(count, token=token)
    shown = [_shown(attribution, tokenizer, passage, around) for passage in found]
    return PassagesView(_heading(attribution, tokenizer, token), shown)


def _heading(attribution: Attribution, tokenizer, token: int | None) -> str:
    answer = attribution.ids[attribution.answer.start :]
    said = tokenizer.decode(answer if token is None else [answer[token]], skip_special_tokens=token is None).strip()
    what = f'"{said}"' if token is None else f'token {token % len(answer)} of the answer, "{said}"'
    beyond = attribution.beyond if token is None else attribution.beyond[[token]]
    place = f"row {attribution.row}: " if attribution.row else ""
    return (
        f"{place}{visible(what)}: {100 * float(beyond.mean()):.0f}% of the attention went beyond the window of "
        f"{attribution.window:,} tokens"
    )


def _shown(attribution: Attribution, tokenizer, passage: Passage, around: int) -> ShownPassage:
    first = max(passage.first - around, 0)
    last = min(passage.last + around, attribution.answer.start - 1)
    pieces, most = [], max(passage.votes)
    for piece in token_pieces(tokenizer, attribution.ids[first : last + 1]):
        begin = first + piece.first - passage.first
        votes = passage.votes[max(begin, 0) : max(begin + piece.count, 0)]
        pieces.append((math.ceil(LEVELS * max(votes, default=0.0) / most), piece.text))
    joined = [(level, "".join(text for _, text in run)) for level, run in groupby(pieces, key=lambda piece: piece[0])]
    layers, total = len(passage.layers), len(attribution.layers)
    heading = (
        f"{100 * passage.score:.0f}% of the votes, first of {layers} of {total} layers; tokens {passage.first:,} to "
        f"{passage.last:,}, {attribution.answer.start - passage.last:,} before the answer"
    )
    return ShownPassage(passage, heading, joined)


class PassagesView:
    """What `show_passages` returns. `passages` is the data; `to_html`, `to_text` and `to_ansi` are its pictures.

    Notebooks show the HTML. `print` gives colours on a terminal (unless NO_COLOR is set), brackets elsewhere.
    """

    def __init__(self, heading: str, passages: list[ShownPassage]):
        self.heading = heading
        self.passages = passages
        self.empty = "No head found anything there that neutral queries do not find as well."

    def to_html(self) -> str:
        """Return a fragment with its own style, light or dark as the page is; no scripts, nothing loaded."""
        body = "".join(
            f'<div class="head">{number}. {html.escape(shown.heading)}</div>'
            f'<div class="text" dir="auto">{"".join(_html_piece(*piece) for piece in shown.pieces)}</div>'
            for number, shown in enumerate(self.passages, 1)
        )
        body = body or f'<div class="text">{html.escape(self.empty)}</div>'
        head = f'<div class="head">{html_text(self.heading)}</div>'
        return f'<div class="bmojo-memory"><style>{style()}</style>{head}{body}</div>'

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_ansi(self) -> str:
        """Text with 256-colour escapes, legible on light and dark grounds."""
        return self._lines(lambda level, text: paint(text, f"kept{level}" if level else ""))

    def to_text(self) -> str:
        """Text without colours: what most votes are for in double brackets."""
        return self._lines(lambda level, text: f"\u27e6{text}\u27e7" if level > 1 else text).replace("\u27e7\u27e6", "")

    def _lines(self, mark) -> str:
        blocks = []
        for number, shown in enumerate(self.passages, 1):
            text = "".join(mark(level, visible(text).replace("\n", "")) for level, text in shown.pieces)
            blocks.append(f"{number}. {shown.heading}\n   {text}")
        return "\n\n".join([self.heading, *(blocks or [self.empty])])

    def __str__(self) -> str:
        colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        return self.to_ansi() if colours else self.to_text()

    __repr__ = __str__


def _html_piece(level: int, text: str) -> str:
    return f'<mark class="kept{level}">{html_text(text)}</mark>' if level else html_text(text)


__all__ = ["PassagesView", "ShownPassage", "show_passages"]
