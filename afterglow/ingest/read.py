"""A file's bytes to its text, whichever reader that takes. Runs where a hostile document can do no harm: `child.py`."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from typing import BinaryIO
from xml.parsers import expat

from afterglow.errors import Unreadable
from afterglow.ingest.archive import Archive
from afterglow.ingest.doc import read_doc
from afterglow.ingest.extract import (
    EMPTY,
    MAX_TEXT_BYTES,
    MAX_TEXT_CHARS,
    Extracted,
    binary_format_of,
    decode,
    invalid,
    read_json,
    read_text,
    text_format_of,
    too_large,
)
from afterglow.ingest.html import declared_encoding, read_html
from afterglow.ingest.office import read_docx, read_pptx
from afterglow.ingest.tables import read_csv, read_xlsx

# What the standard library raises on broken archives and broken XML.
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    expat.ExpatError,
    EOFError,
    NotImplementedError,  # a way of packing that is not known
    UnicodeError,
    ValueError,
    OSError,  # a seek to where no file has bytes
)


def read(file: BinaryIO, name: str) -> Extracted:
    """The text of a file; `name` says what it is where the bytes do not. Raises Unreadable."""
    head = file.read(1024)
    file.seek(0)
    if not head:
        raise Unreadable("invalid_file", EMPTY)
    kind = binary_format_of(head, name)
    extracted = _read_text(file, name) if kind is None else _read_binary(file, kind)
    if not extracted.text.strip():
        raise invalid("it has no text" if kind else "it is empty")
    if len(extracted.text) > MAX_TEXT_CHARS:
        raise too_large()
    return extracted


def _read_binary(file: BinaryIO, kind: str) -> Extracted:
    if kind == "pdf":
        from afterglow.ingest.pdf import read_pdf  # PDFium takes 10 MB, which most files do not need

        return read_pdf(file)
    if kind == "ole":
        return read_doc(file.read())
    try:
        archive = Archive(file)
        document, main = archive.kind()
        return {"docx": read_docx, "pptx": read_pptx, "xlsx": read_xlsx}[document](archive, main)
    except _BROKEN:
        raise invalid("it is a damaged office document or archive") from None


def _read_text(file: BinaryIO, name: str) -> Extracted:
    if os.fstat(file.fileno()).st_size > MAX_TEXT_BYTES:
        raise too_large()
    data = file.read()
    text, warnings = decode(data, declared_encoding(data[:4096]))
    del data
    kind = text_format_of(text, name)
    if kind == "html":
        extracted = read_html(text)
    elif kind == "csv":
        extracted = read_csv(text, name)
    else:
        extracted = read_json(text) if kind == "json" else read_text(text, name)
    return Extracted(extracted.text, extracted.pages, extracted.title, [*warnings, *extracted.warnings])
