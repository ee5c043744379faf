"""Where a text is cut into chunks. Pure: text in, places out.

A chunk ends at the strongest boundary near its full size: before a heading, at a blank line, at a line's or a
sentence's end, else between words. The next one begins about `overlap_tokens` earlier, at such a boundary too.

Sizes are tokens of cl100k_base, the vocabulary of the original's embedding model, which semantic-text-splitter carries
inside. Counting a text whole is slow (2.5 MB per second, and each passage would be counted twice). But the vocabulary
cuts a text into words first and each word on its own, so counts of words are remembered: 8 MB per second.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import accumulate

from semantic_text_splitter import TextSplitter

from afterglow.contracts import Chunk
from afterglow.ingest.extract import PageSpan, too_large

MAX_FILE_TOKENS = 5_000_000
VOCABULARY_OF = "gpt-4"

# --- counting --------------------------------------------------------------------------------------------------

# The vocabulary's own cut into words, but for two things that hardly change counts: words end after 24 letters or
# 16 signs, and letters of scripts that know no spaces, or are rare, stand alone. So there are few different words to
# remember, and none has many tokens.
_ALONE = "\xb2\xb3\xb9\xbc-\xbe\u0e00-\u1dff\u2000-\uabff\ud7b0-\U0010ffff"
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # without four that Python counts in
_WORD = re.compile(
    rf"'(?:[sdmtSDMT]|ll|ve|re)|(?:[^\r\n\w]|_)?(?:[^\W\d_{_ALONE}]{{1,24}}|[^\W\d_])|\d{{1,3}}"
    rf"| ?(?:[^\w{_SPACE}]|_){{1,16}}[\r\n]{{0,16}}"
    rf"|[{_SPACE}]{{0,64}}[\r\n]{{1,64}}|[{_SPACE}]{{1,64}}(?![^{_SPACE}])|[{_SPACE}]{{1,64}}|\w"
)
_MOST_REMEMBERED = 200_000


class TokenCounter:
    """Counts tokens, and remembers those of each word. The count is the vocabulary's, or a few in a hundred more;
    half as much again in languages whose words it hardly knows."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def count(self, text: str) -> int:
        return sum(self.measure(text)[1])

    def measure(self, text: str) -> tuple[list[str], list[int]]:
        """The words of a text, which together are the text, and the tokens of each."""
        words = _WORD.findall(text)
        try:
            return words, [*map(self._known.__getitem__, words)]
        except KeyError:
            self._learn(words)
            return words, [*map(self._known.__getitem__, words)]

    def _learn(self, words: list[str]) -> None:
        if len(self._known) > _MOST_REMEMBERED:
            self._known.clear()
        for word in set(words):
            if word not in self._known:
                self._known[word] = self._look_up(word)

    def _look_up(self, word: str) -> int:
        """How many tokens a word is cut into when each takes as much as it can, from left to right.

        The vocabulary cuts in another order, into as many at most, as a rule; where not, its own count is looked for.
        """
        if len(word) == 1:
            return _tokens_of_character(word)
        pieces = _splitter(1).chunks(word)
        if len(pieces) == 1:
            return 1
        # A piece of several characters is one token; a single character may be several, and cannot be cut.
        tokens = sum(1 if len(piece) > 1 or piece.isascii() else _tokens_of_character(piece) for piece in pieces)
        while len(_splitter(tokens).chunks(word)) > 1:
            tokens += 1
        return tokens


@lru_cache(maxsize=20_000)
def _tokens_of_character(character: str) -> int:
    """One to four: as many as bytes at most. Two of them on two lines can be cut apart, so they show their size."""
    for tokens in (1, 2, 3):
        if len(_splitter(2 * tokens + 1).chunks(f"{character}\n{character}")) == 1:
            return tokens
    return 4


@cache
def _splitter(tokens: int) -> TextSplitter:
    return TextSplitter.from_tiktoken_model(VOCABULARY_OF, tokens, trim=False)


# --- boundaries ------------------------------------------------------------------------------------------------

# How good a place is for a cut: a chunk may stay this part of its size smaller to end there.
WORD, SENTENCE, LINE, PARAGRAPH, SECTION = 0.0, 0.15, 0.18, 0.3, 0.55

