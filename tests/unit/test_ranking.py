"""What a search looks for, what its scores mean, and which files a filter lets through."""

from __future__ import annotations

import math
import struct
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterglow.contracts import Weights
from afterglow.objects import And, Attributes, Eq, Filter
from afterglow.search import ranking
from afterglow.search.filters import depth, matches
from afterglow.search.ranking import Term, asked, bm25, fuse, lexical_score, pack_vector, searchable, terms, weigh

EQUAL = Weights()


def words(**counts: int) -> Counter[Term]:
    return Counter({Term("word", text): count for text, count in counts.items()})


def fused(lexical: dict[str, float], similar: dict[str, float], ideal: float = 10.0, weights: Weights = EQUAL):
    return list(fuse(lexical, similar, ideal, weights))


# --- words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("Die STRASSE ist gesperrt", "Straße"),
        ("Viele Häuser", "hauser"),
        ("Viele Ha\u0308user", "Häuser"),
        ("İSTANBUL", "istanbul"),
        ("ısparta", "ISPARTA"),
        ("ﬁnal ｒｅｐｏｒｔ", "final report"),
        ("Smørrebrød, Łódź", "smorrebrod lodz"),
        ("Ёлка", "елка"),
        ("مُحَمَّد", "محمد"),
        ("أحمد إلى آخر", "احمد الى اخر"),
        ("والكتاب", "كتاب"),
        ("שָׁלוֹם", "שלום"),
        ("हिन्दी भाषा", "भाषा"),
        ("1,000,000 users", "1000000"),
        ("written in C++ and C#", "c++ c#"),
        ("the company's tax", "company tax"),
        ("CodeInterpreterTool", "interpreter"),
        ("parseHTTPRequest", "HTTP request"),
        ("hyphen\u00adated", "hyphenated"),
    ],
)
def test_a_text_and_a_query_meet(text: str, query: str):
    """However a word is spelled, a query that spells it otherwise looks for what was indexed."""
    assert set(asked(query)) <= set(searchable(text).lower().replace(",", " ").replace("_", " ").split())


@pytest.mark.parametrize(
    ("run", "grams"),
    [
        ("東京都", ["東京", "京都", "都"]),
        ("ラーメン", ["ラー", "ーメ", "メン", "ン"]),
        ("한국어", ["한국", "국어", "어"]),
        ("ไทย", ["ไทย", "ทย", "ย"]),
        ("猫", ["猫"]),
    ],
)
def test_a_run_without_spaces_is_indexed_as_overlapping_grams(run: str, grams: list[str]):
    """Every character of a run begins one gram, so that whatever is shorter than a gram is the beginning of some."""
    assert searchable(f"a {run}, b").replace(",", "").split() == ["a", *grams, "b"]


@pytest.mark.parametrize(("query", "pieces"), [("東京都", ["東京", "京都"]), ("猫", ["猫"]), ("ทย", ["ทย"])])
def test_a_query_asks_for_whole_grams_or_for_a_prefix(query: str, pieces: list[str]):
    """A query is cut into whole grams; only one that is shorter than a gram is a prefix."""
    assert list(asked(query)) == pieces
    assert [ranking.is_prefix(piece) for piece in pieces] == [len(pieces) == 1] * len(pieces)


def test_a_word_in_no_script_of_grams_is_no_prefix():
    """`a` asks for the word, not for all that begins so."""
    assert not ranking.is_prefix("a")


@given(st.text(st.characters(exclude_categories=[])))
def test_any_text_is_searchable(text: str):
    """No text makes the reading of it fail, and what is written can be stored: no NUL, no half of a pair."""
    for written in (searchable(text), " ".join(asked(text))):
        assert "\0" not in written
        written.encode()


@given(st.text())
def test_pieces_have_no_spaces(text: str):
    """Each piece of a query is one word of what is indexed, never empty."""
    assert all(piece and piece.split() == [piece] for piece in asked(text))


@given(st.text(st.sampled_from("aé東ไह ً"), max_size=30))
def test_what_is_written_stays_when_read_again(text: str):
    """Folding twice is folding once, so that both ends agree on any text."""
    once = " ".join(ranking._folded(text).split())
    assert " ".join(ranking._folded(once).split()) == once


def test_a_query_counts_its_words():
    """A word that the query has twice counts twice, whatever its case."""
    assert asked("Tax and tax") == {"tax": 2, "and": 1}


def test_a_very_long_query_is_read_at_both_ends():
    """Of a pasted page the beginning and the end are read, and the longest words of them kept."""
    pieces = asked(f"beginning {'filler words of no interest ' * 50_000} conclusion")
    assert {"beginning", "conclusion"} <= set(pieces)
    many = asked(" ".join(f"word{number:05}" for number in range(1_000)))
    assert len(many) == ranking.MAX_WORDS


def test_a_compound_is_looked_for_in_parts_and_as_a_phrase():
    """`max_num_results` finds its words, and counts a little more where they stand side by side."""
    found = terms({"max_num_results": 2}, {"max_num_results": ["max", "num", "result"]})
    assert found == {**words(max=2, num=2, result=2), Term("phrase", "max_num_results"): 2}


