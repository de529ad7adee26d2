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
import warnings
from collections.abc import Sequence
from pathlib import Path

from bs4 import BeautifulSoup, NavigableString, Tag, XMLParsedAsHTMLWarning

from .common.commands import command, purpose
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
# A class of menus on these takes nothing out: they hold nothing, or (a paragraph, an item) text that a browser shows.
NO_MENUS = frozenset(("br", "hr", "img", "p", "li", "dt", "dd", "tr", "td", "th"))
SHORTEST = 1500  # characters; shorter pages are mostly headings


def html_text(page: str) -> str:
    """Return the text of an HTML page."""
    with warnings.catch_warnings():  # XHTML reads well as HTML, and is what many manuals are
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
        soup = BeautifulSoup(page, "lxml")
    for tag in soup.find_all(_leads_elsewhere):
        tag.extract()
    parts: list[str] = []
    _collect(soup, parts, verbatim=False)
    text = re.sub(r"[ \t]+\n", "\n", "".join(parts))
    text = re.sub(r"\n\t(?=\S)", "\n", text)  # the first cell of a row
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _leads_elsewhere(tag: Tag) -> bool:
    menu = tag.get("role") == "navigation" or DROPPED_CLASSES.intersection(tag.get("class") or ())
    return tag.name in DROPPED_TAGS or bool(menu and tag.name not in NO_MENUS)


def _collect(parent: Tag, parts: list[str], verbatim: bool) -> None:
    """Append the text below `parent`; as deep as the parser lets elements lie in each other (lxml: 256)."""
    for node in parent.children:
        if isinstance(node, Tag):
            _break(node.name, parts)
            if node.name == "li":
                parts.append("- ")
            elif node.name in CELLS:
                if parts[-1:] == [" "]:
                    parts.pop()
                parts.append("\t")
            _collect(node, parts, verbatim or node.name == "pre")
            if node.name in BLOCKS:
                _break(node.name, parts)
        elif type(node) is NavigableString:  # and no comment
            text = node if verbatim else re.sub(r"\s+", " ", node)
            if not verbatim and (not parts or parts[-1].endswith(("\n", "\t", " "))):
                text = text.lstrip(" ")
            if text:
                parts.append(text)


def _break(name: str, parts: list[str]) -> None:
    if parts[-1:] == ["- "]:
        return  # an item may begin with a paragraph
    if name in BLOCKS:
        parts.append("\n\n")
    elif name in LINES:
        parts.append("\n")


def convert(patterns: Sequence[str], output: Path) -> tuple[list[Path], int]:
    """Write a text file for each page that has at least `SHORTEST` characters.

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
    parser = argparse.ArgumentParser(prog=command("html_text"), description=purpose(__doc__))
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
