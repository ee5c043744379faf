"""Cutting text: sizes hold by the real tokenizer, places are exact, nothing is lost."""

from __future__ import annotations

import base64
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from semantic_text_splitter import TextSplitter

from afterglow.contracts import Chunk
from afterglow.errors import Unreadable
from afterglow.ingest import chunk as chunk_module
from afterglow.ingest.chunk import VOCABULARY_OF, TokenCounter, chunks
from afterglow.ingest.extract import PageSpan

COUNTER = TokenCounter()
PROSE = (
    "The mouse ran through the old house, looking for cheese; there was none. It sighed! What now?\n"
    "Nobody knew, least of all the cat (who slept). “Tomorrow,” it thought… and tomorrow came.\n\n"
)
_random = random.Random(7)
TEXTS = {
    "prose": PROSE * 40,
    "one line": PROSE.replace("\n", " ") * 40,
    "german": "Die Donaudampfschifffahrtsgesellschaft fährt über die Größenverhältnisse hinweg. " * 60,
    "russian": "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 60,
    "chinese": "这是一个中文文本，我们正在测试分块。希望它可以工作！" * 60,
    "rare characters": "".join(chr(_random.randint(0x4E00, 0x9FA5)) for _ in range(1500)),
    "thai": "สวัสดีครับผมชื่อสมชายและอาศัยอยู่ในกรุงเทพมหานครประเทศไทย" * 30,
    "korean": "이것은 한국어 텍스트입니다. 나누기를 시험합니다. " * 60,
    "families": "👩‍👩‍👧‍👦🇩🇪✈️" * 150,
    "rare signs": "\U00079705" * 300 + "ab " * 40 + "\U000e0001" * 300,
    "code": "def f(x):\n    for y in range(10):\n        print(x, y)\n\n\nclass A:\n    pass\n\n" * 60,
    "base64": base64.b64encode(_random.randbytes(4000)).decode(),
    "digits": "".join(_random.choices("0123456789", k=6000)),
    "table": "Name: Ada; Born: 1815-12-10; Town: London; Note: wrote the first program | yes\n" * 60,
    "rules": ("=" * 70 + "\n" + "-" * 70 + "\n") * 30,
    "letters": "a" * 8000,
    "all planes": "".join(chr(_random.choice([*range(32, 0xD800), *range(0x10000, 0x11000)])) for _ in range(1500)),
}


def cut(
    text: str, max_tokens: int = 800, overlap_tokens: int = 400, pages: list[PageSpan] | None = None
) -> list[Chunk]:
    return chunks(text, pages, max_tokens, overlap_tokens, COUNTER)


def fits(text: str, tokens: int) -> bool:
    """By the tokenizer itself: a text that it need not cut. A single character cannot be cut, so it is shown twice."""
    if len(text) == 1:
        return len(text.encode()) <= tokens
    return len(TextSplitter.from_tiktoken_model(VOCABULARY_OF, tokens, trim=False).chunks(text)) == 1


@pytest.mark.parametrize(("max_tokens", "overlap_tokens"), [(100, 50), (250, 0), (800, 400)])
@pytest.mark.parametrize("name", TEXTS)
def test_no_chunk_is_too_large(name: str, max_tokens: int, overlap_tokens: int) -> None:
    """By the real tokenizer no chunk has more tokens than asked for, in any script, and most are well filled."""
    found = cut(TEXTS[name], max_tokens, overlap_tokens)
    assert all(fits(chunk.text, max_tokens) for chunk in found)
    assert all(chunk.tokens <= max_tokens for chunk in found)
    if len(found) > 2:
        assert sum(chunk.tokens for chunk in found[:-1]) > 0.55 * max_tokens * (len(found) - 1)


@pytest.mark.parametrize("name", TEXTS)
def test_chunks_cover_the_text_and_overlap(name: str) -> None:
    """Places are exact, nothing but white space lies between chunks, and neighbours share about what was asked."""
    text = TEXTS[name]
    found = cut(text, 200, 100)
    assert [chunk.index for chunk in found] == list(range(len(found)))
    assert all(text[chunk.start : chunk.end] == chunk.text for chunk in found)
    assert not text[: found[0].start].strip()
    assert not text[found[-1].end :].strip()
    for left, right in pairwise(found):
        assert left.start < right.start < left.end < right.end
        shared = COUNTER.count(text[right.start : left.end])
        assert 20 <= shared <= 125


