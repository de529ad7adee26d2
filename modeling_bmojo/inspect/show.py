"""show_memory: a text coloured by what a B'MOJO cache remembers of it, in notebooks (HTML) and terminals (text).

    window      read less than W tokens ago: every layer sees it word for word
    kept        beyond the window, but in the eidetic memory of at least one layer; the more layers, the stronger
    forgotten   no layer holds it word for word any more; the fading memory has a trace of it

Reads the cache's positions and innovations and nothing else; neither cache nor model change.
"""

import html
import math
import os
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from ..cache_bmojo import BMojoCache
from .pieces import token_pieces, visible


LEVELS = 4
# (background, text) by state; "page" is the ground, "quiet" its text for forgotten tokens. Blue and orange are told
# apart with every common kind of colour blindness. Contrast of text is at least 4.5 : 1 (tested).
LIGHT = {
    "page": ("#ffffff", "#1f2328"),
    "quiet": ("#ffffff", "#667079"),
    "window": ("#d6e8fb", "#0b2a4a"),
    "kept1": ("#ffedd1", "#3a2200"),
    "kept2": ("#ffd08a", "#3a2200"),
    "kept3": ("#fda93c", "#2b1800"),
    "kept4": ("#e8810c", "#1d1000"),
}
DARK = {
    "page": ("#14181f", "#e6e9ed"),
    "quiet": ("#14181f", "#939ca6"),
    "window": ("#17395e", "#d9eaff"),
    "kept1": ("#4b3411", "#ffe9c7"),
    "kept2": ("#7d5410", "#fff1da"),
    "kept3": ("#c98518", "#1a1000"),
    "kept4": ("#ffb547", "#1a1000"),
}
# The same for terminals: (background, text) of the 256 colours; what is forgotten keeps the terminal's own.
TERMINAL = {"window": (153, 16), "kept1": (223, 16), "kept2": (215, 16), "kept3": (208, 16), "kept4": (166, 16)}
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class ShownToken(NamedTuple):
    """A piece of text and what is remembered of it.

    text: as decoded. position: of its first token among the real tokens of the row. tokens: how many it is made of.
    state: "window", "kept", "forgotten", or "unread" for tokens that the cache has not read. layers: those that keep
    it beyond their window. innovation: the largest with which one of them keeps it, None if none does. A character of
    several tokens counts as remembered as its best remembered token.
    """

    text: str
    position: int
    tokens: int
    state: str
    layers: tuple[int, ...]
    innovation: float | None


class ShownRow(NamedTuple):
    """A row of the batch. row: its index. seen: real tokens read; window, kept, forgotten: how many of them are.
    tokens: the text in pieces."""

    row: int
    seen: int
    window: int
    kept: int
    forgotten: int
    tokens: list[ShownToken]


def show_memory(
    cache: BMojoCache,
    tokenizer,
    input_ids: torch.Tensor | Sequence,
    *,
    layer: int | None = None,
    row: int | None = None,
    attention_mask: torch.Tensor | Sequence | None = None,
) -> "MemoryView":
    """Return what a cache remembers of a text, as an object that shows itself: HTML in a notebook, text in a terminal.

    Args:
        cache: a `BMojoCache` that has read the text. tokenizer: the model's.
        input_ids: `[B, T]` or `[T]`, everything that the cache has read, earlier turns included; tokens behind it
            (the last one that `generate()` returns) are shown as unread.
        layer: one layer alone; None: all, coloured by how many remember a token.
        row: one row of the batch; None: all of them.
        attention_mask: as `input_ids`, 0 = pad; needed for padded batches. May end with the prompt: what comes behind
            it counts as real.

    Raises:
        ValueError: if the cache is empty, layer or row do not exist, the layer has no window, or `input_ids` and
            `attention_mask` do not fit the cache.
    """
    if cache.seen is None:
        raise ValueError("cache: is empty; run the model with cache=cache, then show it.")
    layers = _windowed_layers(cache, layer)
    ids, mask = _table("input_ids", input_ids), None
    if attention_mask is not None:
        mask = _table("attention_mask", attention_mask)
    batch = len(cache.seen)
    if len(ids) != batch or (mask is not None and len(mask) != batch):
        raise ValueError(f"input_ids: {len(ids)} rows but the cache has {batch}; pass what the model was given.")
    if row is not None and not -batch <= row < batch:
        raise ValueError(f"row={row}: the cache has {batch} rows; rows count from 0.")
    chosen = range(batch) if row is None else [row % batch]
    rows = [
        _shown_row(cache, tokenizer, layers, index, _real_ids(cache, index, ids[index], mask and mask[index]))
        for index in chosen
    ]
    return MemoryView(rows, layers, cache.specs[layers[0]].window, len(cache.specs), layer)


