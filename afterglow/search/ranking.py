"""What a search looks for, and what its scores mean. Pure: no files, no database; every index ranks by this file.

**Words.** `searchable` writes a text the way it is indexed, and a query goes through the same function, so that both
ends meet: compatibility forms and accents folded, case too (İ, ß, full width), Arabic and Hebrew without vowel signs.
Where words are not set apart by spaces, a run of characters becomes overlapping grams: two characters in Chinese,
Japanese and Korean, three in Thai, Lao, Khmer and Burmese. The last grams of a run are shorter, so that every
character begins one, and a query shorter than a gram finds it as a prefix. `CamelCase` is indexed whole and in parts.
What separates words, and the stem of an English word, is the index's business (FTS5: unicode61 and porter).

**What is asked.** A query is free text, maybe a pasted page. Its words are counted, the `MAX_WORDS` longest kept, and
any of them may match. A piece that falls into several words (`max_num_results`, `report.pdf`) is looked for in its
parts and as a phrase. There is no list of stop words: of words that more than `COMMON_SHARE` of all chunks have, only
those count that are among the `ALWAYS` rarest. On public collections this loses nothing, and the common words are
most of the work. A bonus for any two words side by side was measured too, and gains too little to pay for.

**BM25**, over all stores asked as if they were one: how rare a word is and how long a chunk is on average are counted
over them together, so that a chunk's score says the same whichever store it lies in. A word counts as often as the
query has it (up to `MAX_COUNT`). Robertson and Zaragoza 2009, with the weight `ln(1 + (N - n + ½) / (n + ½))`.

**The score of one side alone.** For words: BM25 over `ideal`, which is what a chunk of average length would get that
has each of the query's words once; words that no store has are counted with the mean weight of the others. This
share, at most K1 + 1, is bent into [0, 1] by `1 - (1 - share / (K1 + 1))²`: 0.64 for such an ideal chunk, about 0.36
for one that has half of what was asked, and less than 0.1 for one chance word of ten. It grows with BM25, always.
For vectors: the cosine; what is at right angles to the query, or beyond, is not found.

**Both sides** are fused by rank (reciprocal rank fusion, Cormack et al., SIGIR 2009): each side gives
`weight · 61 / (60 + rank)`, and the sum over that of the weights is the score. 1.0 is first on both sides, 0.5 (with
equal weights) first on one and not found by the other. A side counts while it is asked and finds anything at all;
when only one does, its own score stands. Each side ranks its `DEPTH` best chunks, whatever the limit, so a hit's score
depends on neither limit nor threshold; with both sides it depends on how many chunks rank above, and on nothing else.
Equals share a rank. Hits of the same score are in the order of their keys.
"""

from __future__ import annotations

import math
import re
import struct
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from afterglow.contracts import Chunk, Hit, Weights
from afterglow.search.pieces import FILE_BITS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# What `searchable` writes is part of every index; a change here, or of Unicode, means that words are indexed anew.
FORMAT = f"1 {unicodedata.unidata_version}"

K1 = 1.5
B = 0.75
RANK_OFFSET = 60
DEPTH = 200
MAX_QUERY_CHARS = 16_000
MAX_WORDS = 64
MAX_COUNT = 8
WORTH = {"word": 1.0, "prefix": 1.0, "phrase": 0.1}  # a phrase adds to the words in it, which count by themselves
MAX_PHRASE_WORDS = 8
COMMON_SHARE = 0.4
COMMON_CHUNKS = 50  # words in no more chunks than this are cheap, and are always looked for
ALWAYS = 3

BIGRAMS = (
    "\u1100-\u11ff\u3005-\u3007\u3040-\u30ff\u3100-\u312f\u3130-\u318f\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"
)
TRIGRAMS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
UNSPACED = re.compile(f"[{BIGRAMS}]+|[{TRIGRAMS}]+")
SHORT = re.compile(f"[{BIGRAMS}]|[{TRIGRAMS}]{{1,2}}")
# These see every byte that is indexed: each begins with what is rare in a text, and none goes back over it.
OTHER_SCRIPTS = re.compile(r"[^\x00-\x7f]+")
COMPOUND_NAME = re.compile(r"(?<![A-Za-z0-9])(?:[A-Z]*+[a-z0-9]++[A-Z]|[A-Z]{3,}+[a-z])[A-Za-z0-9]*+")
HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
MAX_NAME_CHARS = 64  # longer ones are data, not names
SIGNED_NAME = re.compile(
    r"\+\+(?<=[CcFf]\+\+)(?<![A-Za-z0-9][CcFf]\+\+)(?!\w)|#(?<=[CcFf]#)(?<![A-Za-z0-9][CcFf]#)(?!\w)"
)
SIGNS = {"++": "plusplus ", "#": "sharp "}
THOUSANDS = re.compile(r",(?<=[0-9],)(?=[0-9]{3}(?![0-9]))")
GENITIVE = re.compile(r"['’]s\b")
ARABIC_ARTICLE = re.compile(r"\b(?:[وفبك]?ال|لل)(?=\w{3})")

