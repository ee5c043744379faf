"""Reading files: each format gives its text, and what cannot be read says why."""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterglow.errors import Unreadable
from afterglow.ingest.extract import EMPTY, MAX_TEXT_CHARS, TOO_LARGE, Extracted, TextBuilder, decode
from afterglow.ingest.read import read
from tests import documents
from tests.documents import W, docx, paragraph, pdf, pptx, slide_text, xlsx, zipped

TABLE = "<w:tbl><w:tr>{}</w:tr></w:tbl>"
CELL = "<w:tc>{}</w:tc>"


def extracted(data: bytes, name: str) -> Extracted:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        return read(file, name)


def text_of(data: bytes, name: str = "file.txt") -> str:
    return extracted(data, name).text.strip()


def why_not(data: bytes, name: str = "file.txt") -> Unreadable:
    with pytest.raises(Unreadable) as failure:
        extracted(data, name)
    return failure.value


# --- text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("text", ["plain", "Grüße\naus Köln", "日本語の文章\nです。", "Привет, мир"])
def test_unicode_with_and_without_marks(encoding: str, text: str) -> None:
    """UTF-8, UTF-16 and UTF-32 are read, with a mark or, the first two, without."""
    if encoding in ("utf-16-le", "utf-16-be") and "\n" not in text and " " not in text and not text.isascii():
        pytest.skip("without one zero byte nothing tells it from other encodings")
    assert text_of(text.encode(encoding)) == text


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "Le café est très bon, où êtes-vous allé? “Voilà” une phrase."),
        ("cp1250", "Zażółć gęślą jaźń, żółw idzie przez łąkę. Świat jest piękny."),
        ("cp1254", "Türkçe bir metin: şimdi ğ ve ı harfleri çok önemli, İstanbul'da."),
        ("cp1251", "Съешь же ещё этих мягких французских булок, да выпей чаю."),
        ("shift_jis", "これは日本語の文章です。文字コードの判定を試します。"),
        ("gb18030", "这是一个中文文本。我们正在测试编码检测。希望它可以工作。"),
        ("euc_kr", "이것은 한국어 텍스트입니다. 인코딩 감지를 테스트합니다."),
    ],
)
def test_old_encodings(encoding: str, text: str) -> None:
    """Encodings of before Unicode are recognised, and a warning says that it was a guess."""
    found = extracted(text.encode(encoding), "old.txt")
    assert found.text == text
    assert "the encoding was taken to be" in found.warnings[-1]


def test_a_damaged_byte_costs_one_character() -> None:
    """UTF-8 with one bad byte among many good ones stays UTF-8."""
    data = "äöü".encode() * 20 + b"\xff" + b" end"
    found = extracted(data, "a.txt")
    assert found.text == "äöü" * 20 + "\ufffd end"
    assert found.warnings == ["1 characters could not be decoded as utf-8"]


def test_zeros_become_the_replacement_character() -> None:
    """NULs in text, and halves of surrogate pairs, become U+FFFD; lines end in \\n."""
    assert text_of(b"one\0two\r\nthree\r" + b"x" * 100) == "one\ufffdtwo\nthree\n" + "x" * 100
    assert decode(b"\xff\xfe" + "a\ud800b".encode("utf-16-le", "surrogatepass"))[0] == "a\ufffdb"


@pytest.mark.parametrize("text", [b"id,name\n" + b"1,foo\n2,bar\n" * 200 + b"\0\n", b'{"key":"a-b-c"}\n' * 9 + b"\0\n"])
def test_a_stray_zero_makes_no_other_letters(text: bytes) -> None:
    """A text with a NUL in it is not taken for UTF-16, whose letters could be made of pairs of its own."""
    assert text_of(text) == text.decode().replace("\0", "\ufffd").strip()