_BOUNDARY = re.compile(
    r"(?P<lines>\n(?:[^\S\n]{0,200}\n)*)|[.!?…][\"'”’)\]]{0,3}(?=\s)|[。！？｡؟۔।॥][\"'”’」』）]{0,3}"
)
_HEADING = re.compile(r"#{1,6} ")
_RARE_TOKENS_PER_CHAR = 1.4  # Chinese has 1.2, English 0.25
_MARGIN_TOKENS = 4  # a chunk that begins or ends inside a word, or loses the space before its first, may have one more
_BLOCK_CHARS = 100_000
_WINDOW_CHARS = 4000  # the splitter looks at no more at once, so that one endless line takes no endless time


class _Atoms:
    """The text in pieces that are never cut: lines, sentences, parts of long ones.

    ends: where each ends; totals: tokens up to there; strengths: how good a place its end is for a cut. torn: those of
    the ends that are inside a word, which counts as a whole before it.
    """

    def __init__(self, text: str, most_tokens: int, counter: TokenCounter) -> None:
        self.ends: list[int] = []
        self.totals: list[int] = []
        self.strengths: list[float] = []
        self.torn: set[int] = set()
        for start, end in _blocks(text):
            block = _Block(text, start, end, self.totals[-1] if self.totals else 0, counter)
            if block.totals[-1] > MAX_FILE_TOKENS:
                raise too_large()
            for piece_start, piece_end, strength in _pieces(text, start, end):
                for cut in block.cuts(piece_start, piece_end, most_tokens):
                    self._add(cut, block.tokens_until(cut), WORD)
                    if not block.begins_word(cut):
                        self.torn.add(cut)
                self._add(piece_end, block.tokens_until(piece_end), strength)

    def _add(self, end: int, total: int, strength: float) -> None:
        self.ends.append(end)
        self.totals.append(total)
        self.strengths.append(strength)

    def tokens_before(self, atom: int) -> int:
        return self.totals[atom - 1] if atom else 0

    def start(self, atom: int) -> int:
        return self.ends[atom - 1] if atom else 0


class _Block:
    """Some lines of a text, measured as a whole: a word counts in the piece where it begins.

    starts: where its words begin, and its end; totals: the tokens of the text before each of these.
    """

    def __init__(self, text: str, start: int, end: int, total: int, counter: TokenCounter) -> None:
        self._text = text
        self.words, tokens = counter.measure(text[start:end])
        self.starts = [*accumulate(map(len, self.words), initial=start)]
        self.totals = [*accumulate(tokens, initial=total)]

    def tokens_until(self, place: int) -> int:
        return self.totals[bisect_left(self.starts, place)]

    def begins_word(self, place: int) -> bool:
        return self.starts[bisect_left(self.starts, place)] == place

    def cuts(self, start: int, end: int, most_tokens: int) -> Iterator[int]:
        """Where to cut a piece that is too long: between words; without spaces, where Unicode finds words."""
        first, last = bisect_left(self.starts, start), bisect_left(self.starts, end)
        tokens = self.totals[last] - self.totals[first]
        if tokens <= most_tokens:
            return
        line = self._text[start:end]
        if not line.isascii() and 20 * line.count(" ") < len(line):
            # Cut at the start of one, all words stay what they are. Among rare characters a word may be several signs.
            rare = tokens > _RARE_TOKENS_PER_CHAR * len(line)
            for cut in _unspaced_cuts(line, start, most_tokens):
                yield cut if rare else self.starts[bisect_left(self.starts, cut)]
            return
        total = self.totals[first]
        for word in range(first, last):
            size = self.totals[word + 1] - total
            if size > most_tokens or (2 * size > most_tokens and self.words[word][0].isspace()):
                yield self.starts[word]
                total = self.totals[word]


def _unspaced_cuts(line: str, start: int, most_tokens: int) -> Iterator[int]:
    splitter = _splitter(most_tokens)
    for at in range(0, len(line), _WINDOW_CHARS):
        for part in splitter.chunks(line[at : at + _WINDOW_CHARS]):
            start += len(part)
            yield start