def test_a_piece_without_words_asks_for_nothing():
    """What the index makes no token of, such as an emoji, is not looked for."""
    assert not terms({"🙂": 1}, {})


def test_a_piece_of_many_words_is_bounded():
    """A thousand words glued by dots are at most as many terms as any query has, and no phrase."""
    piece = ".".join(f"w{number}" for number in range(1_000))
    found = terms({piece: 1}, {piece: piece.split(".")})
    assert len(found) == ranking.MAX_WORDS
    assert {term.kind for term in found} == {"word"}


# --- BM25 ------------------------------------------------------------------------------------------------------


def test_rare_words_are_worth_more():
    """The fewer chunks have a word, the more it is worth."""
    found = weigh(words(rare=1, usual=1), {**words(rare=2, usual=300)}, 1000)
    assert found.weights[Term("word", "rare")] > 3 * found.weights[Term("word", "usual")] > 0


def test_common_words_are_left_out_while_rarer_ones_remain():
    """A word that most chunks have is not looked for, unless it is among the rarest that there are."""
    counts = words(the=1, what=1, a=1, b=1, c=1)
    known = words(the=900, what=800, a=10, b=20, c=30)
    assert set(weigh(counts, known, 1000).weights) == set(words(a=1, b=1, c=1))
    assert set(weigh(words(the=1, what=1), words(the=900, what=800), 1000).weights) == set(words(the=1, what=1))


def test_in_a_small_store_no_word_is_common():
    """A word that both of two chunks have is worth something."""
    assert weigh(words(tax=1), words(tax=2), 2).weights[Term("word", "tax")] > 0


def test_words_that_no_store_has_lower_the_score():
    """The same match is worth less when half of the question is unknown, and no phrase is missed on top."""
    known = weigh(words(tax=1), words(tax=5), 100)
    half = weigh(words(tax=1, zeppelin=1), words(tax=5), 100)
    assert half.weights == known.weights
    assert half.ideal == pytest.approx(2 * known.ideal)
    phrase = {**words(tax=1), Term("phrase", "tax-zeppelin"): 1}
    assert weigh(phrase, words(tax=5), 100).ideal == known.ideal


def test_nothing_known_asks_for_nothing():
    """When no store has any of the words there is nothing to look for."""
    assert weigh(words(zeppelin=1), Counter(), 100) == ({}, 0.0)


def test_one_word_many_times_does_not_drown_the_others():
    """A word pasted a thousand times counts only so often."""
    found = weigh(words(tax=1000, law=1), words(tax=5, law=5), 100).weights
    assert found[Term("word", "tax")] == pytest.approx(ranking.MAX_COUNT * found[Term("word", "law")])


@given(st.floats(0.1, 20), st.integers(1, 1000), st.integers(1, 5000), st.floats(1, 5000))
def test_bm25_stays_below_its_limit(weight: float, times: int, length: int, average: float):
    """However often a word comes, it adds less than K1 + 1 times its weight, and more than nothing."""
    assert 0 < bm25(weight, times, length, average) < weight * (ranking.K1 + 1)


def test_an_ideal_chunk_scores_as_documented():
    """A chunk of average length with each word once scores 0.64, and one with half of them about 0.36."""
    found = weigh(words(a=1, b=1), words(a=5, b=5), 100)
    once = [bm25(weight, 1, 100, 100) for weight in found.weights.values()]
    assert lexical_score(sum(once), found.ideal) == pytest.approx(0.64)
    assert lexical_score(once[0], found.ideal) == pytest.approx(0.36)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0.1, 100))
def test_a_higher_bm25_never_scores_less(one: float, other: float, ideal: float):
    """The score of 0 to 1 keeps BM25's order."""
    low, high = sorted((one, other))
    limit = ideal * (ranking.K1 + 1)
    assert 0 <= lexical_score(low * limit, ideal) <= lexical_score(high * limit, ideal) <= 1


# --- vectors and fusion ----------------------------------------------------------------------------------------


