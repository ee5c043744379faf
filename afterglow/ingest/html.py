"""Text of web pages: headings, lists and tables stay readable; scripts, styles and markup go.

The standard library's parser makes no tree, follows no link and knows no entity but HTML's own.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

from afterglow.ingest.extract import Extracted, TextBuilder

_HIDDEN = {"script", "style", "template", "noscript", "svg", "canvas", "iframe", "object", "select", "textarea"}
_HEADINGS = {"h1": "# ", "h2": "## ", "h3": "### ", "h4": "#### ", "h5": "##### ", "h6": "###### "}
_PREFIXES = {"li": "- ", **_HEADINGS}  # written once, before the first text inside
_BLOCKS = {"p", "div", "section", "article", "header", "footer", "main", "aside", "nav", "blockquote", "figure"}
_BLOCKS |= {"ul", "ol", "dl", "table", "pre", "form", "fieldset", "address", "details", "hr", "body", *_HEADINGS}
_LINES = {"br", "li", "tr", "dt", "dd", "option", "caption", "figcaption", "summary"}


def read_html(markup: str) -> Extracted:
    """A web page. Its title comes first, as a heading, unless the page begins with it."""
    page = _Page()
    page.feed(markup)
    page.close()
    return page.extracted()


def declared_encoding(head: bytes) -> str | None:
    """What a page says of its own encoding, in its first kilobytes."""
    found = re.search(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?\s*([-\w]{1,40})", head[:4096], re.IGNORECASE)
    return found[1].decode("ascii", "replace") if found else None


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._text = TextBuilder()
        self._line: list[str] = []
        self._prefix = ""
        self._blank = True  # whether the text ends with a blank line, or has not begun
        self._title = ""
        self._in_title = False
        self._hidden = ""  # the element whose inside is left out,
        self._depth = 0  # and how deep inside itself it is
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._hidden:
            self._depth += tag == self._hidden
        elif tag in _HIDDEN:
            self._hidden, self._depth = tag, 1
        elif tag == "title":
            self._in_title = not self._title
        elif tag in ("td", "th"):
            if any(self._line):
                self._line.append(" | ")
        elif tag == "img":
            self._line.append(dict(attrs).get("alt") or "")
        elif tag in _BLOCKS or tag in _LINES:
            self._end_line(blank=tag in _BLOCKS and not self._prefix)  # a block in an item goes on with its line
            self._prefix = _PREFIXES.get(tag, self._prefix)
            self._pre += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _HIDDEN:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if self._hidden:
            self._depth -= tag == self._hidden
            self._hidden = self._hidden if self._depth else ""
        elif tag == "title":
            self._in_title = False
        elif tag in _BLOCKS or tag in _LINES:
            self._end_line(blank=tag in _BLOCKS)
            self._prefix = "" if tag in _PREFIXES else self._prefix
            self._pre = max(0, self._pre - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self._title += data
        elif not self._hidden:
            self._line.append(data)

    def parse_marked_section(self, i: int, report: int = 1) -> int:
        """What begins with `<![` is a comment to browsers; the parser would raise on it."""
        return self.parse_bogus_comment(i)

    def _end_line(self, blank: bool) -> None:
        text = "".join(self._line)
        self._line = []
        text = text.strip("\n") if self._pre else " ".join(text.split())
        if text.strip():
            self._text.add(self._prefix + text + "\n")
            self._prefix, self._blank = "", False
        if blank and not self._blank:
            self._text.add("\n")
            self._blank = True

    def extracted(self) -> Extracted:
        self._end_line(blank=False)
        title = " ".join(self._title.split())
        body = self._text.extracted(title)
        if not title or title in body.text[: 2 * len(title) + 100]:
            return body
        return Extracted(f"# {title}\n\n{body.text}", title=body.title)