def _windowed_layers(cache: BMojoCache, layer: int | None) -> list[int]:
    count = len(cache.specs)
    if layer is not None and not -count <= layer < count:
        raise ValueError(f"layer={layer}: the cache has {count} layers; layers count from 0.")
    windowed = [index for index, spec in enumerate(cache.specs) if spec.window is not None]
    if layer is None and windowed:
        return windowed
    if layer is None or layer % count not in windowed:
        kinds = sorted({spec.kind for spec in cache.specs}) if layer is None else [cache.specs[layer].kind]
        raise ValueError(
            f"layer={layer}: {' and '.join(kinds)} layers have no window, and so either hold every token or none; ask "
            "for a layer of type 'bmojo' or 'sliding_attention'."
        )
    return [layer % count]


def _table(name: str, value: torch.Tensor | Sequence) -> list[list[int]]:
    value = torch.as_tensor(value).tolist()
    nested = value if value and isinstance(value[0], list) else [value]
    if not nested[0] or isinstance(nested[0][0], list):
        raise ValueError(f"{name}: must be [batch, tokens] or [tokens], not empty; pass what the model was given.")
    return nested


def _real_ids(cache: BMojoCache, row: int, ids: list[int], mask: list[int] | None) -> list[int]:
    """Return the tokens of a row without its pads."""
    seen, columns = int(cache.seen[row]), cache.get_seq_length()
    if mask is None and seen != columns:
        raise ValueError(
            f"attention_mask: row {row} has {columns - seen} pads among its {columns} columns; pass the mask that the "
            "model was given."
        )
    if mask is not None and len(mask) > len(ids):
        raise ValueError(f"attention_mask: {len(mask)} columns for {len(ids)} tokens; pass those of input_ids.")
    real = ids if mask is None else [token for token, kept in zip(ids, mask + [1] * len(ids)) if kept]
    if len(real) < seen:
        raise ValueError(
            f"input_ids: row {row} has {len(real)} real tokens but the cache has read {seen}; pass everything it has "
            "read, earlier turns included (generate() returns it as `sequences`)."
        )
    return real


def _shown_row(cache: BMojoCache, tokenizer, layers: list[int], row: int, ids: list[int]) -> ShownRow:
    seen = int(cache.seen[row])
    kept: dict[int, dict[int, float]] = {}
    for index in layers:
        if cache.specs[index].slots:
            for token in cache.remembered(index, row):
                kept.setdefault(token.position, {})[index] = token.innovation
    start = seen - cache.specs[layers[0]].window
    tokens = []
    for piece in token_pieces(tokenizer, ids):
        places = range(piece.first, piece.first + piece.count)
        holders: dict[int, float] = {}
        for position in places:
            for index, innovation in kept.get(position, {}).items():
                holders[index] = max(innovation, holders.get(index, 0.0))
        state = (
            "unread" if places[0] >= seen else "window" if places[-1] >= start else "kept" if holders else "forgotten"
        )
        innovation = max(holders.values()) if holders else None
        tokens.append(ShownToken(piece.text, piece.first, piece.count, state, tuple(sorted(holders)), innovation))
    window = seen - max(start, 0)
    return ShownRow(row, seen, window, len(kept), seen - window - len(kept), tokens)