@pytest.mark.parametrize("codec", ["idna", "punycode", "hex", "undefined"])
def test_a_page_may_name_a_codec_that_is_no_encoding(codec: str) -> None:
    """What a web page says of its encoding is believed only when text can be read so."""
    page = f'<meta charset="{codec}"><p>Le café est très bon, où êtes-vous allé?'.encode("cp1252")
    assert text_of(page, "a.html") == "Le café est très bon, où êtes-vous allé?"


@pytest.mark.parametrize("data", [bytes(range(256)) * 8, b"\0" * 1000, b"text " * 30_000 + bytes(range(32)) * 4000])
def test_binary_is_no_text(data: bytes) -> None:
    """Binary data under a text's name is refused, wherever in the file it is."""
    failure = why_not(data, "notes.txt")
    assert failure.code == "unsupported_file"
    assert failure.message == "The file could not be parsed because it holds binary data and no text."


def test_an_empty_file_has_the_recorded_message() -> None:
    """No bytes at all: the API's own words; white space alone: nearly so."""
    assert (why_not(b"").code, why_not(b"").message) == ("invalid_file", EMPTY)
    assert why_not(b" \n\t \n").message == EMPTY


def test_code_is_kept_exactly() -> None:
    """Source code and markdown keep every space."""
    source = "def f(x):\n\treturn  x   # <html>\n\n\n"
    assert extracted(source.encode(), "f.py").text == source
    assert extracted(b"<!DOCTYPE html><?php echo 1 ?>\n", "page.php").text == "<!DOCTYPE html><?php echo 1 ?>\n"


def test_a_heading_of_markdown_is_the_title() -> None:
    """The first heading of markdown is its title; a comment of a script is none."""
    assert extracted(b"# The Guide #\n\ntext", "guide.md").title == "The Guide"
    assert extracted(b"# a comment\nls", "run.sh").title is None


def test_json_in_one_line_is_laid_out() -> None:
    """One huge line of JSON gets lines; other JSON stays as it is, also when it is broken or too deep."""
    data = {"key": ["värde"] * 500}
    assert text_of(json.dumps(data).encode(), "a.json").count("\n") > 500
    assert text_of(b'{"a":\n 1}', "a.json") == '{"a":\n 1}'
    assert extracted(b"[" * 5000, "deep.json").warnings == ["it is no valid JSON, and was read as text"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x89PNG\r\n\x1a\n....", "a PNG image"),
        (b"\xff\xd8\xff\xe0....", "a JPEG image"),
        (b"\x1f\x8b\x08....", "a gzip archive"),
        (b"{\\rtf1 hello}", "an RTF document; save it as .docx or PDF"),
        (b"SQLite format 3\0....", "a SQLite database"),
        (b"RIFF1234WEBPVP8 ", "an image, a sound or a film"),
        (zipped({"a.txt": "text"}), "a zip archive; unpack it"),
        (
            zipped({"content.xml": "<a/>", "mimetype": "application/vnd.oasis"}),
            "an OpenDocument file; save it as .docx",
        ),
        (documents.ole({"Workbook": b""}), "an old Excel workbook; save it as .xlsx"),
        (documents.ole({"PowerPoint Document": b""}), "an old PowerPoint presentation; save it as .pptx"),
    ],
)
def test_what_is_known_and_cannot_be_read_is_named(data: bytes, words: str) -> None:
    """Images, archives and old formats are refused by their names, whatever the file is called, with what to do."""
    failure = why_not(data, "report.txt")
    assert failure.code == "unsupported_file"
    assert words in failure.message


def test_text_that_begins_like_a_sound_is_text() -> None:
    """A magic number of plain letters does not make text a sound or an image."""
    assert text_of(b"ID3 tags are explained here.") == "ID3 tags are explained here."
    assert text_of(b"GIF89a is the name of a format.") == "GIF89a is the name of a format."


# --- formats ---------------------------------------------------------------------------------------------------


