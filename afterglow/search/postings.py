"""Words as the Postgres index keeps them: for each term and block of chunks, where it stands, packed for numpy.

Pure: rows in, scores out. Postgres' own text search is not used, for three reasons. Its ranking knows neither how
rare a word is nor how long a chunk is on average, so the best 200 by it are not those of BM25. A GIN index is one for
all stores: a search of a small one takes longer the larger the others grow. And its documents are read whole to rank
them. Here a search reads, of each word asked, one range of an index, and every chunk that has one of the words is
ranked, as `ranking.py` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

from afterglow.search import ranking
from afterglow.search.ranking import MAX_PHRASE_WORDS, Asked, Term
from afterglow.search.tokens import MAX_TOKENS, Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLOCK = 1024
PLACE = [("number", "<i8"), ("times", "<u2"), ("words", "<u2")]
PLACE_BYTES = 12
MAX_TERM_CHARS = 255  # a key of an index has its limit; what is longer is data, found by how it begins
MAX_WORDS = 65_535


class Posting(NamedTuple):
    """Where a term stands in a block. places: as in PLACE, for each chunk; offsets: uint16, `times` of each chunk."""

    term: str
    places: bytes
    offsets: bytes


class Places(NamedTuple):
    """Chunks that have a term, how often, and how many words they have; int64."""

    numbers: NDArray[np.int64]
    times: NDArray[np.int64]
    words: NDArray[np.int64]


def postings(tokenizer: Tokenizer, first: int, texts: Sequence[str]) -> tuple[list[Posting], int]:
    """The postings of a block whose first chunk has the number `first`, and how many words it has in all."""
    import numpy as np

    searchable = [ranking.searchable(text) for text in texts]
    words = np.array([len(text.split()) for text in searchable], dtype=np.int64)
    found = tokenizer.places(searchable)
    counts = np.array([count for _, count, _, _ in found], dtype=np.int64)
    # One number for each place, so that they are in order by term, chunk and offset.
    keys = np.repeat(np.arange(len(found)), counts) << 32
    keys |= _numbers(",".join(chunks for _, _, chunks, _ in found)) << 16
    keys |= _numbers(",".join(offsets for _, _, _, offsets in found))
    keys.sort()
    starts = np.flatnonzero(np.diff(keys >> 16, prepend=-1))
    chunks = keys[starts] >> 16 & 0xFFFF
    places = np.zeros(len(starts), dtype=PLACE)
    places["number"] = first + chunks
    places["times"] = np.diff(starts, append=len(keys))
    places["words"] = np.minimum(words[chunks], MAX_WORDS)
    rows = _sliced(
        [term[:MAX_TERM_CHARS] for term, _, _, _ in found],
        (places.tobytes(), PLACE_BYTES * np.bincount(keys[starts] >> 32, minlength=len(found))),
        ((keys & 0xFFFF).astype("<u2").tobytes(), 2 * counts),
    )
    return rows, int(words.sum())


def _numbers(listed: str) -> NDArray[np.int64]:
    import numpy as np

    return np.fromstring(listed, dtype=np.int64, sep=",")


def _sliced(
    terms: list[str], places: tuple[bytes, NDArray[np.int64]], offsets: tuple[bytes, NDArray[np.int64]]
) -> list[Posting]:
    rows, place, offset = [], 0, 0
    for term, place_bytes, offset_bytes in zip(terms, places[1].tolist(), offsets[1].tolist(), strict=True):
        rows.append(Posting(term, places[0][place : place + place_bytes], offsets[0][offset : offset + offset_bytes]))
        place += place_bytes
        offset += offset_bytes
    return rows


def unpacked(places: bytes) -> Places:
    """Of one term."""
    import numpy as np

    rows = np.frombuffer(places, dtype=PLACE)
    return Places(*(rows[name].astype(np.int64) for name, _ in PLACE))


def merged(places: bytes) -> Places:
    """Of several terms, one after another, as if they were one."""
    import numpy as np

    rows = unpacked(places)
    numbers, first, which = np.unique(rows.numbers, return_index=True, return_inverse=True)
    return Places(numbers, np.bincount(which, rows.times, len(numbers)).astype(np.int64), rows.words[first])


def side_by_side(tokens: Sequence[tuple[bytes, bytes]]) -> Places:
    """The chunks in which these tokens follow each other, each counted once. tokens: places and offsets of each."""
    import numpy as np

    places = [unpacked(one) for one, _ in tokens]
    numbers = reduce(np.intersect1d, (one.numbers for one in places))
    begins: list[NDArray[np.int64]] = []
    for distance, (one, (_, offsets)) in enumerate(zip(places, tokens, strict=True)):
        every = np.repeat(one.numbers, one.times)
        there = np.isin(every, numbers)
        at = np.searchsorted(numbers, every[there]) * (MAX_TOKENS + 2 * MAX_PHRASE_WORDS)
        begins.append(at + MAX_PHRASE_WORDS + np.frombuffer(offsets, "<u2")[there].astype(np.int64) - distance)
    found = np.unique(reduce(np.intersect1d, begins) // (MAX_TOKENS + 2 * MAX_PHRASE_WORDS))
    order = np.argsort(places[0].numbers)
    words = places[0].words[order][np.searchsorted(places[0].numbers[order], numbers[found])]
    return Places(numbers[found], np.ones(len(found), np.int64), words)


def score(
    asked: Asked, places: Mapping[Term, Places], average: float, files: list[int] | None
) -> list[tuple[int, float]]:
    """The best chunks of these files with their BM25. average: words in a chunk."""
    import numpy as np

    if not asked.weights:
        return []
    found = [(weight, places[term]) for term, weight in asked.weights.items()]
    added = [ranking.bm25(weight, one.times, one.words, average) for weight, one in found]
    numbers, which = np.unique(np.concatenate([one.numbers for _, one in found]), return_inverse=True)
    scores = np.bincount(which, np.concatenate(added), len(numbers)).astype(np.float64, copy=False)
    return ranking.best(numbers, scores, files)
