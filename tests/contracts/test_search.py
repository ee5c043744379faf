"""What `contracts.SearchIndex` promises, kept by every index; then what the embedded one alone must survive.

What the one in Postgres must survive is in `test_search_postgres.py`.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afterglow.contracts import Chunk, SearchIndex, Weights
from afterglow.errors import DimensionMismatch, StoreUnavailable
from afterglow.objects import And, Eq, Gt, Ne
from afterglow.search import embedded, ranking
from afterglow.search.embedded import EmbeddedIndex
from afterglow.search.pool import Pool
from afterglow.search.stored import read_lengths
from tests.contracts.indexes import P, S, cut, embedded_index, emptied_database, find, postgres_index, put, texts

OpenIndex = Callable[[], AbstractAsyncContextManager[SearchIndex]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "search"


@pytest.fixture(params=["embedded", "postgres"])
async def open_index(request: pytest.FixtureRequest, folder: Path) -> AsyncGenerator[OpenIndex, None]:
    """Opens the same index each time it is called. A new kind of index is another `params`."""
    if request.param == "embedded":
        yield lambda: embedded_index(folder)
    else:
        async with emptied_database() as url:
            yield lambda: postgres_index(url)


@pytest.fixture
async def index(open_index: OpenIndex) -> AsyncGenerator[SearchIndex, None]:
    async with open_index() as opened:
        yield opened


@pytest.fixture
async def on_disk(folder: Path) -> AsyncGenerator[EmbeddedIndex, None]:
    async with embedded_index(folder) as opened:
        yield opened


def raw_bytes(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


# --- chunks and text -------------------------------------------------------------------------------------------


async def test_what_was_put_is_found(index: SearchIndex):
    """A hit tells store, file, place in the text and page of what it found."""
    await put(index, "Cats sleep.\nDogs bark at night.")
    (hit,) = await find(index, "Do dogs bark?")
    assert (hit.store_id, hit.file_id) == (S, "file-a")
    assert hit.chunk == Chunk(1, "Dogs bark at night.", 12, 31, 2, 4)
    assert (hit.lexical_rank, hit.vector_rank, hit.similarity) == (1, None, None)
    assert 0 < hit.score < 1 < 3 * (hit.lexical_score or 0)


@st.composite
def overlapping(draw: st.DrawFn) -> tuple[str, list[Chunk]]:
    text = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
    starts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    ends = [draw(st.integers(start, len(text))) for start in starts]
    return text, [Chunk(n, text[a:b], a, b, None, 1) for n, (a, b) in enumerate(zip(starts, ends, strict=True))]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(overlapping())
async def test_text_and_chunks_come_back_as_they_were(index: SearchIndex, case: tuple[str, list[Chunk]]):
    """The extracted text comes back whole, and each chunk as that part of it, however chunks overlap or leave gaps."""
    text, chunks = case
    await index.put_file(P, S, "file-a", {}, chunks, None, text)
    assert await index.text(P, S, "file-a") == (text if chunks else "")
    assert await index.list_chunks(P, S, "file-a", -1, 100) == chunks
    for chunk in chunks:
        assert await index.list_chunks(P, S, "file-a", chunk.index - 1, 1) == [chunk]


async def test_without_its_text_a_file_is_put_together(index: SearchIndex):
    """When only chunks are given, offsets still hold: blanks stand where no chunk is."""
    chunks = [
        Chunk(0, "one two", 2, 9, None, 2),
        Chunk(1, "two three", 6, 15, None, 2),
        Chunk(2, "four", 17, 21, None, 1),
    ]
    await index.put_file(P, S, "file-a", {}, chunks, None)
    assert await index.text(P, S, "file-a") == "  one two three  four"
    assert await index.list_chunks(P, S, "file-a", -1, 9) == chunks


@pytest.mark.parametrize(
    "chunks",
    [
        [Chunk(1, "abc", 0, 3, None, 1)],
        [Chunk(0, "abd", 0, 3, None, 1)],
        [Chunk(0, "bc", 1, 3, None, 1), Chunk(1, "abc", 0, 3, None, 1)],
    ],
)
async def test_chunks_that_do_not_agree_with_the_text_are_refused(index: SearchIndex, chunks: list[Chunk]):
    """A wrong number, a wrong offset and a wrong order are bugs of the caller, and nothing is written."""
    with pytest.raises(ValueError, match="does not stand where it says"):
        await index.put_file(P, S, "file-a", {}, chunks, None, "abc")
    with pytest.raises(ValueError, match="embeddings"):
        await index.put_file(P, S, "file-a", {}, cut("abc"), [], "abc")
    assert await index.usage_bytes(P, S) == 0


async def test_chunks_are_listed_in_parts(index: SearchIndex):
    """A list goes on after the index it is given, up to its limit."""
    await put(index, "\n".join(f"line {number}" for number in range(7)))
    assert [chunk.index for chunk in await index.list_chunks(P, S, "file-a", -1, 3)] == [0, 1, 2]
    assert [chunk.index for chunk in await index.list_chunks(P, S, "file-a", 4, 3)] == [5, 6]
    assert await index.list_chunks(P, S, "file-a", 6, 3) == []


async def test_a_file_of_many_blocks(index: SearchIndex):
    """A file of more chunks than lie together is found, filtered and read at every place."""
    await put(index, "\n".join(f"row n{number}" for number in range(2_500)), vectors=[[1.0, n] for n in range(2_500)])
    for number in (0, 1023, 1024, 2499):
        assert (await texts(index, f"n{number}", limit=1)) == [f"row n{number}"]
    (best,) = await find(index, "", embedding=[0.0, 1.0], limit=1)
    assert best.similarity == pytest.approx(1.0, abs=1e-3)


async def test_putting_a_file_again_replaces_it(index: SearchIndex):
    """What a file held before is neither found nor counted any more."""
    await put(index, "old words here")
    await put(index, "new ones", year=2024)
    assert await texts(index, "old words new") == ["new ones"]
    assert await index.text(P, S, "file-a") == "new ones"
    assert await index.usage_bytes(P, S) == 8


async def test_searches_see_what_has_changed_since(index: SearchIndex):
    """After searches, files that came are found, and those that went take no rank."""
    for turn in range(3):
        await put(index, f"cats {turn}\ncats", "file-a", vectors=[[1.0, 0.1 * turn], [1.0, 1.0]])
        await put(index, f"more cats {turn}", f"file-{turn}", vectors=[[0.0, 1.0]])
        await index.delete_file(P, S, f"file-{turn - 1}")
        hits = await find(index, "cats", embedding=[1.0, 0.0])
        assert [hit.vector_rank for hit in hits if hit.vector_rank] == [1, 2]
        assert {hit.chunk.text for hit in hits} == {f"cats {turn}", "cats", f"more cats {turn}"}
        assert {hit.lexical_rank for hit in await find(index, "cats")} == {1, 2, 3}


async def test_usage_is_text_and_vectors(index: SearchIndex):
    """A file's size is that of its text in UTF-8 and of its vectors; a store's is that of its files."""
    assert await put(index, "häuser", vectors=[[1.0, 0.0]]) == 7 + 4
    assert await put(index, "b", "file-b", vectors=[[1.0, 0.0]]) == 5
    assert await index.usage_bytes(P, S) == 16
    await index.delete_file(P, S, "file-a")
    assert await index.usage_bytes(P, S) == 5


async def test_what_is_not_there_gives_nothing(index: SearchIndex):
    """Reading a store or file that is not there gives nothing, and deleting it does nothing."""
    for _ in range(2):
        assert await find(index, "anything", S, "vs_other") == []
        assert await find(index, "anything", embedding=[1.0, 0.0]) == []
        assert await index.text(P, S, "file-b") == ""
        assert await index.list_chunks(P, S, "file-b", -1, 10) == []
        await index.delete_file(P, S, "file-b")
        await index.set_attributes(P, S, "file-b", {"a": 1})
        await index.delete_store(P, "vs_other")
        assert await index.usage_bytes(P, "vs_other") == 0
        await put(index, "something else")
    assert await index.search(P, [], "else", None, 10) == []


async def test_projects_are_apart(index: SearchIndex):
    """Another project's store is not there: not to read, not to change, not to delete."""
    await put(index, "secret words")
    assert await index.search("other", [S], "secret", None, 10) == []
    assert await index.text("other", S, "file-a") == ""
    await index.delete_file("other", S, "file-a")
    await index.set_attributes("other", S, "file-a", {"a": 1})
    await index.delete_store("other", S)
    with pytest.raises(StoreUnavailable):
        await index.put_file("other", S, "file-a", {}, cut("mine now"), None)
    assert await texts(index, "secret") == ["secret words"]


