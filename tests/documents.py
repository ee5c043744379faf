"""Small documents of every format, made from text, for tests."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping

OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
A = 'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main"'
P = 'xmlns:p="http://schemas.openxmlformats.org/presentationml/2006/main"'
R = f'xmlns:r="{OFFICE}"'
S = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
CORE = 'xmlns:dc="http://purl.org/dc/elements/1.1/"'


def zipped(parts: Mapping[str, str | bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return file.getvalue()


def relations(**targets: str) -> str:
    """id=kind:target"""
    rows = (
        f'<Relationship Id="{key}" Type="{OFFICE}/{value.partition(":")[0]}" Target="{value.partition(":")[2]}"/>'
        for key, value in targets.items()
    )
    return f'<Relationships xmlns="http://schemas.openxmlformats.org/package">{"".join(rows)}</Relationships>'


def paragraph(text: str, style: str = "") -> str:
    return f'<w:p><w:pPr><w:pStyle w:val="{style}"/></w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>'


def docx(body: str, **parts: str) -> bytes:
    """body: XML of paragraphs and tables. parts: whole XML of `footnotes`, `styles`, `header`."""
    styles = f'<w:styles {W}><w:style w:styleId="H2"><w:name w:val="heading 2"/></w:style></w:styles>'
    return zipped(
        {
            "_rels/.rels": relations(a="officeDocument:word/document.xml", b="core-properties:docProps/core.xml"),
            "docProps/core.xml": f"<p {CORE}><dc:title>The Title</dc:title></p>",
            "word/document.xml": f"<w:document {W}><w:body>{body}</w:body></w:document>",
            "word/styles.xml": styles,
            "word/_rels/document.xml.rels": relations(
                a="styles:styles.xml", **{kind: f"{kind}:{kind}.xml" for kind in parts}
            ),
            **{f"word/{kind}.xml": content for kind, content in parts.items()},
        }
    )


def slide_text(text: str, kind: str = "body") -> str:
    shown = f"<a:p><a:r><a:t>{text}</a:t></a:r></a:p>"
    return f'<p:sp><p:nvPr><p:ph type="{kind}"/></p:nvPr><p:txBody>{shown}</p:txBody></p:sp>'


def pptx(*slides: str, notes: str = "") -> bytes:
    """slides: XML of shapes. notes: the speaker's, on the first slide. The last slide is shown first."""
    order = "".join(f'<p:sldId id="{256 + n}" r:id="r{n}"/>' for n in reversed(range(len(slides))))
    parts = {
        "_rels/.rels": relations(a="officeDocument:ppt/presentation.xml"),
        "ppt/presentation.xml": f"<p:presentation {P} {R}><p:sldIdLst>{order}</p:sldIdLst></p:presentation>",
        "ppt/_rels/presentation.xml.rels": relations(
            **{f"r{n}": f"slide:/ppt/slides/slide{n}.xml" for n in range(len(slides))}
        ),
        "ppt/slides/_rels/slide0.xml.rels": relations(a="notesSlide:../notesSlides/notes0.xml"),
        "ppt/notesSlides/notes0.xml": f"<p:notes {P} {A}>{slide_text(notes)}{slide_text('9', 'sldNum')}</p:notes>",
    }
    for n, shapes in enumerate(slides):
        parts[f"ppt/slides/slide{n}.xml"] = f"<p:sld {P} {A}>{shapes}</p:sld>"
    return zipped(parts)


def xlsx(**sheets: str) -> bytes:
    """sheets: XML of rows, by name. Shared strings: 0 is `Name`, 1 is `Born`, 2 is `Ada`. Style 1 is a date."""
    names = "".join(f'<sheet name="{name}" sheetId="{n}" r:id="r{n}"/>' for n, name in enumerate(sheets))
    strings = "<si><t>Name</t></si><si><r><t>Bo</t></r><r><t>rn</t></r></si><si><t>Ada</t><rPh><t>x</t></rPh></si>"
    styles = (
        '<numFmts><numFmt numFmtId="170" formatCode="yyyy\\-mm\\-dd"/></numFmts>'
        '<cellStyleXfs><xf numFmtId="0"/></cellStyleXfs><cellXfs><xf numFmtId="0"/><xf numFmtId="170"/></cellXfs>'
    )
    parts = {
        "_rels/.rels": relations(a="officeDocument:xl/workbook.xml"),
        "xl/workbook.xml": f"<workbook {S} {R}><sheets>{names}</sheets></workbook>",
        "xl/_rels/workbook.xml.rels": relations(
            s="sharedStrings:sharedStrings.xml",
            t="styles:styles.xml",
            **{f"r{n}": f"worksheet:worksheets/sheet{n}.xml" for n in range(len(sheets))},
        ),
        "xl/sharedStrings.xml": f"<sst {S}>{strings}</sst>",
        "xl/styles.xml": f"<styleSheet {S}>{styles}</styleSheet>",
    }
    for n, rows in enumerate(sheets.values()):
        parts[f"xl/worksheets/sheet{n}.xml"] = f"<worksheet {S}><sheetData>{rows}</sheetData></worksheet>"
    return zipped(parts)