def test_html() -> None:
    """Headings, lists, tables and preformatted text stay readable; scripts and styles go; entities are read."""
    page = b"""<html><head><title>Trip &amp; tour</title><style>p{}</style><script>if (a<b) x()</script></head>
    <body><h2>First   <b>part</b></h2><p>One<br>two &eacute;</p><ul><li>a<li><p>b</p></ul>
    <table><tr><th>Name<th>Age</tr><tr><td>Ada</td><td>36</td></tr></table><pre>x = 1
      y</pre><img alt="a map"></body></html>"""
    assert text_of(page, "page.txt") == (
        "# Trip & tour\n\n## First part\n\nOne\ntwo é\n\n- a\n- b\n\nName | Age\nAda | 36\n\nx = 1\n      y\n\na map"
    )


def test_html_of_an_old_encoding() -> None:
    """A page that names its encoding is read by it."""
    page = '<html><meta charset="iso-8859-7"><p>αβγ δεζ</p></html>'.encode("iso-8859-7")
    assert text_of(page, "a.html") == "αβγ δεζ"


@pytest.mark.parametrize(
    "markup", ["<div>" * 100_000 + "x", "<![x[y", "<!" * 5000 + "<p>x", "<a b='" * 1000, "&#x110000;x"]
)
def test_broken_and_deep_html(markup: str) -> None:
    """Depth and broken markup cost no more than their length."""
    read_or_refused(markup.encode(), "a.html")


def test_docx() -> None:
    """A Word document: headings, lists, tables, notes, headers and the title."""
    body = (
        paragraph("Part", "H2")
        + "<w:p><w:pPr><w:numPr/></w:pPr><w:r><w:t>item</w:t><w:tab/><w:t>more</w:t></w:r></w:p>"
        + TABLE.format(CELL.format(paragraph("a") + paragraph("b")) + CELL.format(paragraph("c")))
        + "<w:p><w:del><w:r><w:delText>gone</w:delText><w:t>gone</w:t></w:r></w:del><w:r><w:t>Noted</w:t></w:r>"
        + '<w:footnoteReference w:id="2"/></w:p>'
    )
    notes = f'<w:footnotes {W}><w:footnote w:id="2">{paragraph("the note")}</w:footnote></w:footnotes>'
    header = f"<w:hdr {W}>{paragraph('Company')}{paragraph('7')}</w:hdr>"
    found = extracted(docx(body, footnotes=notes, header=header), "a.docx")
    assert found.text.strip() == "## Part\n\n- item\tmore\na b | c\n\nNoted[2]\n\n[2] the note\nCompany"
    assert (found.title, found.pages) == ("The Title", None)


def test_lines_of_office_documents_end_as_others_do() -> None:
    """A carriage return that is written as a reference, which XML itself keeps, ends a line."""
    assert text_of(docx(paragraph("one&#13;two")), "a.docx") == "one\ntwo"


def test_docx_text_box_is_read_once() -> None:
    """Of what is there twice, for old programs, one is read."""
    box = (
        '<w:p><w:r><mc:AlternateContent xmlns:mc="m"><mc:Choice><w:t>box</w:t></mc:Choice>'
        "<mc:Fallback><w:t>box</w:t></mc:Fallback></mc:AlternateContent></w:r></w:p>"
    )
    assert text_of(docx(box), "a.docx") == "box"


def test_pptx() -> None:
    """A presentation: a page for each slide in the order shown, titles as headings, with notes."""
    data = pptx(
        slide_text("One", "title") + slide_text("body of one"), slide_text("Two", "ctrTitle"), notes="say hello"
    )
    found = extracted(data, "a.pptx")
    pages = [(page.number, found.text[page.start : page.end].strip()) for page in found.pages or []]
    assert pages == [(1, "# Two"), (2, "# One\n\nbody of one\n\nNotes:\n\nsay hello")]