async def test_what_was_written_is_there_after_a_restart(open_index: OpenIndex):
    """An index opened anew finds everything."""
    async with open_index() as index:
        await put(index, "cats\ndogs", vectors=[[1.0, 0.0], [0.0, 1.0]])
    async with open_index() as index:
        assert await texts(index, "dogs", embedding=[0.0, 1.0], limit=1) == ["dogs"]


# --- words -----------------------------------------------------------------------------------------------------

SCRIPTS = [
    ("吾輩は猫である。名前はまだ無い。", ["猫", "名前", "吾輩は猫", "無い"], ["犬", "名札"]),
    ("北京是中国的首都。", ["首都", "中国", "京"], ["东京"]),
    ("カタカナのﾃｽﾄ", ["テスト", "カタ"], ["テキ"]),
    ("서울은 대한민국의 수도이다.", ["대한민국", "수도", "서울"], ["부산"]),
    ("กรุงเทพมหานครเป็นเมืองหลวงของไทย", ["เมืองหลวง", "กรุงเทพ", "ไทย"], ["ลาวใต้"]),
    ("ភ្នំពេញជារដ្ឋធានី", ["ភ្នំពេញ"], ["សៀមរាប"]),
    ("दिल्ली भारत की राजधानी है।", ["राजधानी", "भारत", "दिल्ली"], ["मुंबई"]),
    ("القاهرة هي عاصمة مصر", ["عاصمة", "القاهره", "مِصْر", "قاهرة"], ["بغداد"]),
    ("ירושלים היא עיר הבירה", ["ירושלים", "עִיר"], ["חיפה"]),
    ("Die Häuser an der Großen Straße", ["hauser", "HÄUSER", "strasse", "grossen"], ["haustür"]),
    ("İstanbul ve Iğdır şehirleri", ["istanbul", "ISTANBUL", "igdir", "şehirleri"], ["ankara"]),
    ("Москва — столица России", ["столица", "МОСКВА"], ["Киев"]),
    ("Αθήνα η πρωτεύουσα της Ελλάδας", ["αθηνα", "ΠΡΩΤΕΎΟΥΣΑ", "ελλαδας"], ["Σπάρτη"]),
    ("Đà Nẵng là thành phố biển", ["da nang", "thành phố"], ["hà nội"]),
]