def test_vectors_are_packed_at_unit_length():
    """A packed vector is float16, two bytes a value, and has length 1; one of zeros stays one of zeros."""
    assert struct.unpack("<2e", pack_vector([3e6, 4e6])) == pytest.approx((0.6, 0.8), abs=1e-3)
    assert pack_vector([0.0, 0.0]) == bytes(4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_no_vector(value: float):
    """An embedding with a value that is not finite is refused."""
    with pytest.raises(ValueError, match="finite"):
        pack_vector([1.0, value])


def test_first_on_both_sides_scores_one():
    """1.0 is first on both sides, 0.5 first on one and not found by the other."""
    found = fused({"a": 5.0, "b": 4.0}, {"a": 0.9, "c": 0.8})
    assert [one.key for one in found] == ["a", "b", "c"]
    assert found[0].score == 1.0
    assert found[1] == ("b", pytest.approx(0.5 * 61 / 62), 2, None, 4.0, None)
    assert fused({"a": 5.0}, {"b": 0.9})[0].score == 0.5


def test_weights_decide_which_side_counts_more():
    """With three quarters on the vectors, their first comes first."""
    found = fused({"a": 5.0}, {"b": 0.9}, weights=Weights(embedding=3, text=1))
    assert [(one.key, one.score) for one in found] == [("b", 0.75), ("a", 0.25)]


def test_a_side_alone_gives_its_own_score():
    """Words alone are scored by BM25, vectors alone by the cosine."""
    assert fused({"a": 5.0}, {})[0].score == lexical_score(5.0, 10.0)
    assert fused({}, {"a": 0.8})[0].score == 0.8
    assert fused({}, {"a": 1.0000001})[0].score == 1.0
    assert fused({}, {}) == []


def test_equals_share_a_rank():
    """Equal scores share the better rank, and come in the order of their keys."""
    found = fused({"b": 5.0, "a": 5.0, "c": 4.0}, {})
    assert [(one.key, one.lexical_rank) for one in found] == [("a", 1), ("b", 1), ("c", 3)]


SCORES = st.dictionaries(st.integers(0, 400), st.floats(0.001, 1), max_size=300)


@given(SCORES, SCORES, st.floats(0.1, 5), st.floats(0.1, 5))
def test_scores_are_in_order_and_in_range(lexical: dict[int, float], similar: dict[int, float], one: float, two: float):
    """Whatever is fused comes once, best first, with a score from 0 to 1; each side ranks as many as it may."""
    found = list(fuse(lexical, similar, 1.0, Weights(embedding=one, text=two)))
    assert len({ranked.key for ranked in found}) == len(found) <= 2 * ranking.DEPTH
    assert all(0 <= ranked.score <= 1.0000001 for ranked in found)
    assert [ranked.score for ranked in found] == sorted((ranked.score for ranked in found), reverse=True)


def test_a_score_does_not_depend_on_what_ranks_below():
    """Chunks that are worse on both sides change nothing for those above them."""
    few = fused({"a": 5.0, "b": 4.0}, {"b": 0.9, "a": 0.8})
    many = fused({"a": 5.0, "b": 4.0, "z": 1.0}, {"b": 0.9, "a": 0.8, "z": 0.1})
    assert many[:2] == few


# --- filters ---------------------------------------------------------------------------------------------------

FILE = msgspec.convert({"year": 2024, "price": 1.5, "lang": "de", "draft": True, "day": "2024-05-31"}, Attributes)


def let_through(where: str) -> bool:
    return matches(msgspec.json.decode(where, type=Filter), FILE)


@pytest.mark.parametrize(
    ("comparison", "answer"),
    [
        ('"eq","key":"year","value":2024', True),
        ('"eq","key":"year","value":2024.0', True),
        ('"eq","key":"year","value":"2024"', False),
        ('"eq","key":"draft","value":true', True),
        ('"eq","key":"draft","value":1', False),
        ('"eq","key":"missing","value":1', False),
        ('"ne","key":"year","value":2024', False),
        ('"ne","key":"year","value":2023', True),
        ('"ne","key":"year","value":"2024"', True),
        ('"ne","key":"missing","value":1', True),
        ('"gt","key":"price","value":1', True),
        ('"gt","key":"price","value":1.5', False),
        ('"gte","key":"price","value":1.5', True),
        ('"lt","key":"year","value":2025', True),
        ('"lte","key":"year","value":2023', False),
        ('"lt","key":"year","value":"3"', False),
        ('"gte","key":"day","value":"2024-05-01"', True),
        ('"gt","key":"draft","value":false', False),
        ('"lt","key":"missing","value":1', False),
        ('"gte","key":"missing","value":1', False),
        ('"in","key":"lang","value":["en","de"]', True),
        ('"in","key":"year","value":["2024",true]', False),
        ('"in","key":"lang","value":[]', False),
        ('"in","key":"missing","value":["en"]', False),
        ('"nin","key":"lang","value":["en","fr"]', True),
        ('"nin","key":"lang","value":["de"]', False),
        ('"nin","key":"missing","value":["de"]', True),
    ],
)
def test_a_comparison(comparison: str, answer: bool):
    """Kinds are told apart, what is missing compares as nothing, and `ne` and `nin` are what `eq` and `in` are not."""
    assert let_through(f'{{"type":{comparison}}}') is answer


def test_compounds_nest():
    """`and` and `or` hold comparisons and one another."""
    german = '{"type":"eq","key":"lang","value":"de"}'
    old = '{"type":"lt","key":"year","value":2000}'
    assert let_through(f'{{"type":"or","filters":[{old},{german}]}}')
    assert not let_through(f'{{"type":"and","filters":[{old},{german}]}}')
    assert let_through(f'{{"type":"and","filters":[{german},{{"type":"or","filters":[{old},{german}]}}]}}')


def test_depth_is_counted_without_recursion():
    """How deep a filter is nested can be told of any filter."""
    where: Filter = Eq(key="a", value=1)
    assert depth(where) == 1
    for _ in range(5_000):
        where = And(filters=[where])
    assert depth(where) == 5_001