def test_xlsx() -> None:
    """A workbook: a page for each sheet; rows say the names of their columns; dates are dates."""
    head = '<row><c r="A1" t="s"><v>0</v></c><c r="C1" t="s"><v>1</v></c></row>'
    row = '<row><c r="A2" t="s"><v>2</v></c><c r="C2" s="1"><v>44197.5</v></c><c r="D2" t="b"><v>1</v></c></row>'
    other = '<row><c t="inlineStr"><is><t>only</t></is></c></row><row><c><f>1/3</f><v>0.30000000000000004</v></c></row>'
    found = extracted(xlsx(People=head + row, Other=other), "a.xlsx")
    pages = [found.text[page.start : page.end].strip() for page in found.pages or []]
    assert pages == ["# People\n\nName | Born\nName: Ada; Born: 2021-01-01 12:00; TRUE", "# Other\n\nonly\n0.3"]


def test_xlsx_numbers_can_be_found() -> None:
    """As they are shown: fractions without noise, and every digit of a long whole number."""
    cells = "".join(
        f"<c><v>{raw}</v></c>" for raw in ("4111111111111111", "-12345678901234567890", "0.1000000000000001")
    )
    assert text_of(xlsx(A=f"<row>{cells}</row>"), "a.xlsx").endswith("4111111111111111 | -12345678901234567890 | 0.1")


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ("Name,Town\nAda,London\n", "a.csv"),
        ("Name;Town\nAda;London\n", "a.csv"),
        ("Name\tTown\r\nAda\tLondon\r\n", "a.tsv"),
        ('"Name"|"Town"\n"Ada"|"London"\n', "A.CSV"),
    ],
)
def test_csv(table: str, name: str) -> None:
    """Tables of any usual dialect: every row says the names of its columns."""
    assert text_of(table.encode(), name) == "Name | Town\nName: Ada; Town: London"


def test_csv_without_a_header() -> None:
    """A first row with numbers is no header; cells of several lines become one."""
    assert text_of(b'1,"a\nb"\n2,c\n', "a.csv") == "1 | a b\n2 | c"


def test_pdf() -> None:
    """Pages are numbered from 1, words cut at line ends are put together, and the title is known."""
    found = extracted(
        pdf("First page of infor-\nmation, well-\nknown.", "Second. A well-known page.", title="Doc"), "a.txt"
    )
    pages = [(page.number, found.text[page.start : page.end]) for page in found.pages or []]
    assert pages[0][0] == 1
    assert "information" in pages[0][1]
    assert "well-known" in pages[0][1]
    assert pages[1] == (2, "Second. A well-known page.")
    assert found.title == "Doc"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pdf("", ""), "it has no text: it seems to be scanned images"),
        (pdf("secret", trailer=documents.LOCKED), "it is protected by a password"),
        (b"%PDF-1.7\n" + b"\xff\x00junk" * 100, "it is a damaged PDF"),
    ],
)
def test_pdf_without_text(data: bytes, words: str) -> None:
    """A scanned, a locked and a broken PDF each say what they are."""
    failure = why_not(data, "a.pdf")
    assert failure.code == "invalid_file"
    assert words in failure.message


def test_doc() -> None:
    """An old Word document is read by its table of pieces; fields show their result."""
    data = documents.doc("Caf\xe9 \x13 HYPERLINK x \x14link\x15\r", "日本語\r")
    assert text_of(data, "old.doc") == "Café link\n\n日本語"


def test_locked_office_documents() -> None:
    """Documents with a password say so: the new kind, and the old."""
    assert "protected by a password" in why_not(documents.ole({"EncryptedPackage": b"x"}), "a.docx").message
    assert "protected by a password" in why_not(documents.doc("text", flags=0x0300), "a.doc").message


