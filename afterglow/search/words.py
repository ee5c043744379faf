"""The words by which messages are found: those of a text, and those that a query asks for. Pure.

A word is a run of letters, digits and marks, as `ranking.searchable` writes it. There are no stems, so that a word
means the same whatever the language. Where words are not set apart by spaces, each gram is a word and so is whatever
it begins with: a query that is shorter than a gram is a word, too.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from afterglow.search import ranking

MAX_WORD_CHARS = 64  # longer ones are data, found by how they begin
MAX_WORDS = 20_000  # of a text, the first that are different
MAX_ASKED = 16


class _Separators(dict[int, int | str]):
    """For str.translate: blanks in the place of whatever separates words."""

    def __missing__(self, code: int) -> int | str:
        of_a_word = unicodedata.category(chr(code))[0] in "LNM" or unicodedata.category(chr(code)) == "Co"
        self[code] = kept = code if of_a_word else " "
        return kept


_SEPARATORS = _Separators()


def words_of(text: str) -> set[str]:
    """The different words of a text."""
    words: dict[str, None] = {}
    for word in ranking.searchable(text).lower().translate(_SEPARATORS).split():
        if len(words) >= MAX_WORDS:
            break
        words[word[:MAX_WORD_CHARS]] = None
    if not all(map(str.isascii, words)):
        words |= dict.fromkeys(_beginnings(words))
    return set(words)


def _beginnings(words: Iterable[str]) -> list[str]:
    grams = [word for word in words if len(word) <= 3 and ranking.UNSPACED.fullmatch(word)]
    return [gram[:size] for gram in grams for size in range(1, len(gram))]


def asked_words(query: str) -> list[str]:
    """The different words of a query, the longest first. All of them must occur."""
    # In lower case the parts of a name are not told apart: `OpenAI` is to be found as it is, and as `openai`.
    pieces = " ".join(ranking.asked(query.lower()))
    words = {word[:MAX_WORD_CHARS] for word in pieces.translate(_SEPARATORS).split()}
    return sorted(words, key=lambda word: (-len(word), word))


def word_of_file(file_id: str) -> str:
    """What stands for a file among the words of messages that name it. No text has such a word: it is in capitals."""
    return f"F{file_id}"[:256]