@pytest.mark.parametrize(("text", "found", "missed"), SCRIPTS)
async def test_scripts_of_the_world(index: SearchIndex, text: str, found: list[str], missed: list[str]):
    """Words are found in every script, with and without spaces, accents and cases; others are not."""
    await put(index, f"unrelated line\n{text}\nanother line")
    for query in found:
        assert await texts(index, query) == [text], query
    for query in missed:
        assert await texts(index, query) == [], query


async def test_stems_names_and_numbers(index: SearchIndex):
    """English words are found by their stem, names of programs whole and in parts, numbers however they are grouped."""
    names = "set max_num_results in CodeInterpreterTool of report_2024.pdf, written in C++ 17.5 for 1,200,000 users"
    await put(index, f"{names}\nnothing of that kind")
    for query in (
        "max_num_results",
        "results",
        "interpreters",
        "codeinterpretertool",
        "report_2024.pdf",
        "2024",
        "c++",
    ):
        assert await texts(index, query) == [names], query
    for query in ("17.5", "1200000", "1,200,000", "writes"):
        assert (await texts(index, query)) in ([names], []), query
    assert await texts(index, "1200000") == [names]


async def test_a_name_finds_where_it_stands_whole_first(index: SearchIndex):
    """Of two chunks with the same parts, the one that has them side by side comes first."""
    await put(index, "num of max results so far\nthe max_num_results option\nother\nmore\nand more")
    assert (await texts(index, "max_num_results"))[0] == "the max_num_results option"


SYNTAX = ["NOT cats", "text:cats", "cats*", '"cats', "cats AND", "NEAR(cats dogs, 2)", "^cats", "-cats", "cats + dogs"]
SYNTAX += [
    "'cats'",
    "{text}: cats",
    "cats) OR (dogs",
    "cats\0dogs",
    '""cats""',
    "cats; DROP TABLE words",
    "- {text rank} : cats",
]


@pytest.mark.parametrize("query", SYNTAX)
async def test_a_query_is_words_and_no_syntax(index: SearchIndex, query: str):
    """What looks like a query language is looked for as the words in it."""
    await put(index, "cats sleep\nbirds sing\nfish swim")
    assert (await texts(index, query))[:1] == ["cats sleep"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(st.characters(exclude_categories=[]), max_size=40) | st.text("\"*():^-+{}' \0ANDORNOTEAR_.", max_size=30)
)
async def test_any_text_is_a_query(index: SearchIndex, query: str):
    """No text fails, whatever it holds."""
    if not await index.usage_bytes(P, S):
        await put(index, "and or not near\nA.B C_D\n猫 and dogs")
    for hit in await find(index, query):
        assert 0 < hit.score <= 1