def test_without_overlap_chunks_do_not_overlap() -> None:
    """overlap_tokens 0 means none, and still nothing is lost."""
    text = TEXTS["prose"]
    for left, right in pairwise(cut(text, 100, 0)):
        assert left.end <= right.start
        assert not text[left.end : right.start].strip()


@pytest.mark.parametrize("text", ["", " ", "\n\n \t\n" * 50, "\u3000" * 3000])
def test_white_space_gives_no_chunks(text: str) -> None:
    """There is nothing to find in it."""
    assert cut(text) == []


def test_a_small_text_is_one_chunk() -> None:
    """What fits is not cut; white space around it is left out, but not its indentation."""
    assert [(chunk.text, chunk.start, chunk.end) for chunk in cut("\n\n    x = 1\n    y\n\n")] == [
        ("    x = 1\n    y", 2, 17)
    ]


def test_chunks_begin_at_headings_and_paragraphs() -> None:
    """Where a section or paragraph ends near the full size, the cut is there."""
    section = "## Part\n\n" + PROSE * 3
    found = cut(section * 30, 180, 0)
    assert all(chunk.text.startswith("## Part") for chunk in found)
    paragraphs = cut(("word " * 30 + "end of it.\n\n") * 40, 100, 0)
    assert all(chunk.text.endswith("end of it.") for chunk in paragraphs)


def test_code_keeps_its_indentation() -> None:
    """A chunk that begins at an indented line begins with its indentation."""
    code = "class A:\n" + "".join(f"    def f{n}(self):\n        return {n}\n\n" for n in range(200))
    assert all(chunk.text.startswith(("    ", "class")) for chunk in cut(code, 100, 50))


def test_words_and_characters_stay_whole() -> None:
    """No cut is inside a word or inside a character of several code points."""
    for left, right in pairwise(cut(TEXTS["one line"], 100, 0)):
        assert TEXTS["one line"][left.end : right.start].isspace()
    assert all(chunk.text[0] in "👩🇩✈" for chunk in cut(TEXTS["families"], 100, 0))


def test_the_page_is_that_of_the_start() -> None:
    """A chunk that runs over the end of a page belongs to the page it begins on."""
    text = PROSE * 30
    middle = len(text) // 2
    pages = [PageSpan(1, 0, middle), PageSpan(2, middle, len(text))]
    found = cut(text, 100, 50, pages)
    assert [chunk.page for chunk in found] == [1 if chunk.start < middle else 2 for chunk in found]
    assert {chunk.page for chunk in found} == {1, 2}
    assert cut(text)[0].page is None


def test_too_many_tokens_are_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of more tokens than the API takes is refused with the recorded message."""
    monkeypatch.setattr(chunk_module, "MAX_FILE_TOKENS", 1000)
    with pytest.raises(Unreadable, match="because it is too large"):
        cut(PROSE * 100)


def test_the_memory_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter forgets what it has learned before that is too much, and counts the same after."""
    monkeypatch.setattr(chunk_module, "_MOST_REMEMBERED", 100)
    counter, before = TokenCounter(), TokenCounter()
    words = [f"{_random.randbytes(4).hex()} and {_random.randbytes(3).hex()}" for _ in range(200)]
    assert [counter.count(text) for text in words] == [before.count(text) for text in words]
    assert len(counter._known) < 200


PIECES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40) | st.text("ab .\n#é中", min_size=1)


@settings(deadline=None, max_examples=100)
@given(
    text=st.lists(st.builds(lambda piece, times: piece * times, PIECES, st.integers(1, 60)), max_size=6).map("".join),
    max_tokens=st.integers(100, 300),
    overlap=st.floats(0, 0.5),
)
def test_any_text(text: str, max_tokens: int, overlap: float) -> None:
    """Whatever the text: exact places, all of it covered, and no chunk too large."""
    found = cut(text, max_tokens, int(max_tokens * overlap))
    assert all(text[chunk.start : chunk.end] == chunk.text and chunk.text.strip() for chunk in found)
    assert all(fits(chunk.text, max_tokens) for chunk in found)
    covered = 0
    for chunk in found:
        assert not text[covered : chunk.start].strip()
        covered = chunk.end
    assert not text[covered:].strip()