class MemoryView:
    """What `show_memory` returns. `rows` is the data; `to_html`, `to_text` and `to_ansi` are its pictures.

    Notebooks show the HTML. `print` gives colours on a terminal (unless NO_COLOR is set), marks elsewhere.
    """

    def __init__(self, rows: list[ShownRow], layers: list[int], window: int, total: int, layer: int | None):
        self.rows = rows
        self.layers = layers
        self.window = window
        self.total = total
        self.layer = layer

    def level(self, token: ShownToken) -> str:
        """Return the colour of a token: "window", "kept1" ... "kept4", "" if it is forgotten or unread."""
        if token.state != "kept":
            return "window" if token.state == "window" else ""
        return f"kept{math.ceil(LEVELS * len(token.layers) / len(self.layers))}"

    def legend(self) -> list[tuple[str, str]]:
        """(colour, meaning) of everything that may occur; "" is what is forgotten."""
        count = len(self.layers)
        entries = [("window", f"in the window: the last {self.window} tokens, word for word")]
        for level in range(1, LEVELS + 1):
            low, high = (level - 1) * count // LEVELS + 1, level * count // LEVELS
            if low <= high:
                numbers = str(high) if low == high else f"{low}\u2013{high}"
                text = "kept word for word" if count == 1 else f"kept by {numbers} of {count} layers"
                entries.append((f"kept{level}", text))
        return [*entries, ("", "forgotten: only the fading memory has a trace of it")]

    def heading(self, row: ShownRow) -> str:
        """One line about a row."""
        which = f"layer {self.layers[0]}" if self.layer is not None else f"{len(self.layers)} layers"
        if self.layer is None and self.total > len(self.layers):
            which += f" with a window (of {self.total})"
        place = f"row {row.row}: " if len(self.rows) > 1 or row.row else ""
        return (
            f"{place}{which} after {row.seen:,} tokens: {row.window:,} in the window, {row.kept:,} kept, "
            f"{row.forgotten:,} forgotten"
        )

    # --- notebooks ---------------------------------------------------------------------------------------------------

    def to_html(self) -> str:
        """Return a fragment with its own style, light or dark as the page is; no scripts, nothing loaded."""
        legend = "".join(
            f'<span class="item"><span class="chip {colour or "quiet"}">Aa</span> {html.escape(text)}</span>'
            for colour, text in self.legend()
        )
        rows = "".join(
            f'<div class="head">{html.escape(self.heading(row))}</div>'
            f'<div class="text" dir="auto">{self._html_row(row)}</div>'
            for row in self.rows
        )
        return f'<div class="bmojo-memory"><style>{style()}</style><div class="legend">{legend}</div>{rows}</div>'

    def _repr_html_(self) -> str:
        return self.to_html()

    def _html_row(self, row: ShownRow) -> str:
        parts = []
        for state, group in groupby(row.tokens, key=lambda token: token.state):
            if state == "kept":
                parts += [self._html_kept(token) for token in group]
                continue
            text = html_text("".join(token.text for token in group))
            tag = {"window": ('<span class="window">', "</span>"), "unread": ("<i>", "</i>")}.get(state, ("", ""))
            parts.append(text.join(tag))
        return "".join(parts)

    def _html_kept(self, token: ShownToken) -> str:
        hint = html.escape(self._tooltip(token))
        return f'<mark class="{self.level(token)}" title="{hint}">{html_text(token.text)}</mark>'

    def _tooltip(self, token: ShownToken) -> str:
        places = f"token {token.position}"
        if token.tokens > 1:
            places = f"tokens {token.position}\u2013{token.position + token.tokens - 1}, one character"
        if self.layer is None:
            who = ", ".join(map(str, token.layers))
            return f"{places}: kept by {len(token.layers)} of {len(self.layers)} layers ({who})"
        return f"{places}: kept, innovation {token.innovation:.3f}"

    # --- terminals ---------------------------------------------------------------------------------------------------

    def to_ansi(self) -> str:
        """Text with 256-colour escapes, legible on light and dark grounds."""
        legend = [f"{paint(' Aa ', colour)} {text}" for colour, text in self.legend()]
        bodies = []
        for row in self.rows:
            runs = [(level, "".join(t.text for t in run)) for level, run in groupby(row.tokens, key=self.level)]
            bodies.append(f"{self.heading(row)}\n\n" + "".join(paint(visible(text), level) for level, text in runs))
        return "\n".join(legend) + "\n\n" + "\n\n".join(bodies)

    def to_text(self) -> str:
        """Text without colours: kept tokens in double brackets with the number of layers, a line before the window."""
        mark = "kept word for word"
        if len(self.layers) > 1:
            mark = "kept by as many layers as the raised number says"
        return "\n\n".join(f"{self.heading(row)}; \u27e6so\u27e7: {mark}\n\n{self._text_row(row)}" for row in self.rows)

    def _text_row(self, row: ShownRow) -> str:
        parts, inside = [], False
        for (inside_now, count), tokens in groupby(row.tokens, key=self._text_mark):
            text = visible("".join(token.text for token in tokens))
            if inside_now and not inside:
                inside = True
                parts.append(f"\n\n--- the window: the last {self.window} tokens ---\n\n")
            if count:
                number = "" if len(self.layers) == 1 else str(count).translate(SUPERSCRIPTS)
                shown = text.rstrip("\n")
                text = f"\u27e6{shown}\u27e7{number}{text[len(shown) :]}"
            parts.append(text)
        return "".join(parts)

    def _text_mark(self, token: ShownToken) -> tuple[bool, int]:
        """Let neighbours with the same mark share it: whether in the window, and the layers that keep a token."""
        return token.state in ("window", "unread"), len(token.layers) if token.state == "kept" else 0

    def __str__(self) -> str:
        colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        return self.to_ansi() if colours else self.to_text()

    __repr__ = __str__