@pytest.mark.parametrize("unit", ["long words of a page ", "x", '"', "猫", "a.b", "\0", "e\u0301"])
async def test_a_query_of_a_megabyte(index: SearchIndex, unit: str):
    """A pasted document is answered like any question."""
    await put(index, "the needle stands here\nhay")
    query = unit * (1_000_000 // len(unit)) + " needle"
    assert (await texts(index, query))[:1] == ["the needle stands here"]


async def test_more_of_the_question_scores_more(index: SearchIndex):
    """A chunk that has most words of the question scores well above one that has few, which scores little."""
    await put(
        index,
        "the termination fee of this contract is two months\nfees are due monthly\nthe weather was fine\n"
        "parking is free for visitors\nthe kitchen closes early",
    )
    hits = await find(index, "what is the termination fee of the contract?")
    assert hits[0].chunk.index == 0
    assert hits[0].score > 0.4 > 2 * hits[1].score
    assert all(hit.score < 0.2 for hit in await find(index, "does the lighthouse keeper own a submarine or a yacht?"))


# --- vectors ---------------------------------------------------------------------------------------------------


def vectors(count: int, dimensions: int = 16, seed: int = 1) -> list[list[float]]:
    chance = random.Random(seed)
    return [[chance.gauss(0, 1) for _ in range(dimensions)] for _ in range(count)]


async def test_vector_search_is_exact(index: SearchIndex):
    """The nearest vectors are found, all of them, over several files and stores."""
    many = vectors(900)
    for part in range(3):
        text = "\n".join(str(number) for number in range(part * 300, part * 300 + 300))
        await put(index, text, f"file-{part}", f"vs_{part % 2}", many[part * 300 : part * 300 + 300])
    for query in vectors(5, seed=2):
        hits = await find(index, "", "vs_0", "vs_1", embedding=query, limit=20)
        lengths = [sum(value * value for value in vector) ** 0.5 for vector in many]
        products = [
            sum(map(float.__mul__, vector, query)) / length for vector, length in zip(many, lengths, strict=True)
        ]
        nearest = sorted(range(900), key=lambda number: -products[number])[:20]
        assert {int(hit.chunk.text) for hit in hits} == set(nearest)
        assert [hit.vector_rank for hit in hits] == sorted(hit.vector_rank or 0 for hit in hits)
        assert all(hit.score == hit.similarity for hit in hits)


async def test_words_and_vectors_are_fused(index: SearchIndex):
    """First on both sides scores 1; weights decide between the sides; a side of weight 0 is not asked."""
    await put(index, "cats\ndogs\nbirds", vectors=[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    first, second = await find(index, "cats", embedding=[1.0, 0.0])
    assert (first.chunk.text, first.score, first.lexical_rank, first.vector_rank) == ("cats", 1.0, 1, 1)
    assert (second.chunk.text, second.lexical_rank, second.vector_rank) == ("dogs", None, 2)
    assert second.score == pytest.approx(0.5 * 61 / 62)
    weights = Weights(embedding=1, text=3)
    assert (await texts(index, "cats", embedding=[0.0, 1.0], weights=weights))[0] == "cats"
    only_words = await find(index, "cats", embedding=[0.0, 1.0], weights=Weights(embedding=0, text=1))
    assert [(hit.chunk.text, hit.vector_rank) for hit in only_words] == [("cats", None)]
    only_vectors = await find(index, "cats", embedding=[0.0, 1.0], weights=Weights(embedding=1, text=0))
    assert [(hit.chunk.text, hit.lexical_rank) for hit in only_vectors] == [("birds", None), ("dogs", None)]
    # A server of embeddings that is away, or that there never was.
    assert await texts(index, "cats", weights=Weights(embedding=1, text=0)) == ["cats"]


async def test_embeddings_of_another_model_are_refused(index: SearchIndex):
    """A store takes and compares only vectors of its own length; what was there stays."""
    await put(index, "cats", vectors=[[1.0, 0.0]])
    with pytest.raises(DimensionMismatch) as failure:
        await put(index, "dogs", "file-b", vectors=[[1.0, 0.0, 0.0]])
    assert (failure.value.store_id, failure.value.expected, failure.value.got) == (S, 2, 3)
    with pytest.raises(DimensionMismatch):
        await find(index, "cats", embedding=[1.0, 0.0, 0.0])
    with pytest.raises(DimensionMismatch):
        await put(index, "two\nlines", "file-b", "vs_new", vectors=[[1.0], [1.0, 0.0]])
    assert await texts(index, "cats dogs", embedding=[1.0, 0.0]) == ["cats"]
    await put(index, "cats", vectors=[[1.0, 0.0, 0.0]])  # the only file with vectors: nothing to compare them with
    assert await texts(index, "", embedding=[1.0, 0.0, 0.0]) == ["cats"]
    await put(index, "dogs", "file-b")
    await index.delete_file(P, S, "file-a")
    assert await texts(index, "dogs", embedding=[1.0, 0.0]) == ["dogs"]


async def test_files_without_vectors_are_found_by_their_words(index: SearchIndex):
    """A store may hold both kinds, and a store without vectors is searched by words alone."""
    await put(index, "cats sleep", vectors=[[1.0, 0.0]])
    await put(index, "cats play", "file-b")
    await put(index, "cats eat", "file-c", "vs_two")
    found = {hit.chunk.text: hit.vector_rank for hit in await find(index, "cats", S, "vs_two", embedding=[1.0, 0.0])}
    assert found == {"cats sleep": 1, "cats play": None, "cats eat": None}


# --- ranking, filters, several stores --------------------------------------------------------------------------


async def test_scores_do_not_depend_on_limit_or_threshold(index: SearchIndex):
    """A smaller limit and a threshold cut the list, and change no score."""
    text = "\n".join(f"cats {'and dogs ' * (number % 5)} number {number}" for number in range(300))
    await put(index, text, vectors=vectors(300, 4))
    for embedding in (None, [1.0, 0.5, 0.0, 0.0]):
        whole = await find(index, "cats and dogs", embedding=embedding)
        assert await find(index, "cats and dogs", embedding=embedding, limit=7) == whole[:7]
        middle = whole[20].score
        above = await find(index, "cats and dogs", embedding=embedding, threshold=middle)
        assert above == [hit for hit in whole if hit.score >= middle]


async def test_equal_hits_come_in_the_same_order_every_time(index: SearchIndex):
    """Chunks with equal scores share a rank and keep their order."""
    await put(index, "same words\n" * 20 + "same words")
    hits = await find(index, "same words")
    assert [hit.chunk.index for hit in hits] == list(range(21))
    assert {hit.lexical_rank for hit in hits} == {1}


async def test_filters_come_before_ranking(index: SearchIndex):
    """The best of the files that a filter lets through are found, however many others rank above."""
    await put(index, "\n".join(["cats cats cats"] * 300), vectors=[[1.0, 0.0]] * 300, year=2020, lang="en")
    await put(index, "one of the cats", "file-b", vectors=[[0.1, 1.0]], year=2024, lang="de")
    for embedding in (None, [1.0, 0.0]):
        where: Any = Gt(key="year", value=2023)
        assert await texts(index, "cats", embedding=embedding, limit=1, where=where) == ["one of the cats"]
        where = And(filters=[Ne(key="lang", value="en"), Eq(key="year", value=2020)])
        assert await texts(index, "cats", embedding=embedding, where=where) == []


async def test_attributes_can_be_changed(index: SearchIndex):
    """New attributes replace the old ones, for filters too."""
    await put(index, "cats", year=2020, lang="en")
    await index.set_attributes(P, S, "file-a", {"year": 2024})
    assert await texts(index, "cats", where=Eq(key="year", value=2024)) == ["cats"]
    assert await texts(index, "cats", where=Eq(key="lang", value="en")) == []


async def test_several_stores_count_as_one(index: SearchIndex):
    """The same chunk scores the same in whichever store it lies, and as if all were in one."""
    pages = [f"page {number} about {'cats' if number % 3 else 'rare zebras'} and things" for number in range(60)]
    await put(index, "\n".join(pages[:57]), store_id="vs_large")
    await put(index, "\n".join(pages[57:]), store_id="vs_small")
    await put(index, "\n".join(pages), store_id="vs_all")
    for query in ("zebras", "rare things about cats", "page 58"):
        apart = {hit.chunk.text: hit.score for hit in await find(index, query, "vs_small", "vs_large")}
        together = {hit.chunk.text: hit.score for hit in await find(index, query, "vs_all")}
        assert set(list(apart)[:3]) == set(list(together)[:3])
        assert all(apart[text] == pytest.approx(together[text]) for text in apart.keys() & together.keys())


async def test_a_store_named_twice_is_searched_once(index: SearchIndex):
    """A store asked for twice gives its hits once."""
    await put(index, "cats")
    assert await texts(index, "cats", S, S) == ["cats"]


# --- deleting --------------------------------------------------------------------------------------------------

SECRET = "the zyxwvut password is Quetzalcoatlus"
TRACES = [b"zyxwvut", b"quetzalcoatl", b"uetzalcoatlus", b"Quetzal", b"yxwvu"]


async def test_a_deleted_store_is_gone(index: SearchIndex):
    """A deleted store is found no more, and one of the same name can be made anew."""
    await put(index, SECRET)
    await find(index, "password")
    await index.delete_store(P, S)
    assert await find(index, "password") == []
    await put(index, "anew")
    assert await texts(index, "password anew") == ["anew"]


# --- many at once ----------------------------------------------------------------------------------------------


async def test_writers_and_readers_at_once(index: SearchIndex):
    """Eight writers and many readers of one store: every search sees whole files, and in the end all are there."""
    done = asyncio.Event()

    async def write(writer: int) -> None:
        for turn in range(4):
            text = "\n".join(f"writer {writer} turn {turn} line {line}" for line in range(5))
            await put(index, text, f"file-{writer}", vectors=[[1.0, writer + line] for line in range(5)])

    async def read() -> int:
        searches = 0
        while not done.is_set():
            hits = await find(index, "writer line", embedding=[1.0, 3.0])
            turns: dict[str, list[str]] = {}
            for hit in hits:
                turns.setdefault(hit.file_id, []).append(hit.chunk.text.split()[3])
            assert all(len(of) == 5 and len(set(of)) == 1 for of in turns.values())
            searches += 1
        return searches

    readers = [asyncio.create_task(read()) for _ in range(4)]
    await asyncio.gather(*(write(writer) for writer in range(8)))
    done.set()
    assert all(await asyncio.gather(*readers))
    assert {hit.chunk.text for hit in await find(index, "turn 3")} == {
        f"writer {writer} turn 3 line {line}" for writer in range(8) for line in range(5)
    }


async def test_a_store_deleted_while_it_is_searched(index: SearchIndex):
    """Searches, writes and deletes of one store in any order end well, and nothing is left half."""

    async def come_and_go(turn: int) -> None:
        await put(index, f"cats {turn}", f"file-{turn}")
        await texts(index, "cats")
        await index.delete_store(P, S)
        await texts(index, "cats")

    await asyncio.gather(*(come_and_go(turn) for turn in range(12)))
    await index.delete_store(P, S)
    assert await texts(index, "cats") == []


async def test_a_cancelled_write_is_whole_or_not_there(index: SearchIndex, folder: Path):
    """Whoever gives up on a write leaves the store as it was or as it was to be, and the next writer in order."""
    text = "\n".join(f"line {number}" for number in range(3_000))
    for wait_s in (0.0, 0.005, 0.02):
        writing = asyncio.create_task(put(index, text))
        await asyncio.sleep(wait_s)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
        for path in folder.rglob("*.db"):
            with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")  # the caller was held until the write had ended
        await put(index, "short", "file-b")
        assert len(await index.list_chunks(P, S, "file-a", -1, 9_999)) in (0, 3_000)


# --- the embedded index alone ----------------------------------------------------------------------------------


def database(folder: Path) -> Path:
    (path,) = folder.rglob("*.db")
    return path


async def test_deleted_text_is_gone_from_the_disk(on_disk: EmbeddedIndex, folder: Path):
    """After a file is deleted or replaced, no trace of its words is left in any file, nor of its name."""
    others = "\n".join(f"ordinary line {number}" for number in range(500))
    await put(on_disk, others, "file-b")
    await put(on_disk, SECRET, "file-secret", note="zyxwvut")
    assert all(trace in raw_bytes(folder).lower() for trace in (b"zyxwvut", b"quetzal"))
    await on_disk.delete_file(P, S, "file-secret")
    assert not [trace for trace in [*TRACES, b"file-secret"] if trace in raw_bytes(folder)]
    await put(on_disk, SECRET)
    await put(on_disk, "replaced")
    assert not [trace for trace in TRACES if trace in raw_bytes(folder)]
    assert await texts(on_disk, "zyxwvut password") == []
    assert len(await texts(on_disk, "ordinary", limit=50)) == 50


async def test_a_deleted_store_leaves_no_file(on_disk: EmbeddedIndex, folder: Path):
    """Deleting a store leaves no file of it."""
    await put(on_disk, SECRET)
    await find(on_disk, "password")
    await on_disk.delete_store(P, S)
    assert [path for path in folder.rglob("*") if path.is_file()] == []


async def test_traces_in_a_large_store_go_soon_after(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A large store is scrubbed after its last delete, or when the index is closed, or after the next write."""
    monkeypatch.setattr(embedded, "SCRUBBED_AT_ONCE", 0)
    async with embedded_index(folder) as index:
        await put(index, SECRET)
        await put(index, "other", "file-b")
        await index.delete_file(P, S, "file-a")
        assert await texts(index, "password other") == ["other"]
        assert b"zyxwvut" in raw_bytes(folder)
    assert b"zyxwvut" not in raw_bytes(folder)
    monkeypatch.setattr(embedded, "SCRUB_AFTER_S", 0.0)
    async with embedded_index(folder) as index:
        await put(index, SECRET)
        await index.delete_file(P, S, "file-a")
        while b"zyxwvut" in raw_bytes(folder):
            await asyncio.sleep(0.01)


async def test_backup_while_writing(on_disk: EmbeddedIndex, tmp_path: Path):
    """A backup holds every store as it was at one moment, and is an index of its own."""
    for store in range(5):
        await put(on_disk, f"cats of {store}\nand dogs", store_id=f"vs_{store}")
    writes = [put(on_disk, f"birds {number}\nmore", f"file-{number}", "vs_0") for number in range(20)]
    await asyncio.gather(on_disk.backup(tmp_path / "copy"), *writes)
    await on_disk.backup(tmp_path / "copy")
    await on_disk.delete_store(P, "vs_1")
    async with embedded_index(tmp_path / "copy") as copy:
        assert await texts(copy, "cats", "vs_1") == ["cats of 1"]
        assert len(await texts(copy, "birds", "vs_0")) == 20
        await put(copy, "new cats", "file-new", "vs_1")
        assert len(await texts(copy, "cats", "vs_1")) == 2
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "copy").rglob("*.db")}
    assert modes == {0o600}


async def test_files_are_the_owners_alone(folder: Path):
    """A store's file is made with its first chunk, in a folder of two letters, and only its owner may read it."""
    async with embedded_index(folder) as index:
        await find(index, "cats")
        assert not folder.exists()
        await put(index, "cats")
        assert database(folder) == folder / "ne" / "vs_one.db"
        for path in folder.rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


async def test_numpy_is_loaded_by_the_first_search():
    """A server that searches nothing does not pay for numpy."""
    program = "import sys, afterglow.search.embedded; sys.exit('numpy' in sys.modules)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    assert await process.wait() == 0


@pytest.mark.parametrize("store_id", ["../vs_x", "vs/x", "", ".", "vs_\0", "vs_é"])
async def test_a_name_that_is_no_id_reaches_no_file(folder: Path, store_id: str):
    """Only letters, digits, dashes and underscores can name a store's file."""
    async with embedded_index(folder) as index:
        with pytest.raises(ValueError, match="cannot be the name"):
            await put(index, "cats", store_id=store_id)


async def test_reads_are_not_blocked_by_a_writer(folder: Path):
    """While someone holds the write lock, searches go on, on what was there before."""
    async with embedded_index(folder) as index:
        await put(index, "cats")
        with closing(sqlite3.connect(database(folder), isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            writer.execute("DELETE FROM chunks")
            assert await texts(index, "cats") == ["cats"]


async def test_vectors_that_do_not_fit_in_memory(folder: Path):
    """With no memory to keep vectors in, the same is found."""
    async with embedded_index(folder) as index:
        await put(index, "\n".join(map(str, range(2_000))), vectors=vectors(2_000))
        await put(index, "\n".join(map(str, range(50))), "file-b", vectors=vectors(50, seed=3))
        expected = await find(index, "7", embedding=vectors(1, seed=2)[0])
    async with embedded_index(folder, memory_mb=0) as index:
        assert await find(index, "7", embedding=vectors(1, seed=2)[0]) == expected


@pytest.mark.parametrize("left", [b"", None])
async def test_a_file_whose_first_write_was_lost(folder: Path, left: bytes | None):
    """A file that was made, but never written, is no store; the next write makes one of it, a delete removes it."""
    path = folder / "ne" / "vs_one.db"
    path.parent.mkdir(parents=True)
    if left is None:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
    else:
        path.write_bytes(left)
    async with embedded_index(folder) as index:
        assert await find(index, "cats") == []
        await index.delete_file(P, S, "file-a")
        await index.set_attributes(P, S, "file-a", {})
        await put(index, "cats")
        assert await texts(index, "cats") == ["cats"]
        path.write_bytes(b"") if left is not None else None
    async with embedded_index(folder) as index:
        await index.delete_store(P, S)
        assert not path.exists()


async def test_a_broken_file_says_so(folder: Path):
    """A store whose file is no database cannot be searched or written, but deleted; other stores go on."""
    async with embedded_index(folder) as index:
        await put(index, "cats", store_id="vs_fine")
    path = folder / "ne" / "vs_one.db"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"no database at all " * 1_000)
    async with embedded_index(folder) as index:
        with pytest.raises(StoreUnavailable):
            await find(index, "cats")
        with pytest.raises(StoreUnavailable):
            await put(index, "cats")
        assert await texts(index, "cats", "vs_fine") == ["cats"]
        await index.delete_store(P, S)
        assert not path.exists()


async def test_a_closed_index_refuses(folder: Path):
    """After it is closed an index neither reads nor writes, and closing it again does nothing."""
    async with embedded_index(folder) as index:
        await index.close()
        with pytest.raises(StoreUnavailable):
            await find(index, "cats")
        with pytest.raises(StoreUnavailable):
            await put(index, "cats")


async def test_words_are_indexed_anew_by_a_release_that_reads_them_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first write after such a release brings the whole store up to date, and old words go with their files."""
    monkeypatch.setattr(ranking, "FORMAT", "0")
    monkeypatch.setattr(ranking, "searchable", lambda text: "x" + text.replace(" ", " x"))
    async with embedded_index(folder) as index:
        await put(index, "\n".join(f"number{line} cats" for line in range(1_500)))
    monkeypatch.undo()
    async with embedded_index(folder) as index:
        assert await texts(index, "number7") == []
        await put(index, "dogs", "file-b")
        assert await texts(index, "number7") == ["number7 cats"]
        assert b"xnumber" not in raw_bytes(folder)
        await index.delete_file(P, S, "file-a")
        assert await texts(index, "cats dogs") == ["dogs"]
        assert b"cats" not in raw_bytes(folder)


async def open_files(folder: Path) -> int:
    inside = str(folder)
    names = (os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
    return sum(name.startswith(inside) for name in names)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="open files are counted in /proc")
async def test_few_files_are_open(folder: Path):
    """However many stores are used, only those used last stay open."""
    async with embedded_index(folder, pool=Pool(kept_open=4)) as index:
        stores = [f"vs_{number:03}" for number in range(40)]
        await asyncio.gather(*(put(index, f"cats of {store}", store_id=store) for store in stores))
        assert len(await find(index, "cats", *stores)) == 40
        assert await open_files(folder) <= 3 * 4


async def test_a_file_in_use_is_not_removed(folder: Path):
    """A delete waits for whoever has the file open: SQLite removes the log of a closed file by its name."""
    pool, path = Pool(), folder / "vs_one.db"
    entered, leave = threading.Event(), threading.Event()

    def use() -> None:
        with pool.use(path, create=True):
            entered.set()
            leave.wait(10)

    user = asyncio.create_task(asyncio.to_thread(use))
    await asyncio.to_thread(entered.wait, 10)
    remover = asyncio.create_task(asyncio.to_thread(pool.remove, path))
    while path not in pool._going:
        await asyncio.sleep(0.001)
    assert path.exists()
    leave.set()
    await asyncio.gather(user, remover)
    assert not path.exists()


@pytest.mark.slow
async def test_a_thousand_stores(folder: Path):
    """A thousand stores are written and searched, in any order, with a hundred-odd files open."""
    async with embedded_index(folder) as index:
        stores = [f"vs_{number:04}" for number in range(1_000)]
        for start in range(0, 1_000, 50):
            await asyncio.gather(
                *(put(index, f"cats of {store}", store_id=store) for store in stores[start : start + 50])
            )
        random.Random(1).shuffle(stores)
        for start in range(0, 1_000, 50):
            found = await asyncio.gather(*(texts(index, "cats", store) for store in stores[start : start + 50]))
            assert found == [[f"cats of {store}"] for store in stores[start : start + 50]]
        assert await open_files(folder) <= 3 * 64


WRITER = """
import asyncio, sys
from pathlib import Path
from afterglow.contracts import Chunk
from afterglow.search.embedded import EmbeddedIndex

async def main():
    index = EmbeddedIndex(Path(sys.argv[1]))
    for turn in range(int(sys.argv[2]), 10_000):
        text = f"turn{turn} " * 3_000
        starts = enumerate(range(0, len(text), 300))
        chunks = [Chunk(n, text[at : at + 600], at, len(text[: at + 600]), 1, 100) for n, at in starts]
        await index.put_file("default", "vs_one", f"file-{turn % 3}", {"turn": turn}, chunks, None, text)
        print(turn, flush=True)

asyncio.run(main())
"""


def write_until_killed(folder: Path, first: int, lines: int, wait_s: float) -> int:
    """Start a writer, kill it at some moment after so many files, and return the last that it acknowledged."""
    command = [sys.executable, "-c", WRITER, str(folder), str(first)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = first - 1
        for _ in range(lines):
            last = int(process.stdout.readline())
        try:
            process.wait(wait_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
    return int(rest[-1]) if rest else last


async def test_killed_in_the_middle_of_a_write(folder: Path):
    """Whenever the process is killed, each file is whole, as it was or as it was to be, and all that was acknowledged
    is there."""
    first = 0
    for number, wait_s in enumerate((0.0, 0.02, 0.05)):
        last = await asyncio.to_thread(write_until_killed, folder, first, 3 + number, wait_s)
        async with embedded_index(folder) as index:
            newest = -1
            for file in range(3):
                text = await index.text(P, S, f"file-{file}")
                turn = int(text.split()[0].removeprefix("turn"))
                assert text == f"turn{turn} " * 3_000
                assert turn % 3 == file
                assert turn >= last - 2
                chunks = await index.list_chunks(P, S, f"file-{file}", -1, 9_999)
                assert all(text[chunk.start : chunk.end] == chunk.text for chunk in chunks)
                found = await find(index, f"turn{turn}", where=Eq(key="turn", value=turn))
                assert {hit.file_id for hit in found} == {f"file-{file}"}
                newest = max(newest, turn)
            assert last <= newest <= last + 1
        first = newest + 1


async def test_searches_at_once_read_a_store_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """What is kept of a store takes as much memory as it does, however many searches find it missing together."""
    both, reads = threading.Barrier(2), 0

    def read(connection: sqlite3.Connection, after: int) -> Any:
        nonlocal reads
        reads += 1
        with suppress(threading.BrokenBarrierError):
            both.wait(0.2)  # for another that should not come
        return read_lengths(connection, after)

    monkeypatch.setattr("afterglow.search.columns.read_lengths", read)
    async with embedded_index(folder) as index:
        await put(index, "cats\ndogs")
        found = await asyncio.gather(*(texts(index, "cats") for _ in range(4)))
    assert found == [["cats"]] * 4
    assert reads == 1
