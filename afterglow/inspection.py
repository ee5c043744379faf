"""What the index makes of files and searches, shown to whoever wants to know: chunks, ranks, and where citations come
from. Extensions of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from msgspec import Struct, structs

from afterglow import vector_stores
from afterglow.contracts import Chunk, Hit, House, Transaction
from afterglow.errors import NotFound
from afterglow.objects import AttributeValue, Filter, Json
from afterglow.rows import files as file_rows
from afterglow.rows import messages as message_rows
from afterglow.rows import threads as thread_rows
from afterglow.rows import vector_store_files as store_file_rows
from afterglow.rows.search_results import list_results
from afterglow.tools.annotations import named_by

CHUNK_ID = "chunk_"


class VectorStoreChunk(Struct, kw_only=True):
    """A passage of a file. id: one of a kind within the file; start_index, end_index: code points in the file's text,
    the end not included; page: 1…, or null where the file has none."""

    id: str
    object: str = "vector_store.file.chunk"
    index: int
    text: str
    start_index: int
    end_index: int
    page: int | None
    tokens: int


class ExplainedResult(Struct, kw_only=True):
    """A search result, and why it is where it is. score: the fused one, in 0–1. lexical_score: BM25; similarity:
    cosine. A rank is null where that side did not find the passage."""

    file_id: str
    filename: str
    attributes: dict[str, AttributeValue]
    score: float
    lexical_rank: int | None
    lexical_score: float | None
    vector_rank: int | None
    similarity: float | None
    chunk: VectorStoreChunk


class SearchExplanation(Struct, kw_only=True):
    object: str = "vector_store.search_explanation"
    search_query: list[str]
    data: list[ExplainedResult]


class Citation(Struct, kw_only=True):
    """Where a `file_citation` of a message comes from.

    text: the marker, as the annotation has it. quote: the passage that the model was given to read, null when it is not
    known or not there any more; page, start_index, end_index: where it stands in the file's text. verified: whether it
    stands there now, in that vector store.
    """

    text: str
    file_id: str
    filename: str | None = None
    vector_store_id: str | None = None
    quote: str | None = None
    page: int | None = None
    start_index: int | None = None
    end_index: int | None = None
    verified: bool = False


class Chunks(NamedTuple):
    chunks: list[VectorStoreChunk]
    has_more: bool


async def list_chunks(house: House, project: str, store_id: str, file_id: str, after: str | None, limit: int) -> Chunks:
    """The chunks of a file behind the one that `after` names, in their order. Raises NotFound and InvalidRequest."""
    await vector_stores.check_indexed(house, project, store_id, file_id)
    index = -1
    if after is not None:
        index = _index_of(after)
        known = await house.index.list_chunks(project, store_id, file_id, index - 1, 1)
        if not known or known[0].index != index:
            raise NotFound.of("chunk", after, param="after")
    found = await house.index.list_chunks(project, store_id, file_id, index, limit + 1)
    return Chunks([_shown(chunk) for chunk in found[:limit]], len(found) > limit)


def _index_of(chunk_id: str) -> int:
    number = chunk_id.removeprefix(CHUNK_ID)
    if number == chunk_id or not number.isdecimal() or len(number) > 8:
        raise NotFound.of("chunk", chunk_id, param="after")
    return int(number)


def _shown(chunk: Chunk) -> VectorStoreChunk:
    return VectorStoreChunk(
        id=f"{CHUNK_ID}{chunk.index}",
        index=chunk.index,
        text=chunk.text,
        start_index=chunk.start,
        end_index=chunk.end,
        page=chunk.page,
        tokens=chunk.tokens,
    )


async def explain(
    house: House, project: str, store_id: str, queries: list[str], limit: int, where: Filter | None, threshold: float
) -> SearchExplanation:
    """Search as `vector_stores.search` does, and tell all that it knows of each hit."""
    found = await vector_stores.search(
        house, project, [store_id], queries, limit=limit, where=where, threshold=threshold
    )
    return SearchExplanation(
        search_query=queries, data=[_explained(hit, found.files[hit.file_id]) for hit in found.hits]
    )


def _explained(hit: Hit, file: vector_stores.FoundFile) -> ExplainedResult:
    return ExplainedResult(
        file_id=hit.file_id,
        filename=file.filename,
        attributes=dict(file.attributes),
        score=hit.score,
        lexical_rank=hit.lexical_rank,
        lexical_score=hit.lexical_score,
        vector_rank=hit.vector_rank,
        similarity=hit.similarity,
        chunk=_shown(hit.chunk),
    )


# --- citations -------------------------------------------------------------------------------------------------


async def list_citations(house: House, project: str, thread_id: str, message_id: str) -> list[Citation]:
    """One for each `file_citation` of the message, in their order. Raises NotFound."""
    now = house.clock.now()

    async def look(tx: Transaction) -> list[Citation]:
        message = await message_rows.get_message(tx, project, thread_id, message_id)
        if message is None:
            missing = await thread_rows.get_thread_object(tx, project, thread_id) is None
            raise NotFound.of("thread", thread_id) if missing else NotFound.of("message", message_id)
        results = await list_results(tx, project, message.run_id) if message.run_id else []
        by_marker = {stored.marker: stored.result for stored in results}
        return [
            await _citation(tx, project, annotation, named_by(annotation["text"], by_marker), now)
            for annotation in _file_citations(message.content)
        ]

    citations = await house.store.read(look)
    await _verify(house, project, citations)
    return citations


def _file_citations(content: list[Json]) -> Iterator[Json]:
    for part in content:
        for annotation in part["text"]["annotations"] if part["type"] == "text" else ():
            if annotation["type"] == "file_citation":
                yield annotation


async def _citation(tx: Transaction, project: str, annotation: Json, result: Json | None, now: float) -> Citation:
    file_id = annotation["file_citation"]["file_id"]
    stored = await file_rows.get_file(tx, project, file_id, now)
    citation = Citation(text=annotation["text"], file_id=file_id, filename=stored and stored.file.filename)
    if stored is None or result is None or result["file_id"] != file_id:
        return citation
    return structs.replace(
        citation,
        vector_store_id=result["x-vector-store-id"],
        quote="".join(part["text"] for part in result["content"]),
        page=result["x-page"],
        start_index=result["x-start-index"],
        end_index=result["x-end-index"],
    )


async def _verify(house: House, project: str, citations: list[Citation]) -> None:
    """Look each quote up in the text that the index has of its file; of large texts, one at a time is held."""
    places = dict.fromkeys((one.vector_store_id, one.file_id) for one in citations if one.vector_store_id)
    for store_id, file_id in places:
        assert store_id is not None
        text = await _text_in_store(house, project, store_id, file_id)
        for one in citations:
            if (one.vector_store_id, one.file_id) == (store_id, file_id):
                one.verified = bool(one.quote) and text[one.start_index : one.end_index] == one.quote


async def _text_in_store(house: House, project: str, store_id: str, file_id: str) -> str:
    """Empty for a file that has left the store, also when the index has not been told yet."""

    async def look(tx: Transaction) -> bool:
        return await store_file_rows.get_file_object(tx, project, store_id, file_id) is not None

    return await house.index.text(project, store_id, file_id) if await house.store.read(look) else ""
