"""Text from HTML pages: what is kept, what is left out, and what is refused."""

import pytest

from conversion.html_text import SHORTEST, html_text, main


PAGE = """<html><head><title>T</title><style>p {}</style></head><body>
<nav>menu</nav><div class="x related"><div>inner</div>more<br/></div>
<h1>Memory<a class="headerlink" href="#m">¶</a></h1><p>One &amp;
two.<br/>Next  line</p><ul><li>a</li><li>b</li></ul>
<pre>def f(x):
    return x   # &lt;</pre><script>alert("<p>")</script><p>End</p></body></html>"""


def test_paragraphs_lists_and_code_are_kept_and_menus_are_not():
    assert html_text(PAGE) == ("Memory\n\nOne & two.\nNext line\n\n- a\n- b\n\ndef f(x):\n    return x   # <\n\nEnd")


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ('a<hr class="footer">b', "a\n\nb"),
        ('<p class="toc">one<p>two', "one\n\ntwo"),
        ("<html><head><title>T</title><body><p>x", "x"),
        ("<table><tr><th>name</th><th>value</th></tr><tr><td>a</td> <td>1</td></tr></table>", "name\tvalue\na\t1"),
        ("<pre>-one\n two\n  three</pre> <p>end", "-one\n two\n  three\n\nend"),
        ("<ul>\n<li><p>b</p></li>\n<li><p>c</p><p>d</p></li></ul>", "- b\n\n- c\n\nd"),
        ("<details><summary>Sum</summary>text</details><figcaption>cap</figcaption>", "Sum\n\ntext\n\ncap"),
        ("<p>a <b>bold</b> word , <i>x</i> y</p>", "a bold word , x y"),
        ("", ""),
    ],
)
def test_forms_of_html(page, text):
    assert html_text(page) == text


def test_pages_become_files(tmp_path, capsys):
    body = "word " * SHORTEST
    (tmp_path / "long.html").write_text(f"<p>{body}</p>")
    (tmp_path / "short.html").write_text("<p>word</p>")
    assert main([str(tmp_path / "*.html"), "--output", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["long.txt"]
    assert (tmp_path / "out" / "long.txt").read_text() == body.strip() + "\n"
    assert "1 texts, 7,500 bytes; 1 pages below 1,500" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pages", "message"),
    [({}, "matches no file"), ({"a.html": b"\xff\xfe"}, "not UTF-8"), ({"a.html": b"<p>x</p>"}, "none has 1,500")],
)
def test_what_cannot_be_converted_is_refused(tmp_path, capsys, pages, message):
    for name, content in pages.items():
        (tmp_path / name).write_bytes(content)
    assert main([str(tmp_path / "*.html"), "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_two_pages_of_one_name_are_refused(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.html").write_text("<p>" + "word " * SHORTEST + "</p>")
    assert main([str(tmp_path / "*" / "x.html"), "--output", str(tmp_path / "out")]) == 2
    assert "two are called 'x'" in capsys.readouterr().err