T = TypeVar("T")
Key = TypeVar("Key", bound="tuple[Any, ...] | str | int")


# --- words -----------------------------------------------------------------------------------------------------


def searchable(text: str) -> str:
    """The text as it is indexed: words, grams and parts of names, to be split at whatever is no letter or digit."""
    folded = _folded(text)
    return folded if folded.isascii() else UNSPACED.sub(_all_grams, folded)


def asked(query: str) -> Counter[str]:
    """The pieces of a query and how often it has each, the longest `MAX_WORDS` of them. Of a very long query, both
    ends are read. Each piece is free of spaces and NULs, and is no syntax of anything."""
    if len(query) > MAX_QUERY_CHARS:
        query = f"{query[: MAX_QUERY_CHARS // 2]} {query[-MAX_QUERY_CHARS // 2 :]}"
    return _longest(Counter(UNSPACED.sub(_whole_grams, _folded(query).lower()).split()), len)


def _longest(counted: Counter[T], length: Callable[[T], int]) -> Counter[T]:
    return Counter({one: counted[one] for one in sorted(counted, key=length, reverse=True)[:MAX_WORDS]})


def is_prefix(piece: str) -> bool:
    """Whether a piece of a query is shorter than the grams of its script, so that it stands for all that begin so."""
    return SHORT.fullmatch(piece) is not None


def _folded(text: str) -> str:
    text = GENITIVE.sub("", THOUSANDS.sub("", text))
    text = SIGNED_NAME.sub(lambda found: SIGNS[found[0]], text)
    if names := COMPOUND_NAME.findall(text):
        text = f"{text} {' '.join(HUMP.sub(' ', name) for name in names if len(name) <= MAX_NAME_CHARS)}"
    text = text.replace("\0", " ")
    return text if text.isascii() else OTHER_SCRIPTS.sub(lambda found: _folded_run(found[0]), text)


@lru_cache(16_384)
def _folded_run(run: str) -> str:
    """Characters beyond ASCII, up to the next one within it; mostly a word, and words come again."""
    run = unicodedata.normalize("NFKD", run.casefold()).translate(_folds())
    return ARABIC_ARTICLE.sub("", unicodedata.normalize("NFC", run))


@cache
def _folds() -> dict[int, str | None]:
    """What becomes of single characters: accents and vowel signs go, and letters that do not decompose are spelled."""
    folds: dict[int, str | None] = dict.fromkeys((0xAD, 0x640, 0x670, 0x200C, 0x200D, 0x2060, 0xFEFF))
    for first, last in ((0x300, 0x36F), (0x591, 0x5BD), (0x5BF, 0x5C7), (0x610, 0x61A), (0x64B, 0x65F), (0x6D6, 0x6ED)):
        folds |= dict.fromkeys(range(first, last + 1))
    folds |= dict.fromkeys((0, 0x200B, *range(0xD800, 0xE000)), " ")
    letters = {"ı": "i", "ø": "o", "đ": "d", "ð": "d", "ł": "l", "æ": "ae", "œ": "oe", "þ": "th", "ى": "ي", "ة": "ه"}
    return folds | {ord(letter): spelled for letter, spelled in letters.items()}


def _gram_size(run: str) -> int:
    return 3 if run[0] < "\u1100" or "\u1780" <= run[0] <= "\u17ff" else 2


def _all_grams(found: re.Match[str]) -> str:
    run = found[0]
    size = _gram_size(run)
    return f" {' '.join(run[at : at + size] for at in range(len(run)))} "


def _whole_grams(found: re.Match[str]) -> str:
    run = found[0]
    size = _gram_size(run)
    return f" {' '.join(run[at : at + size] for at in range(max(1, len(run) - size + 1)))} "


class Term(NamedTuple):
    """What an index is asked for. kind: `word`, a token of the index; `prefix`, all tokens that begin so; `phrase`,
    a piece whose tokens stand side by side."""

    kind: str
    text: str


def terms(pieces: Mapping[str, int], tokens: Mapping[str, Sequence[str]]) -> Counter[Term]:
    """What to look for, at most `MAX_WORDS`, and how often it was asked. tokens: what the index makes of each piece."""
    found: Counter[Term] = Counter()
    for piece, count in pieces.items():
        words = tokens.get(piece, ())
        if len(words) == 1 and is_prefix(piece):
            found[Term("prefix", words[0])] += count
            continue
        for word in words:
            found[Term("word", word)] += count
        if 1 < len(words) <= MAX_PHRASE_WORDS:
            found[Term("phrase", piece)] += count
    return _longest(found, lambda term: len(term.text))


# --- BM25 ------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A query against given stores. weights: of the terms worth looking for. ideal: see the top of this file."""

    weights: dict[Term, float]
    ideal: float


