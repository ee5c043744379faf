"""Tables as text: csv, tsv and Excel workbooks (.xlsx). Each row says the names of its columns with its values.

So a passage from the middle of a long table can be understood, and found by words of its header.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta

from afterglow.ingest.archive import Archive
from afterglow.ingest.extract import Extracted, TextBuilder, extension

MAX_COLUMNS = 16_384  # of Excel
_DELIMITERS = ",;\t|"


def read_csv(text: str, name: str) -> Extracted:
    """A table with any of the usual delimiters."""
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if extension(name) in ("tsv", "tab") else _delimiter(text)
    found, warnings = TextBuilder(), []
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        write_rows(rows, found)
    except csv.Error as error:
        warnings.append(f"the table ends early: {error}")
    return found.extracted(warnings=warnings)


def _delimiter(text: str) -> str:
    """The one that cuts the first lines into equally many cells; a comma when in doubt."""
    lines = [line for line in text[:20_000].split("\n")[:20] if line.strip()]

    def steadiness(delimiter: str) -> tuple[float, int]:
        counts = [line.count(delimiter) for line in lines]
        usual = max(set(counts), key=counts.count, default=0)
        return (counts.count(usual) / len(counts) if usual else 0.0, usual)

    return max(_DELIMITERS, key=steadiness)


def write_rows(rows: Iterable[list[str]], text: TextBuilder) -> None:
    """Rows as lines: `Name: Ada; Age: 36`. Lines above the header, such as a title, are written as they are."""
    header: list[str] | None = None
    for row in rows:
        cells = [" ".join(cell.split()) for cell in row]
        filled = sum(map(bool, cells))
        if header is None and filled > 1:
            if _is_header(cells):
                header = cells
                text.add(" | ".join(filter(None, cells)) + "\n")
                continue
            header = []
        if filled:
            text.add(_line(header or [], cells) + "\n")


def _is_header(cells: list[str]) -> bool:
    """Names of columns: texts, each once, none of them a number."""
    names = [cell for cell in cells if cell]
    return len(set(names)) == len(names) and not any(re.fullmatch(r"[-+]?[\d.,:/ %€$£-]+", name) for name in names)


def _line(header: list[str], cells: list[str]) -> str:
    named = bool(header)
    parts = []
    for column, cell in enumerate(cells):
        if cell:
            name = header[column] if column < len(header) else ""
            parts.append(f"{name}: {cell}" if name else cell)
    return ("; " if named else " | ").join(parts)


# --- workbooks -------------------------------------------------------------------------------------------------


def read_xlsx(archive: Archive, main: str) -> Extracted:
    """A workbook: a page for each sheet, with its name as heading. Formulas show the values last computed."""
    strings = list(_shared_strings(archive, main))
    dates = _date_styles(archive, main)
    relations, text, epoch = archive.relations(main), TextBuilder(), datetime(1899, 12, 30)
    for event in archive.events(main):
        if event.kind == "start" and event.name == "workbookPr" and event.attributes.get("date1904") in ("1", "true"):
            epoch = datetime(1904, 1, 1)
        relation = relations.get(event.attributes.get("r:id", "")) if event.name == "sheet" else None
        if event.kind == "start" and relation is not None:
            text.add(f"# {event.attributes.get('name', '')}\n\n")
            if relation.kind == "worksheet":
                write_rows(_Sheet(strings, dates, epoch).rows(archive, relation.target), text)
            text.end_page()
    return text.extracted(archive.title())


def _shared_strings(archive: Archive, main: str) -> Iterator[str]:
    """The texts that cells name by number. Readings of Japanese words (rPh) are left out."""
    for part in archive.related(main, "sharedStrings"):
        parts: list[str] = []
        inside = reading = False
        for event in archive.events(part):
            if event.kind == "text":
                if inside and not reading:
                    parts.append(event.text)
            elif event.name == "t":
                inside = event.kind == "start"
            elif event.name == "rPh":
                reading = event.kind == "start"
            elif event.name == "si" and event.kind == "end":
                yield "".join(parts)
                parts = []


_BUILT_IN_DATES = {*range(14, 23), *range(27, 37), *range(45, 48), *range(50, 59)}


def _date_styles(archive: Archive, main: str) -> set[str]:
    """The numbers of cell styles that show a number as a date or a time."""
    dates = {str(number) for number in _BUILT_IN_DATES}
    styles: set[str] = set()
    for part in archive.related(main, "styles"):
        number, inside = 0, False
        for event in archive.events(part):
            if event.name == "cellXfs":
                inside = event.kind == "start"
            elif (
                event.name == "numFmt" and event.kind == "start" and _shows_date(event.attributes.get("formatCode", ""))
            ):
                dates.add(event.attributes.get("numFmtId", ""))
            elif event.name == "xf" and inside and event.kind == "start":
                if event.attributes.get("numFmtId") in dates:
                    styles.add(str(number))
                number += 1
    return styles


def _shows_date(code: str) -> bool:
    """Whether a number format has letters of dates outside quotes, brackets and escapes."""
    return re.search(r"[dmyhs]", re.sub(r'"[^"]*"|\[[^\]]*\]|\\.|_.|General', "", code), re.IGNORECASE) is not None


class _Sheet:
    """Reads the rows of one sheet, cells in their columns."""

    def __init__(self, strings: list[str], dates: set[str], epoch: datetime) -> None:
        self._strings = strings
        self._dates = dates
        self._epoch = epoch

    def rows(self, archive: Archive, part: str) -> Iterator[list[str]]:
        row: list[str] = []
        cell: dict[str, str] = {}
        parts: list[str] = []
        inside = False
        for event in archive.events(part):
            if event.kind == "text":
                if inside:
                    parts.append(event.text)
            elif event.name in ("v", "t"):
                inside = event.kind == "start"
            elif event.name == "c" and event.kind == "start":
                cell, parts = event.attributes, []
            elif event.name == "c":
                _put(row, cell.get("r", ""), self._value(cell, "".join(parts)))
            elif event.name == "row" and event.kind == "end":
                yield row
                row = []

    def _value(self, cell: dict[str, str], raw: str) -> str:
        kind = cell.get("t", "n")
        if kind == "s":
            return self._strings[int(raw)] if raw.isdecimal() and int(raw) < len(self._strings) else ""
        if kind == "b":
            return {"1": "TRUE", "0": "FALSE"}.get(raw, raw)
        if kind != "n" or not raw:
            return raw
        return self._date(raw) if cell.get("s") in self._dates else _number(raw)

    def _date(self, raw: str) -> str:
        try:
            days = float(raw)
            moment = self._epoch + timedelta(seconds=round(days * 86400))
        except (ValueError, OverflowError):
            return raw
        if 0 <= days < 1:
            return f"{moment:%H:%M:%S}".removesuffix(":00")
        return f"{moment:%Y-%m-%d %H:%M:%S}".removesuffix(":00").removesuffix(" 00:00")


def _number(raw: str) -> str:
    """Without the noise of binary fractions: 0.30000000000000004 is 0.3. Whole numbers stay: long ones are names."""
    if (len(raw) < 16 and "E" not in raw) or raw.removeprefix("-").isdecimal():
        return raw
    try:
        return f"{float(raw):.15g}"
    except ValueError:
        return raw


def _put(row: list[str], reference: str, value: str) -> None:
    """Set a cell by its reference (`AB12`), or next to the last when it has none."""
    column = 0
    for letter in reference[:3]:
        if "A" <= letter <= "Z":
            column = column * 26 + ord(letter) - 64
    column = column or len(row) + 1
    if column <= MAX_COLUMNS and value:
        row.extend([""] * (column - len(row)))
        row[column - 1] = value
