"""Words as the Postgres index packs them: against what one counts by hand."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afterglow.search import postings, ranking
from afterglow.search.postings import MAX_TERM_CHARS, merged, side_by_side, unpacked
from afterglow.search.ranking import Asked, Term
from afterglow.search.tokens import MAX_TOKENS, Tokenizer

FIRST = 7 << 24
TEXTS = st.lists(st.lists(st.sampled_from(["ab", "cd", "ef", "猫犬", "x_y"]), max_size=9).map(" ".join), max_size=6)


@pytest.fixture(scope="module")
def tokenizer() -> Iterator[Tokenizer]:
    tokenizer = Tokenizer()
    yield tokenizer
    tokenizer.close()


def split(tokenizer: Tokenizer, text: str) -> list[str]:
    words = ranking.searchable(text)
    return tokenizer.split([words]).get(words, [])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS)
def test_each_term_says_where_it_stands(tokenizer: Tokenizer, texts: list[str]):
    """Of each chunk that has a term: its number, how often, how many words the chunk has, and each place."""
    tokens = [split(tokenizer, text) for text in texts]
    lengths = [len(ranking.searchable(text).split()) for text in texts]
    rows, words = postings.postings(tokenizer, FIRST, texts)
    assert words == sum(lengths)
    assert {row.term for row in rows} == {token for those in tokens for token in those}
    for row in rows:
        having = {FIRST + at: those.count(row.term) for at, those in enumerate(tokens) if row.term in those}
        numbers, times, lasting = unpacked(row.places)
        assert dict(zip(numbers.tolist(), times.tolist(), strict=True)) == having
        assert lasting.tolist() == [lengths[number - FIRST] for number in having]
        stands = [place for those in tokens for place, token in enumerate(those) if token == row.term]
        assert memoryview(row.offsets).cast("H").tolist() == stands


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS, st.lists(st.sampled_from(["ab", "cd", "ef"]), min_size=2, max_size=3))
def test_tokens_side_by_side(tokenizer: Tokenizer, texts: list[str], phrase: list[str]):
    """A phrase is found in the chunks that have its tokens one after another, over several blocks, once in each."""
    tokens = [split(tokenizer, text) for text in texts]
    found: dict[str, tuple[bytes, bytes]] = defaultdict(lambda: (b"", b""))
    for first in (FIRST + 4096, FIRST):  # blocks come in any order
        for row in postings.postings(tokenizer, first, texts)[0]:
            places, offsets = found[row.term]
            found[row.term] = places + row.places, offsets + row.offsets
    numbers, times, _ = side_by_side([found[token] for token in phrase])

    def has(those: Sequence[str]) -> bool:
        return any(list(those[at : at + len(phrase)]) == phrase for at in range(len(those)))

    expected = [at for at, those in enumerate(tokens) if has(those)]
    assert numbers.tolist() == [first + at for first in (FIRST, FIRST + 4096) for at in expected]
    assert set(times.tolist()) <= {1}


def test_several_terms_as_one(tokenizer: Tokenizer):
    """A chunk that has several of the terms that a prefix stands for counts once, with all of them."""
    rows, _ = postings.postings(tokenizer, FIRST, ["abc abd abd x", "y", "abd"])
    both = merged(b"".join(row.places for row in rows if row.term.startswith("ab")))
    assert [column.tolist() for column in both] == [[FIRST, FIRST + 2], [3, 1], [4, 1]]


def test_what_is_too_long_is_cut(tokenizer: Tokenizer):
    """A word that no key can hold is kept by how it begins, and of a chunk without end only the first words are."""
    rows, words = postings.postings(tokenizer, FIRST, ["x" * 5_000, "ab " * (MAX_TOKENS + 5)])
    assert {row.term for row in rows} == {"x" * MAX_TERM_CHARS, "ab"}
    (times,) = [unpacked(row.places).times.tolist() for row in rows if row.term == "ab"]
    assert (times, words) == ([MAX_TOKENS], MAX_TOKENS + 6)


def test_nothing_to_pack(tokenizer: Tokenizer):
    """Chunks without words have no rows."""
    assert postings.postings(tokenizer, FIRST, ["", " .,", "\0"]) == ([], 1)
    assert postings.postings(tokenizer, FIRST, []) == ([], 0)


def test_scores_are_those_of_bm25(tokenizer: Tokenizer):
    """Each chunk's score is the sum over the terms that it has, and files that were not asked have none."""
    rows, words = postings.postings(tokenizer, FIRST, ["cat", "cat dog dog", "dog bird bird"])
    places = {Term("word", row.term): unpacked(row.places) for row in rows}
    asked = Asked({Term("word", "cat"): 2.0, Term("word", "dog"): 1.0}, 3.0)
    expected: Counter[int] = Counter()
    for at, (cats, dogs, length) in enumerate([(1, 0, 1), (1, 2, 3), (0, 1, 3)]):
        expected[FIRST + at] = ranking.bm25(2.0, cats, length, words / 3) + ranking.bm25(1.0, dogs, length, words / 3)
    scored = postings.score(asked, places, words / 3, None)
    assert dict(scored) == pytest.approx(expected)
    assert [number for number, _ in scored] == [number for number, _ in expected.most_common()]
    assert postings.score(asked, places, words / 3, [8]) == []