def pdf(*pages: str, trailer: str = "", title: str = "") -> bytes:
    """Pages of lines of ASCII. An empty page draws a line and no text."""
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for n, page in enumerate(pages):
        shown = "".join(f"({line}) Tj T* " for line in page.split("\n"))
        drawn = f"BT /F 12 Tf 14 TL 50 700 Td {shown}ET" if page else "0 0 m 9 9 l S"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 600 800] /Contents {5 + 2 * n} 0 R"
            " /Resources << /Font << /F 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream")
    objects.append(f"<< /Title ({title}) >>")
    out, places = "%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    start, size = len(out), len(objects) + 1
    out += f"xref\n0 {size}\n0000000000 65535 f \n{table}"
    return (
        out + f"trailer << /Root 1 0 R /Info {size - 1} 0 R /Size {size} {trailer} >>\nstartxref\n{start}\n%%EOF\n"
    ).encode()


LOCKED = f"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <{'11' * 32}> /U <{'22' * 32}> >> /ID [<00> <00>]"


def doc(*pieces: str, flags: int = 0x0200) -> bytes:
    """A Word 97 document of pieces of text, narrow ones in one byte per character and others in two."""
    return ole({"WordDocument": _word(pieces, flags), "1Table": _piece_table(pieces)})


def _narrow(piece: str) -> bool:
    return all(ord(character) < 256 for character in piece)


def _word(pieces: tuple[str, ...], flags: int) -> bytes:
    head = bytearray(1024)
    struct.pack_into("<HH", head, 0, 0xA5EC, 0xC1)
    struct.pack_into("<H", head, 10, flags)
    struct.pack_into("<II", head, 0x01A2, 0, len(_piece_table(pieces)))
    return bytes(head) + b"".join(piece.encode("cp1252" if _narrow(piece) else "utf-16-le") for piece in pieces)


def _piece_table(pieces: tuple[str, ...]) -> bytes:
    ends, places, at = [0], b"", 1024
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
        narrow = _narrow(piece)
        places += struct.pack("<HIH", 0, (at * 2) | 0x40000000 if narrow else at, 0)
        at += len(piece) * (1 if narrow else 2)
    table = struct.pack(f"<{len(ends)}I", *ends) + places
    return b"\x01\x02\x00ab\x02" + struct.pack("<I", len(table)) + table


def ole(streams: Mapping[str, bytes]) -> bytes:
    """A compound file. Streams are made long enough that none is among the small ones."""
    table, sectors = [0xFFFFFFFD], b""
    directory = _entry("Root Entry", 5, 0xFFFFFFFE, 0)
    for name, content in streams.items():
        size = max(4096, -(-len(content) // 512) * 512)
        first = len(table)
        table += [*range(first + 1, first + size // 512), 0xFFFFFFFE]
        sectors += content.ljust(size, b"\0")
        directory += _entry(name, 2, first, size)
    place = len(table)
    table += [0xFFFFFFFE]
    header = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(16) + struct.pack("<HHHHH", 62, 3, 0xFFFE, 9, 6) + bytes(10)
    header += struct.pack("<IIIIIIIII", 1, place, 0, 4096, 0xFFFFFFFE, 0, 0xFFFFFFFE, 0, 0)
    header += struct.pack("<108I", *[0xFFFFFFFF] * 108)
    packed = struct.pack(f"<{len(table)}I", *table).ljust(512, b"\xff")
    return header[:512] + packed + sectors + directory.ljust(512, b"\0")


def _entry(name: str, kind: int, first: int, size: int) -> bytes:
    encoded = (name + "\0").encode("utf-16-le")
    return (
        encoded.ljust(64, b"\0")
        + struct.pack("<HB", len(encoded), kind)
        + bytes(49)
        + struct.pack("<III", first, size, 0)
    )
