"""Which reader a file needs, and how its bytes become clean text. No I/O: callers give the bytes.

What a file is says its content first and its name second: a PDF named .txt is read as a PDF. The readers of the
formats that are no plain text are beside this file; `read.py` calls the right one.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Literal, NamedTuple

import msgspec
from charset_normalizer import from_bytes

from afterglow.errors import Unreadable

Format = Literal["pdf", "docx", "pptx", "xlsx", "doc", "html", "json", "csv", "text"]

MAX_TEXT_CHARS = 64_000_000  # far above 5,000,000 tokens of any script; keeps a bomb from filling the memory
MAX_TEXT_BYTES = 4 * MAX_TEXT_CHARS
_MAX_LAYOUT_CHARS = 20_000_000
EMPTY = "The file could not be parsed because it is empty."
TOO_LARGE = "The file could not be parsed because it is too large."


class PageSpan(NamedTuple):
    """A page (a slide, a sheet) of a text. number: 1…; start, end: code points in the text, end not included."""

    number: int
    start: int
    end: int


class Extracted(msgspec.Struct, frozen=True):
    """The text of a file. pages: None where the format has none. warnings: what was lost or guessed, in words."""

    text: str
    pages: list[PageSpan] | None = None
    title: str | None = None
    warnings: list[str] = []


# --- what is it? -----------------------------------------------------------------------------------------------

_TABLES = {"csv", "tsv", "tab"}
_MARKDOWN = {"md", "markdown", "mdx"}
_PAGES_OF_MARKUP = {"html", "htm", "xhtml"}
# Files that may begin like a web page and are none: their text is kept as it is.
_SOURCES = {"php", "js", "ts", "jsx", "tsx", "vue", "svelte", "md", "markdown", "py", "rb", "java", "go", "css", "tex"}
_SOURCES |= {"c", "cpp", "cs", "sh", "rst", "xml", "json", "yaml", "yml", "erb", "jinja", "j2"}

# Beginnings of files that hold no text for us, and what to call them.
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"II*\x00", "a TIFF image"),
    (b"MM\x00*", "a TIFF image"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\x00", "an xz archive"),
    (b"(\xb5/\xfd", "a Zstandard archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"\x7fELF", "a program"),
    (b"\xca\xfe\xba\xbe", "a program"),
    (b"\xcf\xfa\xed\xfe", "a program"),
    (b"MZ\x90\x00", "a program"),
    (b"SQLite format 3\x00", "a SQLite database"),
    (b"PAR1", "a Parquet table"),
    (b"OggS", "a sound or a film"),
    (b"ID3", "a sound"),
    (b"fLaC", "a sound"),
    (b"\x1aE\xdf\xa3", "a film"),
    (b"{\\rtf", "an RTF document; save it as .docx or PDF, and upload that"),
    (b"%!PS", "a PostScript document; save it as PDF, and upload that"),
)
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"


def extension(name: str) -> str:
    """The ending of a file's name in small letters, without its dot; empty when it has none."""
    stem, dot, ending = name.rpartition(".")
    return ending.strip().lower() if dot and stem and "/" not in ending else ""


def binary_format_of(head: bytes, name: str) -> Literal["pdf", "zip", "ole"] | None:
    """What the first kilobyte says: a format that is no plain text, or None.

    Raises Unreadable for a file that is known and cannot be searched.
    """
    start = head.lstrip(b"\xef\xbb\xbf\r\n\t ")
    if start.startswith(b"%PDF-") or (extension(name) == "pdf" and b"%PDF-" in head):
        return "pdf"
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if head.startswith(_OLE):
        return "ole"
    for magic, noun in _FOREIGN:
        if head.startswith(magic) and not (magic.isascii() and magic.isalnum() and looks_like_text(head)):
            raise unsupported(f"it is {noun}")
    if head[:4] == b"RIFF" and head[8:12] in (b"WEBP", b"WAVE", b"AVI "):
        raise unsupported("it is an image, a sound or a film")
    if head[4:8] == b"ftyp":
        raise unsupported("it is a film or a photo")
    return None


