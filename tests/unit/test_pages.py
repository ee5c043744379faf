"""Cursor queries are read as the reference says, and lists come in its envelope."""

from __future__ import annotations

import json

import pytest
from starlette.requests import Request

from afterglow.api.pages import Page, list_body, query_value, read_include, read_page
from afterglow.errors import InvalidRequest
from afterglow.objects import INCLUDE_FILE_SEARCH_CONTENT

ENCODED = "step_details.tool_calls%5B*%5D.file_search.results%5B*%5D.content"


def request(query: str) -> Request:
    return Request({"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": query.encode()})


@pytest.mark.parametrize(
    ("query", "page"),
    [
        ("", Page(limit=20, order="desc", after=None, before=None)),
        ("limit=1&order=asc&after=msg_1&before=msg_9", Page(limit=1, order="asc", after="msg_1", before="msg_9")),
        ("limit=100", Page(limit=100)),
        ("limit=&order=&after=&before=", Page()),
        ("run_id=run_1&x=2&x=3", Page()),
    ],
)
def test_a_cursor_query_is_read(query: str, page: Page):
    """What is given is taken, what is absent or empty has the reference's default, other keys are left alone."""
    assert read_page(request(query)) == page


@pytest.mark.parametrize(
    ("query", "message", "param", "code"),
    [
        (
            "limit=101",
            "Invalid 'limit': integer above maximum value. Expected a value <= 100, but got 101 instead.",
            "limit",
            "integer_above_max_value",
        ),
        (
            "limit=0",
            "Invalid 'limit': integer below minimum value. Expected a value >= 1, but got 0 instead.",
            "limit",
            "integer_below_min_value",
        ),
        (
            "limit=-1",
            "Invalid 'limit': integer below minimum value. Expected a value >= 1, but got -1 instead.",
            "limit",
            "integer_below_min_value",
        ),
        *(
            (
                f"limit={text}",
                "Invalid type for 'limit': expected an integer, but got a string instead.",
                "limit",
                "invalid_type",
            )
            for text in ("ten", "1.5", "1e2", "%2B5", "%205", "%D9%A3", "9" * 5000)
        ),
        (
            "order=up",
            "Invalid value: 'up'. Supported values are: 'asc' and 'desc'.",
            "order",
            "invalid_value",
        ),
        (
            "limit=1&limit=1",
            "Duplicate parameter: 'limit'. You provided multiple values for this parameter, whereas only one is "
            "allowed. If you are trying to provide a list of values, use the array syntax instead e.g. "
            "'limit[]=<value>'.",
            "limit",
            "duplicate_parameter",
        ),
        ("after=a%00", "Invalid 'after': string contains a NUL character.", "after", "invalid_value"),
    ],
)
def test_a_bad_cursor_query_is_refused(query: str, message: str, param: str, code: str):
    """A bad value and a repeated key are refused in the words of the API."""
    with pytest.raises(InvalidRequest) as caught:
        read_page(request(query))
    assert (caught.value.message, caught.value.param, caught.value.code) == (message, param, code)


def test_a_filter_is_read_like_a_cursor():
    """Any other parameter that has one value is read alike."""
    assert query_value(request("run_id=run_1"), "run_id") == "run_1"
    assert query_value(request(""), "run_id") is None


@pytest.mark.parametrize("name", ["include[]", "include%5B%5D", "include", "include[0]"])
def test_include_is_read_however_it_is_written(name: str):
    """`include[]` may be written in each way that clients do, and repeated."""
    assert read_include(request(f"{name}={ENCODED}")) == [INCLUDE_FILE_SEARCH_CONTENT]
    assert read_include(request(f"{name}={ENCODED}&include[]={ENCODED}")) == [INCLUDE_FILE_SEARCH_CONTENT]
    assert read_include(request("included=x")) == []


def test_an_unknown_include_is_refused():
    """Only the one value of the reference can be included."""
    with pytest.raises(InvalidRequest) as caught:
        read_include(request(f"include[]={ENCODED}&include[]=usage"))
    error = caught.value
    assert error.message == f"Invalid value: 'usage'. Supported values are: '{INCLUDE_FILE_SEARCH_CONTENT}'."
    assert (error.param, error.code) == ("include[1]", "invalid_value")


def test_a_list_is_its_objects_in_an_envelope():
    """Ready JSON texts, as text or bytes, are put into the envelope as they are."""
    body = list_body(['{"id":"a","name":"\N{SNOWMAN}"}', b'{"id": "b"}'], ["a", "b"], True)
    assert body.endswith(b',{"id": "b"}],"first_id":"a","last_id":"b","has_more":true}')
    assert json.loads(body)["data"] == [{"id": "a", "name": "\N{SNOWMAN}"}, {"id": "b"}]


def test_an_empty_list_has_no_ids():
    """The envelope of an empty list has null for both ids."""
    assert list_body([], [], False) == b'{"object":"list","data":[],"first_id":null,"last_id":null,"has_more":false}'