def _blocks(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of runs of whole lines, none so long that its words fill the memory."""
    start = 0
    while start < len(text):
        end = start + _BLOCK_CHARS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield start, min(end, len(text))
        start = end


def _pieces(text: str, start: int, end: int) -> Iterator[tuple[int, int, float]]:
    """Start, end and strength of the end, of each sentence or line."""
    for boundary in _BOUNDARY.finditer(text, start, end):
        yield start, boundary.end(), _strength(text, boundary.end(), boundary["lines"])
        start = boundary.end()
    if start < end:
        yield start, end, WORD


def _strength(text: str, end: int, lines: str | None) -> float:
    if lines is None:
        return SENTENCE
    if lines == "\n" or text[end : end + 1].isspace():  # an indented line goes on with what stands above it
        return LINE
    return SECTION if _HEADING.match(text, end) else PARAGRAPH


# --- chunks ----------------------------------------------------------------------------------------------------


def chunks(
    text: str, pages: Sequence[PageSpan] | None, max_tokens: int, overlap_tokens: int, counter: TokenCounter
) -> list[Chunk]:
    """Cut a text. max_tokens: 100 to 4096; overlap_tokens: at most half of it.

    `text[chunk.start : chunk.end] == chunk.text`; a chunk's page is that of its start. White space alone gives no
    chunks. Raises Unreadable when the text has more than 5,000,000 tokens.
    """
    atoms = _Atoms(text, max_tokens // 5, counter)
    starts = [page.start for page in pages or ()]
    found: list[Chunk] = []
    for first, last in _spans(text, atoms, max_tokens, min(overlap_tokens, max_tokens // 2)):
        start, end = _trimmed(text, atoms.start(first), atoms.ends[last])
        if start < end:
            page = pages[max(0, bisect_right(starts, start) - 1)].number if pages else None
            tokens = atoms.totals[last] - atoms.tokens_before(first)
            found.append(Chunk(len(found), text[start:end], start, end, page, tokens))
    return found


def _spans(text: str, atoms: _Atoms, max_tokens: int, overlap: int) -> Iterator[tuple[int, int]]:
    """First and last atom of each chunk. Every chunk ends after the one before, so this comes to an end."""
    first, last, final = 0, -1, len(atoms.ends) - 1
    while last < final:
        previous, last = last, _last_atom(atoms, first, last, max_tokens - _MARGIN_TOKENS)
        while last > previous + 1 and not _fits(text, atoms, first, last, max_tokens):
            last -= 1
        yield first, last
        first = _next_first(atoms, first, last, overlap)
        while first <= last < final and not _fits(text, atoms, first, last + 1, max_tokens):
            first += 1  # what is shared leaves no room for more


def _fits(text: str, atoms: _Atoms, first: int, last: int, max_tokens: int) -> bool:
    """Among characters that the vocabulary does not know, counts can be too small, so it is asked itself."""
    start, end = atoms.start(first), atoms.ends[last]
    tokens = atoms.totals[last] - atoms.tokens_before(first)
    if tokens > max_tokens - _MARGIN_TOKENS:
        return False
    if tokens < _RARE_TOKENS_PER_CHAR * (end - start) and start not in atoms.torn:
        return True
    return len(_splitter(max_tokens).chunks(text[start:end])) == 1


def _last_atom(atoms: _Atoms, first: int, last: int, capacity: int) -> int:
    """The best end of a chunk that begins with atom `first` and ends after `last`."""
    base, totals, strengths = atoms.tokens_before(first), atoms.totals, atoms.strengths
    limit = max(last + 1, bisect_right(totals, base + capacity) - 1)
    if limit == len(totals) - 1:
        return limit
    least = min(limit, max(last + 1, bisect_right(totals, base + capacity // 2)))
    return max(range(least, limit + 1), key=lambda atom: (totals[atom] - base) / capacity + strengths[atom])


def _next_first(atoms: _Atoms, first: int, last: int, overlap: int) -> int:
    """Where the next chunk begins: after the best boundary in the second half of the overlap."""
    total, totals, strengths = atoms.totals[last], atoms.totals, atoms.strengths
    earliest = max(first, bisect_right(totals, total - overlap - 1)) + 1
    latest = bisect_right(totals, total - overlap // 2 - 1)
    if not overlap or earliest > last:
        return last + 1
    candidates = range(earliest, max(earliest, latest) + 1)
    return max(candidates, key=lambda atom: (total - totals[atom - 1]) / overlap + strengths[atom - 1])


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Without white space around; but a line's indentation stays with it."""
    while end > start and text[end - 1].isspace():
        end -= 1
    indentation = start
    while start < end and text[start].isspace():
        start += 1
        if text[start - 1] == "\n":
            indentation = start
    begins_line = indentation == 0 or text[indentation - 1] == "\n"
    return (indentation if begins_line else start), end