# --- wrong names and hostile content -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (docx(paragraph("hello")), "hello"),
        (pdf("hello"), "hello"),
        (documents.doc("hello"), "hello"),
        (b"hello", "hello"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.pdf", "a.DOCX", "a", "a.xlsx", "a.exe", ".docx", "a/../b.png"])
def test_content_wins_over_the_name(data: bytes, text: str, name: str) -> None:
    """A file is read for what it is, whatever it is called."""
    assert text_of(data, name) == text


def test_entities_are_refused() -> None:
    """A document type in a document's XML, the door to entity bombs, ends the reading."""
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>' + f"<w:document {W}>&b;</w:document>"
    data = zipped({"word/document.xml": bomb})
    assert "declares a document type" in why_not(data, "a.docx").message


def test_zip_bombs_are_refused_unopened() -> None:
    """A part that unpacks to hundreds of times its size is not unpacked."""
    assert why_not(zipped({"word/document.xml": b" " * 20_000_000}), "a.docx").message == TOO_LARGE


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packings_of_other_archives_are_refused(packing: int) -> None:
    """Parts are unpacked by the one method that office programs use; others need more memory, and fail otherwise."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive:
        archive.writestr("word/document.xml", f"<w:document {W}>{paragraph('hello')}</w:document>")
    failure = why_not(file.getvalue(), "a.docx")
    assert (failure.code, "packed in a way" in failure.message) == ("invalid_file", True)


def test_names_inside_archives_mean_nothing() -> None:
    """A document that points to files outside itself reads nothing of them."""
    rels = documents.relations(a="footnotes:../../../../etc/passwd", b="footnotes:/etc/passwd")
    data = zipped(
        {
            "word/document.xml": f"<w:document {W}>{paragraph('inside')}</w:document>",
            "word/_rels/document.xml.rels": rels,
            "../../etc/evil": "x",
        }
    )
    assert text_of(data, "a.docx") == "inside"


def test_depth_in_a_document_is_no_depth_here() -> None:
    """Tables in tables, ten thousand deep, are read without recursion."""
    deep = "<w:tbl><w:tr><w:tc>" * 10_000 + paragraph("core") + "</w:tc></w:tr></w:tbl>" * 10_000
    assert text_of(docx(deep), "a.docx") == "core"


def test_too_much_text_is_too_large() -> None:
    """A document that grows without end is stopped on the way."""
    text = TextBuilder()
    for _ in range(10):
        text.add("x" * (MAX_TEXT_CHARS // 10))
    with pytest.raises(Unreadable, match="too large"):
        text.add("x" * 10)


SAMPLES: dict[str, Callable[[], bytes]] = {
    "a.docx": lambda: docx(paragraph("hello") * 3),
    "a.pptx": lambda: pptx(slide_text("hello"), notes="n"),
    "a.xlsx": lambda: xlsx(One='<row><c r="A1" t="s"><v>0</v></c></row>'),
    "a.doc": lambda: documents.doc("hello " * 50),
    "a.html": lambda: b"<html><p>hello<table><tr><td>x</table><pre>y" * 3,
    "a.csv": lambda: b'a,"b"\n1,2\n' * 9,
    "a.json": lambda: b'{"a": [1, 2]}' * 9,
    "a.txt": lambda: "hällo\n".encode() * 9,
}


@pytest.mark.parametrize("name", SAMPLES)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_damage_gives_text_or_a_clear_failure(name: str, data: st.DataObject) -> None:
    """A file with changed bytes, or cut short, is read or refused, and nothing else happens."""
    content = bytearray(SAMPLES[name]())
    for place, byte in data.draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=8)
    ):
        content[place] = byte
    read_or_refused(bytes(content[: data.draw(st.integers(0, len(content)))]), name)


@settings(deadline=None, max_examples=150)
@given(
    head=st.sampled_from([b"", b"PK\x03\x04", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", b"<html>", b"\xff\xfe", b"{"]),
    data=st.binary(max_size=2000),
    name=st.sampled_from(["a.txt", "a.html", "a.csv", "a.json", "a.doc", "a.docx", ""]),
)
def test_random_bytes_give_text_or_a_clear_failure(head: bytes, data: bytes, name: str) -> None:
    """So is anything else."""
    read_or_refused(head + data, name)


def read_or_refused(content: bytes, name: str) -> None:
    try:
        found = extracted(content, name)
    except Unreadable:
        return
    found.text.encode()  # no lone surrogates
    assert "\0" not in found.text
    assert "\r" not in found.text
    assert all(0 <= page.start <= page.end <= len(found.text) for page in found.pages or [])
