"""Tokens as text that can be shown: one piece per token, where a character needs several tokens one piece for them all.

A piece is the text that its tokens add to what stands before them. Rule: tokens that are no text alone (byte-level BPE
cuts a character into bytes) are joined to the shortest run that is; bytes that never become a character stay pieces of
their own, shown as U+FFFD.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple


BROKEN = "\ufffd"
LONGEST = 16  # tokens that a run of incomplete characters may have
SPACES = re.compile(" {2,}")
# Characters that would act on a terminal or on the direction of the text, instead of being seen.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


class Piece(NamedTuple):
    """text: what to show. first: index of its first token. count: how many tokens it is made of."""

    text: str
    first: int
    count: int


def token_pieces(tokenizer, ids: Sequence[int]) -> list[Piece]:
    """Return the text of `ids` in pieces; joined they are the decoded text, special tokens included.

    Args:
        tokenizer: any transformers tokenizer. ids: token ids of one sequence, without pads.
    """

    def decode(part: Sequence[int]) -> str:
        return tokenizer.decode(list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    pieces: list[Piece] = []
    first, before = 0, 0
    while first < len(ids):
        count = 1
        text = _added(decode, ids, before, first, 1)
        if BROKEN in text:
            count, text = _run(decode, ids, before, first, text)
        pieces.append(Piece(text, first, count))
        before, first = first, first + count
    return pieces


def _added(decode, ids: Sequence[int], before: int, first: int, count: int) -> str:
    """Return what tokens `first` ... add to the text of the piece that starts at `before`: decoders drop the space that
    a sequence starts with, so a token alone does not tell whether a word begins with it."""
    alone = decode(ids[first : first + count])
    if before == first:
        return alone
    context, whole = decode(ids[before:first]), decode(ids[before : first + count])
    return whole[len(context) :] if whole.startswith(context) and BROKEN not in context else alone


def _run(decode, ids: Sequence[int], before: int, first: int, alone: str) -> tuple[int, str]:
    """Return the shortest run of incomplete tokens from `first` that is text, as (tokens, text); else the first
    alone."""
    for count in range(2, min(LONGEST, len(ids) - first) + 1):
        if BROKEN not in decode(ids[first + count - 1 : first + count]):
            break  # a token of whole characters completes nothing
        text = _added(decode, ids, before, first, count)
        if BROKEN not in text:
            return count, text
    return 1, alone


def visible(text: str) -> str:
    """Text whose whitespace can be seen: line ends as U+23CE before the break, tabs as U+21E5, runs of spaces as dots.

    Control characters and those that turn the direction of the text become escapes such as `\\x1b`.
    """
    text = UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    text = SPACES.sub(lambda match: "\u00b7" * len(match[0]), text)
    return text.replace("\t", "\u21e5\t").replace("\n", "\u23ce\n")


__all__ = ["Piece", "token_pieces", "visible"]
