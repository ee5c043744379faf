"""Text of PDF documents, page by page, by PDFium.

The text comes in the order in which the page was written, which is the reading order of nearly all documents.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, BinaryIO

import pypdfium2  # type: ignore[import-untyped]
import pypdfium2.raw as pdfium  # type: ignore[import-untyped]

from afterglow.ingest.extract import Extracted, TextBuilder, clean, invalid

NO_TEXT = "it has no text: it seems to be scanned images. Make it searchable with OCR, and upload that"
_MARK = "\ufffe"  # PDFium's mark where a word was cut at the end of a line
_CUT = re.compile(rf"([^\W\d_]{{1,60}}){_MARK}([^\W\d_]{{0,60}})")
_CUT_AT_LINE = re.compile(r"([^\W\d_]{2,60})[-\u2010\u00ad]\n([^\W\d_]{2,60})")
_COMPOUND = re.compile(r"[^\W\d_]{1,60}-[^\W\d_]{1,60}")


def read_pdf(file: BinaryIO) -> Extracted:
    """A PDF. Raises Unreadable when it is locked, broken or has no text."""
    document = _open(file)
    with document:
        pages, broken = _texts_of_pages(document)
        title = document.get_metadata_value("Title")
    if not any(page.strip() for page in pages):
        raise invalid(NO_TEXT if len(pages) > broken else "it is damaged: no page of it can be read")
    compounds = Counter(word.lower() for page in pages for word in _COMPOUND.findall(page))
    text = TextBuilder()
    for page in pages:
        text.add(_join_words(page, compounds).strip())
        text.end_page()
    return text.extracted(title, [f"{broken} of its pages are damaged and were left out"] if broken else [])


def _open(file: BinaryIO) -> Any:
    try:
        return pypdfium2.PdfDocument(file)
    except pypdfium2.PdfiumError as error:
        if error.err_code == pdfium.FPDF_ERR_PASSWORD:
            raise invalid("it is protected by a password. Remove the password, and upload it again") from None
        if error.err_code == pdfium.FPDF_ERR_SECURITY:
            raise invalid("it is encrypted in a way that cannot be read") from None
        raise invalid("it is a damaged PDF") from None


def _texts_of_pages(document: Any) -> tuple[list[str], int]:
    """The text of each page, empty for one that is damaged, and how many are."""
    texts, broken, total = [], 0, TextBuilder()
    for number in range(len(document)):
        try:
            page = document[number]
            layer = page.get_textpage()
            texts.append(re.sub(r"\t\n +", " ", clean(layer.get_text_range())))  # a space, as some printers write it
            layer.close()
            page.close()
        except pypdfium2.PdfiumError:
            texts.append("")
            broken += 1
        total.add(texts[-1])  # raises when it is too much
    return texts, broken


def _join_words(page: str, compounds: Counter[str]) -> str:
    """Put together the words that were cut at line ends. The hyphen stays where it belongs to the word: before a
    capital or a number, and in a compound that stands uncut elsewhere."""

    def joined(cut: re.Match[str]) -> str:
        left, right = cut[1], cut[2]
        keeps = not right or (right[0].isupper() and not left.isupper()) or f"{left}-{right}".lower() in compounds
        return f"{left}-{right}" if keeps else left + right

    page = _CUT.sub(joined, page)
    page = _CUT_AT_LINE.sub(lambda cut: joined(cut) + "\n", page)
    return page.replace(_MARK, "-")