def html_text(text: str) -> str:
    """Escaped text; what stands for whitespace is marked, so that it is not copied."""
    text = html.escape(visible(text))
    for sign in ("\u23ce", "\u21e5", "\u00b7"):
        text = text.replace(sign, f"<s>{sign}</s>")
    return text


def paint(text: str, colour: str) -> str:
    """Text in a colour of `TERMINAL`, line by line: a background that crosses a line end fills the line."""
    if not colour:
        return text
    ground, ink = TERMINAL[colour]
    lines = text.split("\n")
    return "\n".join(f"\x1b[48;5;{ground};38;5;{ink}m{line}\x1b[0m" if line else "" for line in lines)


def style() -> str:
    """CSS: light, dark where the system is dark, and what a notebook's own theme says above both."""

    def variables(colours: dict[str, tuple[str, str]]) -> str:
        return "".join(f"--{name}-ground:{ground};--{name}-ink:{ink};" for name, (ground, ink) in colours.items())

    box = ".bmojo-memory"
    light, dark = variables(LIGHT), variables(DARK)
    states = "".join(
        f"{box} .{name}{{background:var(--{name}-ground);color:var(--{name}-ink)}}" for name in LIGHT if name != "page"
    )
    return (
        f"{box}{{{light}}}"
        f"@media (prefers-color-scheme:dark){{{box}{{{dark}}}}}"
        f'[data-jp-theme-light="true"] {box},.vscode-light {box}{{{light}}}'
        f'[data-jp-theme-light="false"] {box},.vscode-dark {box}{{{dark}}}'
        f"{box}{{background:var(--page-ground);color:var(--page-ink);font:15px/1.75 system-ui,sans-serif;"
        "border:1px solid #8884;border-radius:8px;padding:14px 18px;max-width:60em}"
        f"{box} .legend{{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;margin-bottom:6px}}"
        f"{box} .chip{{border-radius:4px;padding:1px 6px}}"
        f"{box} .head{{font-weight:600;font-size:13px;margin:10px 0 6px}}"
        f"{box} .text{{white-space:pre-wrap;overflow-wrap:anywhere;color:var(--quiet-ink)}}"
        f"{box} mark{{border-radius:3px;padding:1px 0;box-shadow:inset -1px 0 var(--page-ground)}}"
        f"{box} s{{text-decoration:none;user-select:none}}"
        f"{states}"
    )


__all__ = ["MemoryView", "ShownRow", "ShownToken", "show_memory"]