def weigh(counts: Mapping[Term, int], frequencies: Mapping[Term, int], chunks: int) -> Asked:
    """What each term is worth. frequencies: in how many chunks it is, of `chunks` in all stores together."""
    rarest = sorted((term for term in counts if frequencies.get(term)), key=lambda term: (frequencies[term], term))
    limit = max(COMMON_SHARE * chunks, COMMON_CHUNKS)
    sought = [term for place, term in enumerate(rarest) if place < ALWAYS or frequencies[term] <= limit]
    times = {term: min(count, MAX_COUNT) for term, count in counts.items()}
    weights = {term: times[term] * WORTH[term.kind] * _rarity(frequencies[term], chunks) for term in sought}
    if not weights:
        return Asked({}, 0.0)
    mean = sum(weights.values()) / sum(times[term] for term in sought)
    unknown = sum(times[term] for term in counts if not frequencies.get(term) and term.kind != "phrase")
    return Asked(weights, sum(weights.values()) + unknown * mean)


def _rarity(frequency: int, chunks: int) -> float:
    return math.log1p((max(chunks - frequency, 0) + 0.5) / (frequency + 0.5))


def bm25(weight: float, times: Any, length: Any, average: float) -> Any:
    """What a term adds to a chunk's score: numbers, or arrays of them. times: how often the chunk has the term;
    length: the chunk's words, on average `average`."""
    return weight * times * (K1 + 1) / (times + K1 * (1 - B + B * length / average))


def lexical_score(score: float, ideal: float) -> float:
    """BM25 on the scale of 0 to 1."""
    missing = 1 - score / (ideal * (K1 + 1))
    return 1 - missing * missing


# --- vectors ---------------------------------------------------------------------------------------------------


def pack_vector(values: Sequence[float]) -> bytes:
    """An embedding as indexes keep it: scaled to unit length, little-endian float16. Raises ValueError when a value
    is not finite."""
    length = math.sqrt(math.fsum(value * value for value in values))
    if not math.isfinite(length):
        raise ValueError("an embedding has values that are not finite")
    return struct.pack(f"<{len(values)}e", *(value / (length or 1.0) for value in values))


def best(
    numbers: NDArray[np.int64], scores: NDArray[np.floating[Any]], files: list[int] | None
) -> list[tuple[int, float]]:
    """The best chunks of these files that score above 0, as many as are ranked; of equals those that came first."""
    import numpy as np

    if files is not None:
        scores = np.where(np.isin(numbers >> FILE_BITS, np.array(files, dtype=np.int64)), scores, 0)
    at = np.flatnonzero(scores > 0)
    if len(at) > DEPTH:
        found = scores[at]
        at = at[found >= np.partition(found, -DEPTH)[-DEPTH]]
    at = at[np.argsort(-scores[at], kind="stable")][:DEPTH]
    return list(zip(numbers[at].tolist(), scores[at].tolist(), strict=True))


# --- fusion ----------------------------------------------------------------------------------------------------


class Ranked(NamedTuple, Generic[Key]):
    """A chunk by its key, with its score and where each side put it."""

    key: Key
    score: float
    lexical_rank: int | None
    vector_rank: int | None
    lexical_score: float | None
    similarity: float | None


def fuse(
    lexical: Mapping[Key, float], similar: Mapping[Key, float], ideal: float, weights: Weights
) -> Iterator[Ranked[Key]]:
    """All chunks that either side found, best first. lexical: BM25; similar: cosines; all above 0."""
    by_words, by_vector = _ranks(lexical), _ranks(similar)
    if not by_vector:
        scores = {key: lexical_score(lexical[key], ideal) for key in by_words}
    elif not by_words:
        scores = {key: min(similar[key], 1.0) for key in by_vector}
    else:
        total = weights.text + weights.embedding
        scores = {key: weights.text / total * _share(rank) for key, rank in by_words.items()}
        for key, rank in by_vector.items():
            scores[key] = scores.get(key, 0.0) + weights.embedding / total * _share(rank)
    for key in sorted(scores, key=lambda key: (-scores[key], key)):
        ranks = by_words.get(key), by_vector.get(key)
        yield Ranked(key, scores[key], *ranks, lexical.get(key), similar.get(key))


def _ranks(scores: Mapping[Key, float]) -> dict[Key, int]:
    """The `DEPTH` best with their ranks from 1; equals share the better one."""
    ranks: dict[Key, int] = {}
    rank, last = 0, math.inf
    for place, key in enumerate(sorted(scores, key=lambda key: (-scores[key], key))[:DEPTH], 1):
        if scores[key] != last:
            rank, last = place, scores[key]
        ranks[key] = rank
    return ranks


def _share(rank: int) -> float:
    return (RANK_OFFSET + 1) / (RANK_OFFSET + rank)


def hit(ranked: Ranked[Any], store_id: str, file_id: str, chunk: Chunk) -> Hit:
    return Hit(
        store_id=store_id,
        file_id=file_id,
        chunk=chunk,
        score=ranked.score,
        lexical_rank=ranked.lexical_rank,
        vector_rank=ranked.vector_rank,
        lexical_score=ranked.lexical_score,
        similarity=ranked.similarity,
    )
