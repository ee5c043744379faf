"""What the index makes of files, searches and citations. Extensions of ours; see docs/file-search.md"""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from afterglow import inspection
from afterglow.api.answers import house_of, project_of, reply
from afterglow.api.bodies import parse
from afterglow.api.pages import list_body, read_page
from afterglow.objects import SearchRanking, SearchVectorStore


async def list_chunks(request: Request) -> Response:
    """GET /vector_stores/{vector_store_id}/files/{file_id}/chunks: the passages that a file was cut into, in their
    order in the file."""
    page = read_page(request)
    store_id, file_id = request.path_params["vector_store_id"], request.path_params["file_id"]
    found = await inspection.list_chunks(
        house_of(request), project_of(request), store_id, file_id, page.after, page.limit
    )
    ids = [chunk.id for chunk in found.chunks]
    return reply(list_body([msgspec.json.encode(chunk) for chunk in found.chunks], ids, found.has_more))


async def explain_search(request: Request) -> Response:
    """POST /vector_stores/{vector_store_id}/explain: a search, with the ranks and scores of each result. Of several
    queries, a result's are those of the query that it scores best with."""
    body = await parse(request, SearchVectorStore)
    explanation = await inspection.explain(
        house_of(request),
        project_of(request),
        request.path_params["vector_store_id"],
        [body.query] if isinstance(body.query, str) else body.query,
        body.max_num_results,
        body.filters or None,
        (body.ranking_options or SearchRanking()).score_threshold,
    )
    return reply(explanation)


async def list_citations(request: Request) -> Response:
    """GET /threads/{thread_id}/messages/{message_id}/citations: the passages that a message cites, and whether each
    stands in its file now. Not paginated."""
    thread_id, message_id = request.path_params["thread_id"], request.path_params["message_id"]
    citations = await inspection.list_citations(house_of(request), project_of(request), thread_id, message_id)
    return reply({"object": "list", "data": citations})
