"""Text of Word documents and PowerPoint presentations (.docx, .pptx).

Both are paragraphs of runs of text, and tables of rows of cells, under the same names; so one flow reads both.
Deleted text, field codes and the second copy that old programs fall back on are left out. Workbooks: `tables.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal

from afterglow.ingest.archive import Archive, Event
from afterglow.ingest.extract import Extracted, TextBuilder

# What is in these is not what a reader of the document sees, or is there a second time.
_HIDDEN = {"Fallback", "del", "moveFrom", "instrText", "delText", "delInstrText", "rPr", "sectPr", "tblPr"}
_BREAKS = {"br": "\n", "cr": "\n", "tab": "\t", "noBreakHyphen": "-", "softHyphen": "", "txbxContent": "\n"}
Line = tuple[Literal["heading", "item", "row", "paragraph"], str]


def read_docx(archive: Archive, main: str) -> Extracted:
    """A Word document: body, then notes, then headers and footers. It has no pages until it is printed."""
    headings = _heading_styles(archive, main)
    text = TextBuilder()
    _write(_Flow(headings).lines(archive.events(main)), text)
    for kind in ("footnotes", "endnotes"):
        for part in archive.related(main, kind):
            _write(_notes(archive, part), text)
    seen = set()
    for kind in ("header", "footer"):
        for part in archive.related(main, kind):
            for line in _Flow(headings).lines(archive.events(part)):
                if line[1] not in seen and re.search(r"[^\W\d_]{2}", line[1]):
                    seen.add(line[1])
                    _write([line], text)
    return text.extracted(archive.title())


def read_pptx(archive: Archive, main: str) -> Extracted:
    """A presentation: a page for each slide, with its diagrams and its speaker's notes."""
    text = TextBuilder()
    relations = archive.relations(main)
    for event in archive.events(main):
        relation = relations.get(event.attributes.get("r:id", "")) if event.name == "sldId" else None
        if event.kind == "start" and relation is not None:
            _read_slide(archive, relation.target, text)
            text.end_page()
    return text.extracted(archive.title())


def _read_slide(archive: Archive, slide: str, text: TextBuilder) -> None:
    _write(_Flow({}).lines(archive.events(slide)), text)
    for part in archive.related(slide, "diagramData"):
        _write(_Flow({}).lines(archive.events(part)), text)
    for part in archive.related(slide, "notesSlide"):
        notes = list(_Flow({}, shapes={"body"}).lines(archive.events(part)))
        if notes:
            _write([("paragraph", "Notes:"), *notes], text)


def _write(lines: Iterable[Line], text: TextBuilder) -> None:
    """Paragraphs stand apart; items and rows of one table stand together."""
    for kind, line in lines:
        text.add(line + ("\n" if kind in ("item", "row") else "\n\n"))


def _notes(archive: Archive, part: str) -> Iterator[Line]:
    number = ""
    note: list[Event] = []
    for event in archive.events(part):
        note.append(event)
        if event.name in ("footnote", "endnote"):
            number = event.attributes.get("id", number)
            if event.kind == "end":
                content = " ".join(line for _, line in _Flow({}).lines(note))
                if content:
                    yield "item", f"[{number}] {content}"
            note = []


def _heading_styles(archive: Archive, main: str) -> dict[str, int]:
    """Style ids of headings, and their levels: by name, or by outline level."""
    levels: dict[str, int] = {}
    style = ""
    for part in archive.related(main, "styles"):
        for event in archive.events(part):
            value = event.attributes.get("val", "")
            if event.kind != "start":
                continue
            if event.name == "style":
                style = event.attributes.get("styleId", "")
            elif event.name == "name" and (named := re.fullmatch(r"heading ([1-9])", value, re.IGNORECASE)):
                levels[style] = int(named[1])
            elif event.name == "name" and value.lower() == "title":
                levels[style] = 1
            elif event.name == "outlineLvl" and value in tuple("012345"):
                levels.setdefault(style, int(value) + 1)
    return levels


class _Flow:
    """Turns the XML of one part into lines. shapes: kinds of placeholders to read; None reads all."""

    def __init__(self, headings: dict[str, int], shapes: set[str] | None = None) -> None:
        self._headings = headings
        self._shapes = shapes
        self._hidden = 0  # how deep inside something hidden
        self._paragraph: list[str] = []
        self._in_text = False
        self._level = 0
        self._item = False
        self._shape = ""
        self._cells: list[list[str]] = []  # cells being read, outermost first, each a list of its lines
        self._rows: list[list[str]] = []  # rows being read, outermost first, each a list of its cells

    def lines(self, events: Iterable[Event]) -> Iterator[Line]:
        for event in events:
            if event.kind == "text":
                if self._in_text and not self._hidden:
                    self._paragraph.append(event.text)
            elif event.name in _HIDDEN or event.name == "fld":
                self._hide(event)
            elif not self._hidden and event.kind == "start":
                self._start(event)
            elif not self._hidden:
                yield from self._end(event.name)

    def _hide(self, event: Event) -> None:
        if event.name == "fld":  # a number that the program fills in; other fields are text
            if event.kind == "start" and (self._hidden or event.attributes.get("type") == "slidenum"):
                self._hidden += 1
            elif event.kind == "end" and self._hidden:
                self._hidden -= 1
        else:
            self._hidden = self._hidden + 1 if event.kind == "start" else max(0, self._hidden - 1)

    def _start(self, event: Event) -> None:
        name, value = event.name, event.attributes.get("val", "")
        if name == "t":
            self._in_text = True
        elif name in _BREAKS and not (name == "tab" and "pos" in event.attributes):
            self._paragraph.append(_BREAKS[name])
        elif name == "pStyle":
            self._level = self._headings.get(value, 0)
        elif name == "outlineLvl" and value in tuple("012345"):
            self._level = int(value) + 1
        elif name == "numPr":
            self._item = True
        elif name in ("footnoteReference", "endnoteReference"):
            self._paragraph.append(f"[{event.attributes.get('id', '')}]")
        elif name in ("sp", "graphicFrame"):
            self._shape = ""
        elif name == "ph":
            self._shape = event.attributes.get("type", "body")
        elif name == "tr":
            self._rows.append([])
        elif name == "tc":
            self._cells.append([])

    def _end(self, name: str) -> Iterator[Line]:
        if name == "t":
            self._in_text = False
        elif name == "p":
            yield from self._place(*self._end_paragraph())
        elif name == "tc" and self._cells and self._rows:
            self._rows[-1].append(" ".join(self._cells.pop()))
        elif name == "tr" and self._rows:
            row = self._rows.pop()
            yield from self._place("row", " | ".join(row) if any(row) else "")
        elif name == "tbl" and not self._cells:
            yield "row", ""

    def _end_paragraph(self) -> Line:
        text = "".join(self._paragraph).strip()
        level, item = self._level, self._item
        self._paragraph, self._level, self._item = [], 0, False
        if self._shapes is not None and self._shape not in self._shapes:
            return "paragraph", ""
        if (level or self._shape in ("title", "ctrTitle")) and text and not self._cells:
            return "heading", "#" * (level or 1) + " " + " ".join(text.split())
        return ("item", f"- {text}") if item and text else ("paragraph", text)

    def _place(self, kind: Literal["heading", "item", "row", "paragraph"], text: str) -> Iterator[Line]:
        """A line of a cell waits for its row; others go out."""
        if not text:
            return
        if self._cells:
            self._cells[-1].append(" ".join(text.split()))
        else:
            yield kind, text
