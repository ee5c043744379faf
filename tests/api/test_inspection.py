"""What the index makes of files, searches and citations: the extensions for whoever wants to know."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from afterglow.testing import ScriptedEmbedder, calls, says
from tests.conftest import Server, ServerFactory

TEXT = "Cats purr at night.\nDogs bark at the cats.\nFish say nothing at all.\n"
SEARCHES = [{"type": "file_search"}]


async def upload(server: Server, text: str, name: str = "pets.txt") -> str:
    return (await server.client.files.create(file=(name, text.encode()), purpose="assistants")).id


async def store_of(server: Server, *texts: str) -> tuple[str, list[str]]:
    """A vector store whose files are indexed; its id and theirs."""
    stores = server.client.vector_stores
    store = await stores.create(name="pets")
    files = [await upload(server, text, f"pets-{number}.txt") for number, text in enumerate(texts)]
    for file_id in files:
        done = await stores.files.create_and_poll(file_id, vector_store_id=store.id, poll_interval_ms=5)
        assert done.status == "completed"
    return store.id, files


async def get(server: Server, path: str, **query: Any) -> Any:
    return await server.client.get(path, cast_to=object, options={"params": query})


# --- chunks ----------------------------------------------------------------------------------------------------


async def test_chunks_of_a_file(server: Server):
    """The chunks of a file come in their order, each with its place in the text that the content endpoint gives."""
    store_id, [file_id] = await store_of(server, TEXT)
    answer = await get(server, f"/vector_stores/{store_id}/files/{file_id}/chunks")
    [page] = [one async for one in server.client.vector_stores.files.content(file_id, vector_store_id=store_id)]
    assert [chunk["text"] for chunk in answer["data"]] == TEXT.splitlines()
    assert [page.text[chunk["start_index"] : chunk["end_index"]] for chunk in answer["data"]] == TEXT.splitlines()
    assert [chunk["index"] for chunk in answer["data"]] == [0, 1, 2]
    assert [answer[key] for key in ("first_id", "last_id", "has_more")] == ["chunk_0", "chunk_2", False]
    assert answer["data"][0] == {
        "id": "chunk_0",
        "object": "vector_store.file.chunk",
        "index": 0,
        "text": "Cats purr at night.",
        "start_index": 0,
        "end_index": 19,
        "page": None,
        "tokens": 4,
    }


async def test_chunks_by_pages(server: Server):
    """`limit` and `after` walk through all chunks of a file, each once."""
    store_id, [file_id] = await store_of(server, TEXT)
    path = f"/vector_stores/{store_id}/files/{file_id}/chunks"
    first = await get(server, path, limit=2)
    second = await get(server, path, limit=2, after=first["last_id"])
    third = await get(server, path, limit=2, after=second["last_id"])
    assert [len(page["data"]) for page in (first, second, third)] == [2, 1, 0]
    assert [page["has_more"] for page in (first, second, third)] == [True, False, False]
    assert [third["first_id"], third["last_id"]] == [None, None]


@pytest.mark.parametrize("after", ["chunk_3", "chunk_99999999999", "chunk_-1", "chunk_²", "2", "chunk_"])
async def test_chunks_after_what_is_not_there(server: Server, after: str):
    """An `after` that names no chunk of the file is a 404."""
    store_id, [file_id] = await store_of(server, TEXT)
    with pytest.raises(openai.NotFoundError, match="No chunk found") as error:
        await get(server, f"/vector_stores/{store_id}/files/{file_id}/chunks", after=after)
    assert error.value.param == "after"


async def test_chunks_of_nothing(server: Server):
    """Chunks of a file that is not in the store, or not indexed, are refused as its content is."""
    store_id, _ = await store_of(server)
    with pytest.raises(openai.NotFoundError, match="No file found"):
        await get(server, f"/vector_stores/{store_id}/files/file-none/chunks")
    with pytest.raises(openai.NotFoundError, match="Vector store"):
        await get(server, "/vector_stores/vs_none/files/file-none/chunks")
    empty = await upload(server, "")
    files = server.client.vector_stores.files
    await files.create_and_poll(empty, vector_store_id=store_id, poll_interval_ms=5)
    with pytest.raises(openai.BadRequestError, match="status 'failed'"):
        await get(server, f"/vector_stores/{store_id}/files/{empty}/chunks")


# --- explained searches ----------------------------------------------------------------------------------------


async def explain(server: Server, store_id: str, **body: Any) -> Any:
    return await server.client.post(f"/vector_stores/{store_id}/explain", cast_to=object, body=body)


async def test_an_explained_search_is_that_search(server: Server):
    """Explained, a search has the results and scores of the search itself, with ranks, BM25 and places."""
    store_id, [first, second] = await store_of(server, TEXT, "The cats of Oslo.\nOslo has trams.")
    found = [one async for one in server.client.vector_stores.search(store_id, query="cats")]
    answer = await explain(server, store_id, query="cats")
    assert answer["object"] == "vector_store.search_explanation"
    assert answer["search_query"] == ["cats"]
    told = answer["data"]
    assert [(one["file_id"], one["score"], one["chunk"]["text"]) for one in told] == [
        (one.file_id, one.score, one.content[0].text) for one in found
    ]
    assert {one["file_id"] for one in told} == {first, second}
    assert [one["lexical_rank"] for one in told] == sorted(one["lexical_rank"] for one in told)
    assert all(one["lexical_score"] > 0 for one in told)
    assert all(one["vector_rank"] is one["similarity"] is None for one in told)
    assert told[0]["filename"] == f"pets-{[first, second].index(told[0]['file_id'])}.txt"


async def test_explained_vectors(tmp_path: Any, start_server: ServerFactory):
    """With embeddings, vector ranks and similarities are told; what words did not find has no lexical rank."""
    async with start_server(tmp_path, embedder=ScriptedEmbedder()) as server:
        store_id, _ = await store_of(server, TEXT)
        told = (await explain(server, store_id, query="barking", max_num_results=3))["data"]
    assert sorted(one["vector_rank"] for one in told) == [1, 2, 3]
    assert all(0 < one["similarity"] <= 1 for one in told)
    assert {one["chunk"]["text"]: one["lexical_rank"] for one in told} == {
        "Cats purr at night.": None,
        "Dogs bark at the cats.": 1,
        "Fish say nothing at all.": None,
    }


async def test_explained_as_asked(server: Server):
    """The body is that of a search: its limit, threshold and filters hold, and its faults are told the same way."""
    store_id, _ = await store_of(server, TEXT)
    assert len((await explain(server, store_id, query="cats", max_num_results=1))["data"]) == 1
    none = {"type": "eq", "key": "kind", "value": "none"}
    assert (await explain(server, store_id, query="cats", filters=none))["data"] == []
    with pytest.raises(openai.BadRequestError, match="query"):
        await explain(server, store_id)


# --- citations -------------------------------------------------------------------------------------------------


async def cited(server: Server, store_id: str, answer: str) -> str:
    """The path of the citations of a message that answers with `answer` after a search for cats."""
    assistant = await server.assistant(tools=SEARCHES, tool_resources={"file_search": {"vector_store_ids": [store_id]}})
    server.model.will(calls(("file_search", {"queries": ["cats purr"]})), says(answer))
    run = await server.run("What do cats do?", assistant_id=assistant.id)
    assert run.status == "completed"
    newest = (await server.client.beta.threads.messages.list(run.thread_id, limit=1)).data[0]
    return f"/threads/{run.thread_id}/messages/{newest.id}/citations"


async def test_citations(server: Server):
    """Each citation of a message is told with the passage that the model read, its place, and that it stands there."""
    store_id, [file_id] = await store_of(server, TEXT)
    path = await cited(
        server, store_id, "They purr【0:0†pets-0.txt】 and are barked at【0:1†pets-0.txt】【0:0†pets-0.txt】."
    )
    answer = await get(server, path)
    assert answer["object"] == "list"
    assert answer["data"][0] == {
        "text": "【0:0†pets-0.txt】",
        "file_id": file_id,
        "filename": "pets-0.txt",
        "vector_store_id": store_id,
        "quote": "Cats purr at night.",
        "page": None,
        "start_index": 0,
        "end_index": 19,
        "verified": True,
    }
    assert [one["quote"] for one in answer["data"]] == [TEXT.splitlines()[line] for line in (0, 1, 0)]
    assert all(one["verified"] for one in answer["data"])


async def test_citations_of_what_left_the_store(server: Server):
    """Once a file has left its store, its quotes are still told, and not verified any more."""
    store_id, [file_id] = await store_of(server, TEXT)
    path = await cited(server, store_id, "They purr【0:0†pets-0.txt】.")
    await server.client.vector_stores.files.delete(file_id, vector_store_id=store_id)
    [citation] = (await get(server, path))["data"]
    assert citation["quote"] == "Cats purr at night."
    assert citation["verified"] is False


async def test_citations_of_a_deleted_file(server: Server):
    """Of a deleted file nothing is quoted; the marker and its id are all that is left."""
    store_id, [file_id] = await store_of(server, TEXT)
    path = await cited(server, store_id, "They purr【0:0†pets-0.txt】.")
    await server.client.files.delete(file_id)
    [citation] = (await get(server, path))["data"]
    assert citation["text"] == "【0:0†pets-0.txt】"
    assert citation["file_id"] == file_id
    assert [citation[key] for key in ("filename", "vector_store_id", "quote", "start_index")] == [None] * 4
    assert citation["verified"] is False


async def test_citations_of_a_message_without_any(server: Server):
    """A caller's own message cites nothing; what is no message is a 404."""
    thread = await server.client.beta.threads.create(messages=[{"role": "user", "content": "Hello【0:0†pets.txt】"}])
    message = (await server.client.beta.threads.messages.list(thread.id)).data[0]
    assert await get(server, f"/threads/{thread.id}/messages/{message.id}/citations") == {"object": "list", "data": []}
    with pytest.raises(openai.NotFoundError, match="No message found"):
        await get(server, f"/threads/{thread.id}/messages/msg_none/citations")
    with pytest.raises(openai.NotFoundError, match="No thread found"):
        await get(server, f"/threads/thread_none/messages/{message.id}/citations")


async def test_other_projects_see_none_of_it(tmp_path: Any, start_server: ServerFactory):
    """To another project the store and the thread are not there."""
    async with start_server(tmp_path, api_keys="test-key,sk-other:team-b") as server:
        store_id, [file_id] = await store_of(server, TEXT)
        path = await cited(server, store_id, "They purr【0:0†pets-0.txt】.")
        other = server.client.with_options(api_key="sk-other")
        for asked in (path, f"/vector_stores/{store_id}/files/{file_id}/chunks"):
            with pytest.raises(openai.NotFoundError):
                await other.get(asked, cast_to=object)
        with pytest.raises(openai.NotFoundError):
            await other.post(f"/vector_stores/{store_id}/explain", cast_to=object, body={"query": "cats"})