def text_format_of(text: str, name: str) -> Literal["html", "json", "csv", "text"]:
    """How to read what turned out to be text."""
    ending = extension(name)
    if ending in _PAGES_OF_MARKUP:
        return "html"
    if ending in _TABLES:
        return "csv"
    if ending == "json":
        return "json"
    if ending not in _SOURCES and re.match(r"\s*(<!doctype\s+html|<html[\s>])", text[:1000], re.IGNORECASE):
        return "html"
    return "text"


def unsupported(why: str) -> Unreadable:
    return Unreadable("unsupported_file", f"The file could not be parsed because {why}.")


def invalid(why: str) -> Unreadable:
    return Unreadable("invalid_file", f"The file could not be parsed because {why}.")


def too_large() -> Unreadable:
    return Unreadable("invalid_file", TOO_LARGE)


# --- bytes to text ---------------------------------------------------------------------------------------------

_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\b\x1b")) + b"\x7f"
_ASCII = bytes(range(128))
_SAMPLE = 65_536
_BOMS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)


def looks_like_text(data: bytes) -> bool:
    """Whether bytes of an encoding that contains ASCII could be text: hardly any control characters."""
    return len(data) - len(data.translate(None, _CONTROLS)) <= len(data) // 50


def decode(data: bytes, declared: str | None = None) -> tuple[str, list[str]]:
    """Text of any encoding, made clean, and warnings.

    By its mark, as UTF-8, as UTF-16 without a mark, as `declared` (what the document says of itself), and at last by
    what its bytes look like. Raises Unreadable for what is no text.
    """
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            return _decode_as(data[len(mark) :], encoding)
    if unmarked := _utf16_without_mark(data):
        return _decode_as(data, unmarked)
    if not all(looks_like_text(sample) for sample in _samples(data)):
        raise unsupported("it holds binary data and no text")
    try:
        return clean(data.decode("utf-8")), []
    except UnicodeDecodeError:
        return _decode_other(data, declared)


def _samples(data: bytes) -> list[bytes]:
    middle = len(data) // 2
    return [data[:_SAMPLE], data[middle : middle + _SAMPLE], data[-_SAMPLE:]]


