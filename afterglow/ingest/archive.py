"""Office documents are zip files of XML parts; this opens them without trust.

Nothing is unpacked to disk, so names inside mean nothing but themselves. Parts are parsed as they are unpacked, with
limits on both sizes; document type declarations, and with them entities, are refused.
"""

from __future__ import annotations

import posixpath
import zipfile
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple
from xml.parsers import expat

from afterglow.ingest.extract import invalid, too_large, unsupported

MAX_PARTS = 50_000
MAX_UNPACKED_BYTES = 1_000_000_000  # of all parts that are read
MAX_RATIO, RATIO_MATTERS_BYTES = 250, 16_000_000  # text packs 3 to 50 times smaller, a bomb a thousand
PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # all that the standard of these documents knows
_READ_BYTES = 65_536


class Event(NamedTuple):
    """A step through XML. name: of the element, without namespace; text: for kind `text`."""

    kind: Literal["start", "end", "text"]
    name: str
    attributes: dict[str, str]
    text: str = ""


class Relation(NamedTuple):
    """Where a part points: kind is the last word of the relation's type (`slide`, `notesSlide`, `styles`, …)."""

    kind: str
    target: str


class Archive:
    """An opened document. Raises Unreadable for what is broken, locked or too large."""

    def __init__(self, file: BinaryIO) -> None:
        self._zip = zipfile.ZipFile(file)
        self._left = MAX_UNPACKED_BYTES
        if len(self._zip.filelist) > MAX_PARTS:
            raise invalid(f"it is an archive of more than {MAX_PARTS} parts")
        self._parts = {info.filename: info for info in self._zip.filelist}

    def __contains__(self, part: str) -> bool:
        return part in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def read(self, part: str) -> Iterator[bytes]:
        """The bytes of a part in pieces; none when there is no such part."""
        info = self._parts.get(part)
        if info is None:
            return
        if info.flag_bits & 1:
            raise invalid("it is protected by a password")
        if info.compress_type not in PACKINGS:
            raise invalid("it is packed in a way that no office program uses")
        if info.file_size > RATIO_MATTERS_BYTES and info.file_size > MAX_RATIO * info.compress_size:
            raise too_large()
        with self._zip.open(info) as stream:
            while data := stream.read(_READ_BYTES):
                self._left -= len(data)
                if self._left < 0:
                    raise too_large()
                yield data

    def events(self, part: str) -> Iterator[Event]:
        """The XML of a part. An attribute is named without namespace, but `r:…` when it is a relation's id."""
        parser = expat.ParserCreate(namespace_separator=" ")
        parser.buffer_text = True
        parser.ordered_attributes = True
        found: list[Event] = []

        def start(name: str, attributes: list[str]) -> None:
            pairs = zip(attributes[::2], attributes[1::2], strict=True)
            found.append(Event("start", _local(name), {_local_attribute(key): value for key, value in pairs}))

        def refuse(*_: object) -> None:
            raise invalid("its XML declares a document type, which no office program writes")

        parser.StartElementHandler = start
        parser.EndElementHandler = lambda name: found.append(Event("end", _local(name), {}))
        parser.CharacterDataHandler = lambda text: found.append(Event("text", "", {}, text.replace("\r", "\n")))
        parser.StartDoctypeDeclHandler = refuse
        for data in self.read(part):
            parser.Parse(data, False)
            yield from found
            found.clear()
        if part in self._parts:
            parser.Parse(b"", True)
            yield from found

    def relations(self, part: str) -> dict[str, Relation]:
        """What a part points to inside the document, by relation id. `""` is the document as a whole."""
        folder, name = posixpath.split(part)
        found = {}
        for event in self.events(posixpath.join(folder, "_rels", f"{name}.rels")):
            if event.name == "Relationship" and event.kind == "start" and _inside(event):
                target = posixpath.normpath(posixpath.join("/", folder, event.attributes.get("Target", "")))
                kind = event.attributes.get("Type", "").rpartition("/")[2]
                found[event.attributes.get("Id", "")] = Relation(kind, target.lstrip("/"))
        return found

    def related(self, part: str, kind: str) -> list[str]:
        """The parts of one kind that a part points to, in its order, those that exist."""
        relations = self.relations(part).values()
        return [relation.target for relation in relations if relation.kind == kind and relation.target in self]

    def title(self) -> str | None:
        """The title among the document's properties."""
        for part in self.related("", "core-properties"):
            inside = ""
            for event in self.events(part):
                inside = event.name if event.kind == "start" else inside
                if event.kind == "text" and inside == "title":
                    return event.text
        return None

    def kind(self) -> tuple[Literal["docx", "pptx", "xlsx"], str]:
        """Which kind of document it is, and its main part. Raises Unreadable when it is another kind of archive."""
        main = self.related("", "officeDocument")
        for part in [*main, "word/document.xml", "ppt/presentation.xml", "xl/workbook.xml"]:
            if part in self and part.endswith(".xml"):
                folder = part.split("/")[0]
                if folder == "word":
                    return "docx", part
                if folder == "ppt":
                    return "pptx", part
                if folder == "xl":
                    return "xlsx", part
        if "xl/workbook.bin" in self:
            raise unsupported("it is a binary Excel workbook; save it as .xlsx, and upload that")
        if "content.xml" in self:
            raise unsupported("it is an OpenDocument file; save it as .docx, .pptx, .xlsx or PDF, and upload that")
        raise unsupported("it is a zip archive; unpack it, and upload the files inside")


def _inside(event: Event) -> bool:
    return event.attributes.get("TargetMode") != "External"


def _local(name: str) -> str:
    return name.rpartition(" ")[2]


def _local_attribute(name: str) -> str:
    space, _, local = name.rpartition(" ")
    return f"r:{local}" if space.endswith("/relationships") else local
