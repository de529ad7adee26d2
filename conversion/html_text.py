"""Text from HTML manuals, to train and evaluate on: `python -m conversion.html_text PATTERN ... --output FOLDER`.

    apt-get install debian-handbook
    python -m conversion.html_text '/usr/share/doc/debian-handbook/html/en-US/*.html' --output outputs/texts

Every page becomes `FOLDER/<page>.txt`, UTF-8: paragraphs are separated by blank lines, code keeps its lines, and what
leads elsewhere (menus, tables of contents, anchors, as Sphinx and DocBook mark them) is left out. Not done here: layout
of tables, pages that scripts write. Exit status: 0 done, 2 refused.
"""

import argparse
import glob
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

from .common.files import write_text
from .common.programs import run_program
from .common.staging import sole_writer


BLOCKS = frozenset(
    ("p", "div", "section", "article", "main", "ul", "ol", "dl", "table", "pre", "blockquote", "figcaption", "summary")
    + ("hr", "body", *(f"h{n}" for n in range(1, 7)))
)
LINES = frozenset(("br", "li", "dt", "dd", "tr"))
CELLS = frozenset(("td", "th"))
DROPPED_TAGS = frozenset(("head", "script", "style", "nav", "footer", "button", "form"))
DROPPED_CLASSES = frozenset(
    ("docnav", "footer", "headerlink", "inline-search", "mobile-nav", "related", "sphinxsidebar", "toc")
)
# Elements without an end tag (HTML standard), and those whose end tag may be left out: dropping them would not end.
VOID = frozenset(("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"))
UNCLOSED = frozenset(("p", "li", "dt", "dd", "tr", "td", "th"))
SHORTEST = 1500  # characters; shorter pages are mostly headings


class _Text(HTMLParser):
    """Collects the text of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.verbatim = 0
        self.dropped, self.depth = "", 0  # the tag that is being left out, and how many of it are open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if self.depth and (self.dropped, tag) == ("head", "body"):  # the end of a head may be left out
            self.depth = 0
        if self.depth:
            self.depth += tag == self.dropped
            return
        values = dict(attributes)
        menu = values.get("role") == "navigation" or DROPPED_CLASSES.intersection((values.get("class") or "").split())
        if tag in DROPPED_TAGS or (menu and tag not in VOID | UNCLOSED):
            self.dropped, self.depth = tag, 1
            return
        self.verbatim += tag == "pre"
        self._break(tag)
        if tag == "li":
            self.parts.append("- ")
        elif tag in CELLS:
            if self.parts[-1:] == [" "]:
                self.parts.pop()
            self.parts.append("\t")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if not self.depth:
            self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.depth:
            self.depth -= tag == self.dropped
            return
        self.verbatim -= tag == "pre" and self.verbatim > 0
        if tag in BLOCKS:
            self._break(tag)

    def handle_data(self, data: str) -> None:
        if self.depth:
            return
        if not self.verbatim:
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1].endswith(("\n", "\t", " ")):
                data = data.lstrip(" ")
        if data:
            self.parts.append(data)

    def _break(self, tag: str) -> None:
        if self.parts and self.parts[-1] == "- ":
            return  # an item may begin with a paragraph
        if tag in BLOCKS:
            self.parts.append("\n\n")
        elif tag in LINES:
            self.parts.append("\n")


def html_text(page: str) -> str:
    """The text of an HTML page."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    text = re.sub(r"[ \t]+\n", "\n", "".join(parser.parts))
    text = re.sub(r"\n\t(?=\S)", "\n", text)  # the first cell of a row
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def convert(patterns: Sequence[str], output: Path) -> tuple[list[Path], int]:
    """Writes a text file for each page that has at least `SHORTEST` characters.

    Returns:
        the files, and how many pages were too short.

    Raises:
        ValueError: a pattern that matches no file, two pages of one name, a page that is not UTF-8, nothing to write.
    """
    texts: dict[str, str] = {}
    for pattern in patterns:
        pages = sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())
        if not pages:
            raise ValueError(f"pages: {pattern!r} matches no file; give paths or patterns such as manual/*.html.")
        for page in pages:
            name = f"{page.stem}.txt"
            if name in texts:
                raise ValueError(f"pages: two are called {page.stem!r}; convert them into folders of their own.")
            try:
                texts[name] = html_text(page.read_text(encoding="utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"pages: {page} is not UTF-8 ({error}); convert it first.") from error
    long = {name: text for name, text in texts.items() if len(text) >= SHORTEST}
    if not long:
        raise ValueError(f"pages: none has {SHORTEST:,} characters of text.")
    with sole_writer(output):
        for name, text in long.items():
            write_text(output / name, text + "\n")
    return [output / name for name in long], len(texts) - len(long)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m conversion.html_text", description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="+", help="HTML files or patterns")
    parser.add_argument("--output", type=Path, required=True, help="folder of the text files")
    given = parser.parse_args(arguments)

    def work() -> int:
        written, short = convert(given.pages, given.output)
        size = sum(path.stat().st_size for path in written)
        left_out = f"{short} pages below {SHORTEST:,} characters left out"
        print(f"{given.output}: {len(written)} texts, {size:,} bytes; {left_out}")
        return 0

    return run_program(work, "files written so far are whole")


if __name__ == "__main__":
    raise SystemExit(main())