def _utf16_without_mark(data: bytes) -> str | None:
    """Zeros that make sense as halves of characters: then nearly every character is one that can be seen."""
    head = data[: min(4096, len(data) // 2 * 2)]
    if 0 not in head or len(data) % 2 or _is_utf8(head):
        return None
    texts = {encoding: head.decode(encoding, "replace") for encoding in ("utf-16-le", "utf-16-be")}
    likely = max(texts, key=lambda encoding: sum(character < "\x80" for character in texts[encoding]))
    visible = sum(character.isprintable() or character.isspace() for character in texts[likely])
    return likely if visible > 0.97 * len(texts[likely]) else None


def _is_utf8(head: bytes) -> bool:
    """Whether the beginning of a text is UTF-8 with a stray zero, of which UTF-16 would make other letters."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return looks_like_text(head)


def _decode_as(data: bytes, encoding: str) -> tuple[str, list[str]]:
    text = data.decode(encoding, "replace")
    own = "\ufffd".encode(encoding, "ignore")  # the character itself, where the encoding has it
    lost = text.count("\ufffd") - (data.count(own) if own else 0)
    if lost > max(4, len(text) // 10):
        raise unsupported("it holds binary data and no text")
    return clean(text), [f"{lost} characters could not be decoded as {encoding}"] if lost > 0 else []


def _decode_other(data: bytes, declared: str | None) -> tuple[str, list[str]]:
    """What is no clean UTF-8: damaged UTF-8 when nearly all beyond ASCII can be read as such, else an old encoding."""
    text = data.decode("utf-8", "replace")
    lost = text.count("\ufffd")
    if 10 * lost <= len(data.translate(None, _ASCII)):
        return clean(text), [f"{lost} characters could not be decoded as utf-8"]
    encoding = _known_encoding(declared) or _guess_encoding(data)
    text, warnings = _decode_as(data, encoding)
    return text, [*warnings, f"the encoding was taken to be {encoding}"]


def _known_encoding(declared: str | None) -> str | None:
    if declared is None:
        return None
    try:
        b"\xe9".decode(declared, "replace")  # codecs of domain names are no encodings of text, and raise
    except (LookupError, UnicodeError):
        return None
    return None if declared.lower().startswith(("utf", "u8")) else declared


# The encodings that files of some age have, and for those of Latin letters, which are hard to tell apart, the letters
# that their languages use. Of equals the first is taken.
_OLD_ENCODINGS = ["cp1252", "cp1251", "koi8_r", "cp1253", "cp1255", "cp1256", "cp874", "cp932", "euc_jp", "gb18030"]
_OLD_ENCODINGS += ["big5", "cp949"]
_LATIN_LETTERS = {
    "cp1252": "àâäáãåæçéèêëíìîïñóòôöõøœúùûüßÀÂÄÁÃÅÆÇÉÈÊËÍÎÑÓÔÖÕØŒÚÜ“”‘’–—…«»",
    "cp1250": "áäąăâčćçďéěęëíîľĺłňńóôöőŕřšśşťţúůüűýžźżßÁÄČĆĎÉŁÓÖŘŠŚŤÚŮÜŽŹŻ“”„‘’–—…«»",
    "iso8859-2": "áäąăâčćçďéěęëíîľĺłňńóôöőŕřšśşťţúůüűýžźżßÁÄČĆĎÉŁÓÖŘŠŚŤÚŮÜŽŹŻ",
    "cp1254": "âçğıîöşûüÂÇĞİÖŞÜ“”‘’–—…«»",
}


def _guess_encoding(data: bytes) -> str:
    """From the lines that are not ASCII, which are few in most languages and say it all."""
    telling = b"\n".join(line for line in data[: 8 * _SAMPLE].split(b"\n") if not line.isascii())[:_SAMPLE]
    telling = telling or data[-_SAMPLE:]
    best = from_bytes(telling, cp_isolation=_OLD_ENCODINGS).best()
    if best is not None and best.encoding != "cp1252":
        return best.encoding
    beyond = telling.translate(None, _ASCII)

    def familiar(encoding: str) -> int:
        text, letters = beyond.decode(encoding, "replace"), _LATIN_LETTERS[encoding]
        return sum(map(text.count, letters))

    return max(_LATIN_LETTERS, key=familiar)


_UNCLEAN = re.compile("[\x00\ud800-\udfff]")


def clean(text: str) -> str:
    """Lines end in \\n; NULs and lone surrogates become U+FFFD."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _UNCLEAN.sub("\ufffd", text)


# --- readers of text -------------------------------------------------------------------------------------------


def read_text(text: str, name: str) -> Extracted:
    """Prose, markdown and code stay as they are. The title is the first heading of markdown."""
    heading = re.match(r"\s*# +(.+)", text[:2000]) if extension(name) in _MARKDOWN else None
    return Extracted(text, title=heading[1].strip(" #") if heading else None)


def read_json(text: str) -> Extracted:
    """JSON stays as it is, but is laid out when it is one huge line, which could not be cut well."""
    if not 2000 < len(text) < _MAX_LAYOUT_CHARS or "\n" in text.strip():
        return Extracted(text)
    try:
        return Extracted(clean(json.dumps(json.loads(text), ensure_ascii=False, indent=1)))
    except (ValueError, RecursionError):
        return Extracted(text, warnings=["it is no valid JSON, and was read as text"])


class TextBuilder:
    """Collects the text of a document and where its pages begin and end. Raises Unreadable when it is too much."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._length = 0
        self._page_start = 0
        self._pages: list[PageSpan] = []

    def add(self, text: str) -> None:
        self._parts.append(text)
        self._length += len(text)
        if self._length > MAX_TEXT_CHARS:
            raise too_large()

    def end_page(self) -> None:
        """What was added since the last page's end is a page. A blank line follows it."""
        self._pages.append(PageSpan(len(self._pages) + 1, self._page_start, self._length))
        self.add("\n\n")
        self._page_start = self._length

    def extracted(self, title: str | None = None, warnings: list[str] | None = None) -> Extracted:
        title = clean(title).strip() if title else None
        return Extracted("".join(self._parts), self._pages or None, title or None, warnings or [])
