"""Ledgers and prompts of runs, and /v1/costs. Extensions of ours; see docs/costs.md"""

from __future__ import annotations

import math

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from afterglow import bills
from afterglow.api import faults
from afterglow.api.answers import house_of, project_of, reply
from afterglow.api.pages import query_choice, query_integer, query_value, read_page
from afterglow.errors import InvalidRequest
from afterglow.objects import DAY_S
from afterglow.rows.spend import GROUPS, METADATA, Bill

MAX_RESULTS = 1000
DEFAULT_RESULTS = 100
LATEST = 253_402_300_799  # the end of the year 9999
WIDTHS = ("1d", "all")
FORMATS = ("json", "csv")


# --- ledgers and prompts ---------------------------------------------------------------------------------------


async def retrieve_run_ledger(request: Request) -> Response:
    """GET /threads/{thread_id}/runs/{run_id}/ledger: where the run's tokens went, call by call, and what they cost."""
    return reply(await bills.run_ledger(house_of(request), project_of(request), *_run_of(request)))


async def retrieve_run_step_ledger(request: Request) -> Response:
    """GET /threads/{thread_id}/runs/{run_id}/steps/{step_id}/ledger: of the call that made the step."""
    step_id = request.path_params["step_id"]
    return reply(await bills.step_ledger(house_of(request), project_of(request), *_run_of(request), step_id))


async def retrieve_run_step_prompt(request: Request) -> Response:
    """GET /threads/{thread_id}/runs/{run_id}/steps/{step_id}/prompt: what the model was given for the step, and what
    truncation has dropped. `limit` and `after` walk through the latter."""
    page, step_id = read_page(request), request.path_params["step_id"]
    found = await bills.step_prompt(
        house_of(request), project_of(request), *_run_of(request), step_id, page.after, page.limit
    )
    return reply(found)


def _run_of(request: Request) -> tuple[str, str]:
    return request.path_params["thread_id"], request.path_params["run_id"]


# --- costs -----------------------------------------------------------------------------------------------------


async def retrieve_costs(request: Request) -> Response:
    """GET /costs: what the project's model calls have cost, told apart by `group_by`; as CSV with `format=csv`."""
    return await _costs(request, _bill(request, project_of(request)))


async def retrieve_organization_costs(request: Request) -> Response:
    """GET /organization/costs: as /costs, of all projects, in buckets of a day unless `bucket_width` says otherwise."""
    return await _costs(request, _bill(request, None, by_day=True))


def _bill(request: Request, project: str | None, *, by_day: bool = False) -> Bill:
    groups = _groups(request)
    width = query_choice(request, "bucket_width", WIDTHS)
    if (width == "1d" or (width is None and by_day)) and "day" not in groups:
        groups.insert(0, "day")
    start = query_integer(request, "start_time", 0, LATEST) or 0
    end = query_integer(request, "end_time", 0, LATEST)
    now = int(house_of(request).clock.now())
    last = math.ceil((now + 1 if end is None else end) / DAY_S)
    return Bill(project, groups, start // DAY_S, last)


def _groups(request: Request) -> list[str]:
    """`group_by`, repeated or with commas; `day` comes first. The names of the original's costs are taken, too."""
    asked = [text for name in ("group_by", "group_by[]") for text in request.query_params.getlist(name)]
    groups = []
    for text in (part for one in asked for part in one.split(",") if part):
        faults.check_text(text, "group_by")
        name = "model" if text == "line_item" else text.removesuffix("_id")
        if name not in GROUPS and not (text.startswith(METADATA) and len(text) > len(METADATA)):
            raise faults.unsupported_value("group_by", text, [*GROUPS, f"{METADATA}KEY"])
        groups.append(text if text.startswith(METADATA) else name)
    if sum(group.startswith(METADATA) for group in groups) > 1:
        message = "Invalid 'group_by': one key of metadata can be asked for at a time."
        raise InvalidRequest(message, param="group_by", code="invalid_value")
    return sorted(dict.fromkeys(groups), key=lambda group: group != "day")


async def _costs(request: Request, bill: Bill) -> Response:
    format = query_choice(request, "format", FORMATS)
    limit = query_integer(request, "limit", 1, MAX_RESULTS) or DEFAULT_RESULTS
    house = house_of(request)
    if format == "csv" or (format is None and "text/csv" in request.headers.get("accept", "")):
        headers = {"content-disposition": 'attachment; filename="costs.csv"'}
        return StreamingResponse(bills.bill_as_csv(house, bill), media_type="text/csv", headers=headers)
    lines = await bills.read_bill(house, bill, _cursor(request, bill), limit + 1)
    shown = lines[:limit]
    more = len(lines) > limit
    next_page = msgspec.json.encode(bills.cursor_of(shown[-1])).hex() if more else None
    return reply(bills.CostsPage(data=bills.buckets_of(bill, shown), has_more=more, next_page=next_page))


def _cursor(request: Request, bill: Bill) -> list[str | int]:
    """The `page` that an earlier answer named: the keys of its last line."""
    text = query_value(request, "page")
    if text is None:
        return []
    try:
        keys = msgspec.json.decode(bytes.fromhex(text), type=list[str | int])
    except (ValueError, msgspec.DecodeError, RecursionError):
        keys = []
    kinds = [int if group == "day" else str for group in bill.groups] + [str]
    fits = [type(key) for key in keys] == kinds and all(abs(key) < 2**62 for key in keys if isinstance(key, int))
    if not fits or any("\0" in key for key in keys if isinstance(key, str)):
        message = "Invalid 'page': it is none that an answer to the same question has named."
        raise InvalidRequest(message, param="page", code="invalid_value")
    return keys
