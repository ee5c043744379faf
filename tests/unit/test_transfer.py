"""What is imported is what was saved; what is exported imports to the same again."""

from __future__ import annotations

import asyncio
import json
import stat
import tracemalloc
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.pagination import SyncCursorPage
from openai.types.beta import Assistant as SdkAssistant
from openai.types.beta.threads import Message as SdkMessage

from afterglow import transfer
from afterglow.contracts import Store, Transaction, Work
from afterglow.errors import ConfigError, InvalidRequest, StoreUnavailable
from afterglow.objects import File, Message, Run, RunStep, Thread, Usage
from afterglow.rows import messages as message_rows
from afterglow.rows import runs as run_rows
from afterglow.rows import steps as step_rows
from afterglow.rows import threads as thread_rows
from afterglow.rows.assistants import get_assistant
from afterglow.rows.files import insert_file
from afterglow.rows.runs import RunAsked, RunRow
from afterglow.saved import LeftOut, Taken, read_object
from afterglow.store.sqlite import SqliteStore
from afterglow.testing import calls, says
from afterglow.transfer import Entry, ImportReport, export_objects, import_objects, in_order

T0 = 1_700_000_000
ASSISTANT = {"id": "asst_1", "object": "assistant", "created_at": T0, "model": "gpt-4o"}
THREAD = {"id": "thread_1", "object": "thread", "created_at": T0, "metadata": {"user": "7"}, "tool_resources": {}}
RUN = {
    "id": "run_1",
    "object": "thread.run",
    "created_at": T0 + 1,
    "assistant_id": "asst_1",
    "thread_id": "thread_1",
    "status": "completed",
    "model": "gpt-4o",
}
STEP = {
    "id": "step_1",
    "object": "thread.run.step",
    "created_at": T0 + 1,
    "run_id": "run_1",
    "assistant_id": "asst_1",
    "thread_id": "thread_1",
    "type": "tool_calls",
    "status": "completed",
    "step_details": {
        "type": "tool_calls",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}", "output": "1"}}
        ],
    },
}


def message(number: int, at: int = 0, **fields: Any) -> dict[str, Any]:
    return {
        "id": f"msg_{number}",
        "object": "thread.message",
        "created_at": T0 + at,
        "thread_id": "thread_1",
        "role": "user",
        "status": "completed",
        "content": [{"type": "text", "text": {"value": f"text {number}", "annotations": []}}],
        **fields,
    }


def page(*items: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": list(items), "first_id": None, "last_id": None, "has_more": False}


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = SqliteStore(tmp_path / "test.db", readers=1)
    yield opened
    await opened.close()


def saved(folder: Path, name: str, *values: Any) -> Path:
    """A file with each of the values on a line of its own, as JSON unless it is text already."""
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    path.write_text("\n".join(lines), "utf-8")
    return path


async def exported(store: Store, folder: Path, project: str = "default") -> list[dict[str, Any]]:
    path = folder / "exported.jsonl"
    await export_objects(store, project, path)
    return [json.loads(line) for line in path.read_bytes().splitlines()]


async def exported_ids(store: Store, folder: Path) -> list[str]:
    return [found["id"] for found in await exported(store, folder)]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def outcomes(report: ImportReport) -> dict[str, dict[str, int]]:
    return {kind: dict(tally.outcomes) for kind, tally in report.tallies.items() if tally.outcomes}


def notes(report: ImportReport) -> list[str]:
    return [f"{note.verdict}: {note.text}" for tally in report.tallies.values() for note in tally.notes]


# --- what is read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("one.json", json.dumps(ASSISTANT)),
        ("bom.json", "\ufeff" + json.dumps(ASSISTANT, indent=2)),
        ("array.json", json.dumps([ASSISTANT])),
        ("page.json", json.dumps(page(ASSISTANT))),
        ("nameless.json", json.dumps({"data": [ASSISTANT], "has_more": False})),
        ("pages.json", json.dumps([page(), page(ASSISTANT)])),
        ("lines.jsonl", "\n" + json.dumps(ASSISTANT) + "\n\n"),
        ("lines.NDJSON", json.dumps(page(ASSISTANT)) + "\r\n"),
        ("misnamed.json", json.dumps(page()) + "\n" + json.dumps(ASSISTANT)),
        ("any.txt", json.dumps(ASSISTANT)),
        ("deep/er/one.json", json.dumps(ASSISTANT)),
    ],
)
async def test_every_form_of_file_is_read(store: SqliteStore, tmp_path: Path, name: str, text: str):
    """Objects, arrays, list pages, lines of them, and folders of such files are all taken."""
    path = saved(tmp_path / "in", name, text)
    report = await import_objects(store, "default", [tmp_path / "in" if "deep" in name else path])
    assert report.ok
    assert await exported_ids(store, tmp_path) == ["asst_1"]


async def test_a_folder_is_read_in_natural_order_and_other_files_are_not(store: SqliteStore, tmp_path: Path):
    """page2 comes before page10; hidden files and files of other kinds are passed over."""
    folder = tmp_path / "in"
    for number in (10, 9, 2):
        saved(folder, f"page{number}.json", [message(number)])
    saved(folder, "notes.txt", "not JSON")
    saved(folder, "._page1.json", "not JSON")
    assert (await import_objects(store, "default", [folder])).ok
    assert await exported_ids(store, tmp_path) == ["thread_1", "msg_2", "msg_9", "msg_10"]


async def test_ids_times_and_content_are_kept(store: SqliteStore, tmp_path: Path):
    """Everything that the API's objects say comes out as it went in, ids of any documented shape included."""
    given_message = message(
        1,
        5,
        id="msg-Ab_" + "9" * 57,
        role="assistant",
        assistant_id="asst_gone",
        run_id="run_1",
        metadata={"schlüssel": "wert\u2028🌅"},
        content=[
            {"type": "text", "text": {"value": "a\u2028b\nc 🌅", "annotations": [{"type": "url", "x": [1.5, None]}]}},
            {"type": "image_url", "image_url": {"url": "https://example.com/x.png", "detail": "low"}},
            {"type": "refusal", "refusal": "No."},
        ],
        attachments=[{"file_id": "file-1", "tools": [{"type": "file_search"}]}],
    )
    inputs = [THREAD, given_message, RUN | {"usage": None}, STEP]
    assert (await import_objects(store, "default", [saved(tmp_path, "in.jsonl", *inputs)])).ok
    found = {item["id"]: item for item in await exported(store, tmp_path)}
    for item in inputs:
        assert found[item["id"]].items() >= item.items()


async def test_sampling_values_that_are_the_default_count_as_not_set(store: SqliteStore, tmp_path: Path):
    """A dump shows 1.0 and "auto" for what nobody set; only other values will be sent to the model."""
    given_assistant = ASSISTANT | {"temperature": 1, "top_p": 0.5, "response_format": "auto", "reasoning_effort": None}
    report = await import_objects(store, "default", [saved(tmp_path, "a.json", given_assistant)])

    async def work(tx: Transaction) -> Any:
        return await get_assistant(tx, "default", "asst_1")

    row = await store.read(work)
    assert (row.asked.temperature, row.asked.top_p, row.asked.response_format) == (None, 0.5, None)
    assert (row.assistant.temperature, row.assistant.top_p, row.assistant.response_format) == (1.0, 0.5, "auto")
    assert not row.declared
    assert "guessed: `temperature`: 1.0 is the default and counts as not set" in notes(report)


async def test_dumps_of_the_python_sdk_are_taken(store: SqliteStore, tmp_path: Path):
    """`model_dump` writes nulls for what was never sent, and `schema_`: that is understood."""
    wire_message = {key: value for key, value in message(1).items() if key != "status"}
    wire_assistant = ASSISTANT | {
        "tools": [{"type": "file_search"}, {"type": "function", "function": {"name": "f"}}],
        "tool_resources": {"code_interpreter": {"file_ids": []}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    }
    pages = [
        SyncCursorPage[SdkMessage].construct(data=[SdkMessage.construct(**wire_message)], has_more=False),
        SyncCursorPage[SdkAssistant].construct(data=[SdkAssistant.construct(**wire_assistant)], has_more=False),
    ]
    report = await import_objects(
        store, "default", [saved(tmp_path, "in.json", json.dumps([found.model_dump(mode="json") for found in pages]))]
    )
    assert report.ok, report.faults
    by_id = {item["id"]: item for item in await exported(store, tmp_path)}
    assert by_id["msg_1"]["status"] == "completed"
    assert by_id["asst_1"]["tools"][0] == {"type": "file_search"}
    assert by_id["asst_1"]["tool_resources"] == {"code_interpreter": {"file_ids": []}}
    assert by_id["asst_1"]["response_format"]["json_schema"]["schema"] == {"type": "object"}


@pytest.mark.parametrize(
    ("item", "told", "stored"),
    [
        (message(1, status=None), "guessed: `status`: not given, taken as completed", {"status": "completed"}),
        (
            message(1, status=None, incomplete_at=T0),
            "guessed: `status`: not given, taken as incomplete",
            {"status": "incomplete"},
        ),
        (
            message(1, status="in_progress"),
            "guessed: `status`: in_progress, taken as incomplete: nobody goes on writing it",
            {"status": "incomplete"},
        ),
        (
            message(1, content="plain"),
            "guessed: `content`: given as in a request, taken as text without annotations",
            {"content": [{"type": "text", "text": {"value": "plain", "annotations": []}}]},
        ),
        (
            message(1, file_ids=["file-1"]),
            "guessed: `file_ids`: of v1, taken as attachments for both tools",
            {"attachments": [{"file_id": "file-1", "tools": [{"type": "code_interpreter"}, {"type": "file_search"}]}]},
        ),
        (message(1, file_ids=["file-1"]), "kept: `attachments[].file_id`: names what an import does not bring", {}),
        (message(1, colour="red"), "lost: `colour`: not a key that is kept", {}),
        (
            message(1, content=[{"type": "image_file", "image_file": {"file_id": "file-1", "detail": None, "x": 1}}]),
            "lost: `content[].image_file.x`: not a key that is kept",
            {"content": [{"type": "image_file", "image_file": {"file_id": "file-1", "detail": "auto"}}]},
        ),
        (
            message(
                1,
                content=[
                    {
                        "type": "text",
                        "text": {
                            "value": "a【1】",
                            "annotations": [
                                {
                                    "type": "file_citation",
                                    "text": "【1】",
                                    "start_index": 1,
                                    "end_index": 4,
                                    "file_citation": {"file_id": "file-1", "quote": "words"},
                                }
                            ],
                        },
                    }
                ],
            ),
            "lost: `content[].text.annotations[].file_citation.quote`: not part of v2",
            {},
        ),
        (
            {key: value for key, value in message(1).items() if key != "object"},
            "guessed: `object`: not given, told by the id as 'thread.message'",
            {"object": "thread.message"},
        ),
        (
            ASSISTANT | {"tools": [{"type": "retrieval"}]},
            "guessed: `tools`: retrieval of v1, taken as file_search",
            {"tools": [{"type": "file_search"}]},
        ),
        (
            ASSISTANT | {"tools": [{"type": "code_interpreter"}], "file_ids": ["file-1"]},
            "guessed: `file_ids`: of v1, taken as files of the code interpreter",
            {"tool_resources": {"code_interpreter": {"file_ids": ["file-1"]}}},
        ),
        (
            ASSISTANT | {"tools": [{"type": "retrieval"}], "file_ids": ["file-1"]},
            "lost: `file_ids`: of v1, not searched: file search takes a vector store",
            {"tool_resources": {}},
        ),
        (
            THREAD | {"tool_resources": {"file_search": {"vector_store_ids": ["vs_1"]}}},
            "kept: `tool_resources.file_search.vector_store_ids`: names what an import does not bring",
            {"tool_resources": {"file_search": {"vector_store_ids": ["vs_1"]}}},
        ),
        (THREAD | {"metadata": None, "messages": [1]}, "lost: `messages`: not a key that is kept", {"metadata": {}}),
        (RUN | {"tool_choice": None}, 'guessed: `tool_choice`: null, taken as "auto"', {"tool_choice": "auto"}),
    ],
)
def test_what_is_guessed_lost_or_kept_is_told(item: dict[str, Any], told: str, stored: dict[str, Any]):
    """Each leniency has a note, and the object that is stored is a whole one."""
    taken = read_object(json.loads(json.dumps(item)))
    assert told in [f"{note.verdict}: {note.text}" for note in taken.notes]
    assert msgspec.to_builtins(taken.object).items() >= stored.items()


def test_nothing_is_told_of_an_object_that_is_whole():
    """Nulls and empty lists of keys that are not kept lose nothing, so that nothing is said."""
    whole = msgspec.to_builtins(read_object(message(1)).object)
    assert read_object(whole | {"file_ids": [], "_request_id": None}).notes == []


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place", "told"),
    [
        ("{", ":2", "no JSON"),
        ("NaN", ":2", "no JSON: NaN is no number"),
        ("[" * 100_000, ":2", ""),
        ("3", ":2", "Invalid type: expected an object of the API, but got an integer instead."),
        ("{}", ":2", "Missing required parameter: 'object'."),
        ('{"object": {}}', ":2", "Invalid type for 'object': expected a string, but got an object instead."),
        (page(message(1) | {"id": "a/b"}), ":2 /data/0", "Invalid 'id': string does not match pattern."),
        (message(1) | {"id": "m" * 65}, ":2", "Invalid 'id': string too long."),
        (message(1) | {"created_at": "2024"}, ":2", "Invalid type for 'created_at': expected an integer"),
        (message(1) | {"created_at": T0 * 1000}, ":2", "Invalid 'created_at': integer above maximum value."),
        (message(1) | {"thread_id": None}, ":2", "Invalid type for 'thread_id': expected a string"),
        ({"id": "msg_1", "created_at": T0, "role": "user"}, ":2", "Missing required parameter: 'thread_id'."),
        (message(1, role="system"), ":2", "Invalid value: 'system'. Supported values are"),
        (message(1, content=[{"type": "video"}]), ":2", "Invalid value: 'video'."),
        (message(1, content="a\0"), ":2", "Invalid 'content[0].text.value': string contains a NUL character."),
        (message(1, content="\ud800"), ":2", "Invalid 'content[0].text.value': string contains a lone surrogate."),
        (message(1, content="x" * 256_001), ":2", "Invalid 'content[0].text.value': string too long."),
        (message(1, metadata={"k": "v" * 513}), ":2", "Invalid 'metadata.k': string too long."),
        (message(1, metadata={"k": 1}), ":2", "Invalid type for 'metadata.k'"),
        (message(1, file_ids="file-1", attachments="x"), ":2", "Invalid type for 'attachments'"),
        (ASSISTANT | {"name": "n" * 257}, ":2", "Invalid 'name': string too long."),
        (ASSISTANT | {"temperature": 3}, ":2", "Invalid 'temperature': decimal above maximum value."),
        (STEP | {"step_details": {"type": "tool_calls", "tool_calls": [{"type": "mcp"}]}}, ":2", "Invalid value"),
    ],
)
async def test_what_is_wrong_is_told_with_its_place(
    store: SqliteStore, tmp_path: Path, text: Any, place: str, told: str
):
    """Each fault is reported with file, line and pointer; everything else is taken, and the report is not ok."""
    other = ASSISTANT | {"id": "asst_other"}
    path = saved(tmp_path, "in.jsonl", other, text, other | {"id": "asst_third"})
    report = await import_objects(store, "default", [path])
    assert not report.ok
    [fault] = report.faults
    assert fault.startswith(f"{path}{place}")
    assert told in fault
    assert await exported_ids(store, tmp_path) == ["asst_other", "asst_third"]


async def test_files_that_cannot_be_read_are_told(store: SqliteStore, tmp_path: Path):
    """A missing file, an empty folder, and bytes that are no text are faults of their own; the rest goes on."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe{\x00}\x00")
    good = saved(tmp_path, "good.json", ASSISTANT)
    paths = [tmp_path / "nowhere.json", tmp_path / "empty", tmp_path / "binary.json", good]
    report = await import_objects(store, "default", paths)
    assert report.faults == [
        f"{tmp_path}/nowhere.json: cannot be read: No such file or directory",
        f"{tmp_path}/empty: no .json, .jsonl, .ndjson files in this folder",
        f"{tmp_path}/binary.json: not UTF-8 text",
    ]
    assert await exported_ids(store, tmp_path) == ["asst_1"]


async def test_sorts_that_are_not_imported_are_told_and_no_fault(store: SqliteStore, tmp_path: Path):
    """Objects of other kinds, runs that are not over, and steps without their run are left out, and counted."""
    others = [
        {"object": "vector_store", "id": "vs_1"},
        {"object": "vector_store", "id": "vs_2"},
        RUN | {"status": "queued"},
    ]
    path = saved(tmp_path, "in.jsonl", *others, STEP, THREAD)
    report = await import_objects(store, "default", [path])
    assert report.ok
    assert report.left_out == {
        "objects of the kind 'vector_store'": (2, f"{path}:1"),
        "runs that are not over: nobody could go on with them": (1, f"{path}:3"),
        "run steps of a run or thread that is not here": (1, f"{path}:4"),
    }
    assert await exported_ids(store, tmp_path) == ["thread_1"]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
WHOLE = [ASSISTANT | {"tools": [], "file_ids": []}, THREAD, message(1, attachments=[]), RUN, STEP]


@given(st.sampled_from(WHOLE), st.data())
@settings(max_examples=150, deadline=None)
def test_any_value_anywhere_is_taken_or_refused(whole: dict[str, Any], data: st.DataObject):
    """Whatever stands in an object, reading it ends in an object that can be stored, or in a clear refusal."""
    item = json.loads(json.dumps(whole))
    item[data.draw(st.sampled_from(sorted(item)) | st.text(max_size=5))] = data.draw(JSON_VALUES)
    try:
        taken = read_object(item)
    except (InvalidRequest, LeftOut):
        return
    assert isinstance(taken, Taken)
    assert json.loads(msgspec.json.encode(taken.object))["id"] == taken.object.id


# --- order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_order", "paged", "expected"),
    [
        ([(1, 0), (2, 0), (3, 0)], False, [1, 2, 3]),
        ([(3, 0), (2, 0), (1, 0)], True, [1, 2, 3]),
        ([(4, 9), (3, 5), (2, 5), (1, 1)], False, [1, 2, 3, 4]),
        ([(1, 1), (2, 5), (3, 5), (4, 9)], True, [1, 2, 3, 4]),
        ([(6, 9), (5, 5), (4, 5), (3, 5), (2, 5), (1, 0)], True, [1, 2, 3, 4, 5, 6]),
        ([(3, 5), (4, 5), (1, 1), (2, 1)], False, [2, 1, 4, 3]),
    ],
)
def test_order_within_a_second_follows_the_direction_given(
    given_order: list[tuple[int, int]], paged: bool, expected: list[int]
):
    """Oldest first by time; ties as given, turned round where the list runs newest first, as pages do in doubt."""
    names = {number: name for number, (name, _) in enumerate(given_order)}
    entries = [Entry(number, "thread.message", at, paged) for number, (_, at) in enumerate(given_order)]
    assert [names[entry.number] for entry in in_order(entries)] == expected


def test_a_run_follows_the_message_of_its_second_when_both_come_in_pages():
    """Pages of different kinds do not tell their order: within a second, messages, then runs, then steps."""
    kinds = ["thread.run.step", "thread.run", "thread.message"]
    entries = [Entry(number, kind, T0, True) for number, kind in enumerate(kinds)]
    assert [entry.kind for entry in in_order(entries)] == kinds[::-1]


async def test_saved_pages_list_as_they_did(store: SqliteStore, tmp_path: Path):
    """Pages saved newest first, with messages of one second across their border, come back in their order."""
    saved(tmp_path / "in", "page1.json", page(message(5, 2), message(4, 1)))
    saved(tmp_path / "in", "page2.json", page(message(3, 1), message(2, 1), message(1, 0)))
    await import_objects(store, "default", [tmp_path / "in"])
    assert await exported_ids(store, tmp_path) == ["thread_1", "msg_1", "msg_2", "msg_3", "msg_4", "msg_5"]


async def test_older_pages_may_come_later(store: SqliteStore, tmp_path: Path):
    """Messages imported later stand where their time puts them."""
    await import_objects(store, "default", [saved(tmp_path, "new.json", page(message(4, 9), message(3, 8)))])
    await import_objects(store, "default", [saved(tmp_path, "old.json", page(message(2, 2), message(1, 1)))])
    assert await exported_ids(store, tmp_path) == ["thread_1", "msg_1", "msg_2", "msg_3", "msg_4"]


async def test_a_guess_about_order_is_told(store: SqliteStore, tmp_path: Path):
    """A page whose messages are all of one second does not tell its direction; the report says what was assumed."""
    report = await import_objects(store, "default", [saved(tmp_path, "in.json", page(message(2), message(1)))])
    assert "guessed: the order of those of one second: newest first, as list pages are" in notes(report)
    assert await exported_ids(store, tmp_path) == ["thread_1", "msg_1", "msg_2"]


# --- what is there already -------------------------------------------------------------------------------------


async def test_importing_again_changes_nothing(store: SqliteStore, tmp_path: Path):
    """A second import of the same files finds everything there, and says so."""
    path = saved(tmp_path, "in.jsonl", ASSISTANT, THREAD, message(1), message(2), RUN, STEP)
    await import_objects(store, "default", [path])
    before = await exported(store, tmp_path)
    report = await import_objects(store, "default", [path])
    assert report.ok
    assert outcomes(report) == {
        "assistant": {"already here": 1},
        "thread": {"already here": 1},
        "thread.message": {"already here": 2},
        "thread.run": {"already here": 1},
        "thread.run.step": {"already here": 1},
    }
    assert await exported(store, tmp_path) == before


async def test_an_object_that_differs_is_kept_as_it_is_here(store: SqliteStore, tmp_path: Path):
    """A conflict is told with what differs, the stored object stays, and the report is not ok."""
    await import_objects(store, "default", [saved(tmp_path, "a.json", [THREAD, message(1), message(2)])])
    other = saved(tmp_path, "b.json", [THREAD | {"metadata": {}}, message(1, role="assistant"), message(2)])
    report = await import_objects(store, "default", [other])
    assert report.conflicts == [
        f"{other} /0: thread_1 is here with other metadata; what is here was kept",
        f"{other} /1: msg_1 is here with other role; what is here was kept",
    ]
    assert not report.ok
    assert (await exported(store, tmp_path))[0]["metadata"] == {"user": "7"}


async def test_what_is_given_twice_is_taken_once(store: SqliteStore, tmp_path: Path):
    """Overlapping pages give an object twice; two that differ are a conflict, and the first counts."""
    path = saved(tmp_path, "in.jsonl", message(1), message(1), message(1, role="assistant"))
    report = await import_objects(store, "default", [path])
    assert outcomes(report)["thread.message"] == {"given twice": 1, "different": 1, "new": 1}
    assert report.conflicts == [f"{path}:3: msg_1 is also at {path}:1, with other role; the first counts"]
    assert (await exported(store, tmp_path))[1]["role"] == "user"


async def test_projects_do_not_meet(store: SqliteStore, tmp_path: Path):
    """The same ids in two projects are different objects."""
    path = saved(tmp_path, "in.jsonl", THREAD, message(1))
    await import_objects(store, "a", [path])
    report = await import_objects(store, "b", [path])
    assert outcomes(report) == {"thread": {"new": 1}, "thread.message": {"new": 1}}
    assert len(await exported(store, tmp_path, "a")) == 2
    assert await exported(store, tmp_path, "c") == []


async def test_messages_without_their_thread_get_one(store: SqliteStore, tmp_path: Path):
    """A thread is made up for them, as old as the oldest message; the thread itself may come later and fills it in."""
    path = saved(tmp_path, "messages.jsonl", message(2, 5), message(1, 3))
    report = await import_objects(store, "default", [path])
    assert outcomes(report)["thread"] == {"made up": 1}
    assert (await exported(store, tmp_path))[0] == {
        "id": "thread_1",
        "object": "thread",
        "created_at": T0 + 3,
        "metadata": {},
        "tool_resources": {},
    }
    assert outcomes(await import_objects(store, "default", [path])) == {"thread.message": {"already here": 2}}
    report = await import_objects(store, "default", [saved(tmp_path, "thread.json", THREAD)])
    assert report.ok
    assert outcomes(report) == {"thread": {"filled in": 1}}
    assert await exported_ids(store, tmp_path) == ["thread_1", "msg_1", "msg_2"]
    assert (await exported(store, tmp_path))[0] == THREAD


async def test_a_made_up_thread_that_was_written_to_is_kept(store: SqliteStore, tmp_path: Path):
    """Metadata that a caller gave a made-up thread is not overwritten by a later import."""
    await import_objects(store, "default", [saved(tmp_path, "messages.jsonl", message(1))])

    async def modify(tx: Transaction) -> None:
        found = await thread_rows.get_thread(tx, "default", "thread_1")
        assert found is not None
        found.metadata = {"mine": "yes"}
        await thread_rows.update_thread(tx, "default", found)

    await store.write(modify)
    report = await import_objects(store, "default", [saved(tmp_path, "thread.json", THREAD)])
    assert len(report.conflicts) == 1
    assert (await exported(store, tmp_path))[0]["metadata"] == {"mine": "yes"}


async def test_a_thread_may_stand_behind_its_messages(store: SqliteStore, tmp_path: Path, monkeypatch: Any):
    """The order of the input, and where batches end, decide nothing."""
    monkeypatch.setattr(transfer, "BATCH", 1)
    path = saved(tmp_path, "in.jsonl", STEP, message(1), RUN, THREAD, ASSISTANT)
    assert (await import_objects(store, "default", [path])).ok
    assert await exported_ids(store, tmp_path) == ["asst_1", "thread_1", "msg_1", "step_1", "run_1"]


# --- the import as a whole -------------------------------------------------------------------------------------


async def test_a_dry_run_tells_everything_and_writes_nothing(store: SqliteStore, tmp_path: Path):
    """The report of a dry run is that of the import but for its first line, field by field."""
    extra = {"status": None, "colour": "red"}
    path = saved(tmp_path, "in.jsonl", ASSISTANT, message(1), message(2, 1, **extra), "{", STEP, RUN)
    dry = await import_objects(store, "default", [path], dry_run=True)
    assert await exported(store, tmp_path) == []
    real = await import_objects(store, "default", [path])
    assert list(dry.lines()) == ["Dry run: nothing was written.", *real.lines()]
    assert list(real.lines()) == [
        "assistants: 1 read: 1 new",
        "  taken: id, object, created_at, model",
        "threads: 0 read: 1 made up",
        "  guessed: a thread that was not given: made, as old as the oldest of what hangs on it"
        f" (1, first thread_1, {path}:2)",
        "messages: 2 read: 2 new",
        "  taken: id, object, created_at, thread_id, role, status, content",
        f"  guessed: `status`: not given, taken as completed (1, first {path}:3)",
        f"  lost: `colour`: not a key that is kept (1, first {path}:3)",
        "runs: 1 read: 1 new",
        "  taken: id, object, created_at, assistant_id, thread_id, status, model",
        "run steps: 1 read: 1 new",
        "  taken: id, object, created_at, run_id, assistant_id, thread_id, type, status, step_details",
        f"fault: {path}:4: no JSON: Expecting property name enclosed in double quotes: line 2 column 1 (char 2)",
    ]


class Failing:
    """A store that fails at one of its writes."""

    def __init__(self, store: Store, good: int) -> None:
        self._store = store
        self._good = good
        self.read = store.read

    async def write(self, work: Work[Any]) -> Any:
        self._good -= 1
        if self._good < 0:
            raise StoreUnavailable("the disk is gone")
        return await self._store.write(work)

    async def write_early(self, work: Work[Any]) -> tuple[Any, Awaitable[None]]:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


async def test_an_interrupted_import_can_be_repeated(store: SqliteStore, tmp_path: Path, monkeypatch: Any):
    """Wherever it stopped, a second import ends where an undisturbed one would have."""
    monkeypatch.setattr(transfer, "BATCH", 2)
    inputs = [ASSISTANT, *(message(number, thread_id=f"thread_{number % 2}") for number in range(8))]
    path = saved(tmp_path, "in.json", page(*inputs))
    await import_objects(store, "whole", [path])
    for good in range(6):
        project = f"stopped{good}"
        with pytest.raises(StoreUnavailable):
            await import_objects(Failing(store, good), project, [path])
        await import_objects(store, project, [path])
        assert await exported(store, tmp_path, project) == await exported(store, tmp_path, "whole")


async def test_an_import_works_beside_a_running_server(store: SqliteStore, tmp_path: Path, monkeypatch: Any):
    """Another process' writes to the same thread and the import's do not harm one another."""
    monkeypatch.setattr(transfer, "BATCH", 5)
    path = saved(tmp_path, "in.jsonl", THREAD, *(message(number) for number in range(60)))
    await import_objects(store, "default", [saved(tmp_path, "thread.json", THREAD)])
    beside = SqliteStore(tmp_path / "test.db", readers=1)

    async def append(number: int) -> None:
        async def work(tx: Transaction) -> None:
            seq = await thread_rows.take_seq(tx, "default", "thread_1")
            assert seq is not None
            made = Message(id=f"msg_server{number}", created_at=T0, thread_id="thread_1", role="user")
            await message_rows.insert_message(tx, "default", made, seq)

        await store.write(work)

    async def serve() -> None:
        for number in range(20):
            await append(number)

    report, _ = await asyncio.gather(import_objects(beside, "default", [path]), serve())
    await beside.close()
    assert report.ok
    found = await exported_ids(store, tmp_path)
    assert len(found) == len(set(found)) == 81
    assert [name for name in found if "server" not in name][1:] == [f"msg_{number}" for number in range(60)]


async def test_a_long_jsonl_file_is_not_loaded_at_once(store: SqliteStore, tmp_path: Path):
    """Reading JSONL takes the memory of a batch, not of the file."""
    path = tmp_path / "in.jsonl"
    with path.open("w") as file:
        for number in range(60):
            file.write(json.dumps(message(number, number, content="x" * 200_000)) + "\n")
    tracemalloc.start()
    with transfer._scratch() as stage:
        transfer._stage_path(path, stage, ImportReport(dry_run=True))
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 3


# --- export ----------------------------------------------------------------------------------------------------


async def test_what_is_not_finished_is_left_out_and_told(store: SqliteStore, tmp_path: Path):
    """A run that is not over, its steps, and the message being written are not exported."""
    await import_objects(store, "default", [saved(tmp_path, "in.jsonl", THREAD, message(1), message(2, 1))])
    run = Run(id="run_x", created_at=T0, assistant_id="asst_1", thread_id="thread_1", model="m", status="in_progress")
    details = {"type": "message_creation", "message_creation": {"message_id": "msg_x"}}
    fields: dict[str, Any] = {"created_at": T0, "thread_id": "thread_1", "run_id": "run_x"}
    step = RunStep(id="step_x", assistant_id="asst_1", type="message_creation", step_details=details, **fields)
    writing = Message(id="msg_x", status="in_progress", role="assistant", **fields)

    async def work(tx: Transaction) -> None:
        row = RunRow(project="default", run=run, asked=RunAsked(), spent=Usage(), attempt=1, deadline=T0 + 600, seq=3)
        await run_rows.insert_run(tx, row)
        await message_rows.insert_message(tx, "default", writing, 4)
        await step_rows.insert_step(tx, "default", step, 5, 1)

    await store.write(work)
    file = File(id="file-1", bytes=1, created_at=T0, filename="a.txt", purpose="assistants")
    await store.write(lambda tx: insert_file(tx, "default", file, "1/file-1", 1))
    report = await export_objects(store, "default", tmp_path / "out.jsonl")
    assert list(report.lines()) == [
        f"{tmp_path}/out.jsonl: 1 thread, 2 messages",
        "left out: 1 run not finished",
        "left out: 1 message not finished",
        "left out: 1 run step not finished",
        "left out: 1 file: an export holds none",
    ]
    assert await exported_ids(store, tmp_path) == ["thread_1", "msg_1", "msg_2"]


async def test_the_file_appears_whole_and_for_its_owner_only(store: SqliteStore, tmp_path: Path):
    """An export replaces a file in one step, with mode 0600; nothing else is left in the folder."""
    out = tmp_path / "out" / "all.jsonl"
    out.parent.mkdir()
    out.write_text("old")
    await import_objects(store, "default", [saved(tmp_path, "in.json", ASSISTANT)])
    await export_objects(store, "default", out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert names(out.parent) == ["all.jsonl"]


async def test_a_place_that_cannot_be_written_is_told(store: SqliteStore, tmp_path: Path):
    """A missing folder, or a folder in the file's place, is a clear error that leaves nothing behind."""
    with pytest.raises(ConfigError, match=r"nowhere/out\.jsonl cannot be written: No such file"):
        await export_objects(store, "default", tmp_path / "nowhere" / "out.jsonl")
    (tmp_path / "out.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"out\.jsonl cannot be written: Is a directory"):
        await export_objects(store, "default", tmp_path / "out.jsonl")
    assert names(tmp_path) == ["out.jsonl", "test.db", "test.db-shm", "test.db-wal"]


# --- there and back --------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
TIME = st.integers(T0, T0 + 2)
PAIRS = st.dictionaries(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5), TEXT, max_size=3)
CONTENT = st.lists(
    TEXT.map(lambda value: {"type": "text", "text": {"value": value, "annotations": []}})
    | TEXT.map(lambda value: {"type": "refusal", "refusal": value}),
    max_size=3,
)
ITEM = st.one_of(
    st.builds(
        Message,
        id=st.just(""),
        created_at=TIME,
        thread_id=st.just(""),
        role=st.sampled_from(["user", "assistant"]),
        status=st.sampled_from(["completed", "incomplete"]),
        content=CONTENT,
        metadata=PAIRS,
        run_id=st.none() | st.just("run_0"),
    ),
    st.builds(
        Run,
        id=st.just(""),
        created_at=TIME,
        thread_id=st.just(""),
        assistant_id=st.just("asst_1"),
        model=TEXT,
        status=st.sampled_from(["completed", "failed", "cancelled", "expired", "incomplete"]),
        instructions=TEXT,
        usage=st.none() | st.builds(Usage, prompt_tokens=st.integers(0, 9)),
        tools=st.just([{"type": "function", "function": {"name": "f", "strict": False}, "x-cache": [1, {"a": 1.5}]}]),
    ),
    st.builds(
        RunStep,
        id=st.just(""),
        created_at=TIME,
        run_id=st.just("run_fixed"),
        assistant_id=st.just("asst_1"),
        thread_id=st.just(""),
        type=st.just("tool_calls"),
        status=st.sampled_from(["completed", "failed"]),
        step_details=TEXT.map(
            lambda value: {
                "type": "tool_calls",
                "tool_calls": [
                    {
                        "id": value,
                        "type": "function",
                        "function": {"name": value, "arguments": value, "output": value},
                    },
                    {"id": "c", "type": "code_interpreter", "code_interpreter": {"input": value, "outputs": []}},
                    {"id": "d", "type": "file_search", "file_search": {"results": [{"score": 0.25}]}},
                ],
            }
        ),
    ),
)
THREADS = st.lists(st.tuples(TIME, PAIRS, st.lists(ITEM, max_size=8)), max_size=4)


async def write_threads(tx: Transaction, threads: list[tuple[int, dict[str, str], list[Any]]]) -> None:
    """Put threads in the store as the server would: in this order, whatever their times."""
    for number, (created_at, metadata, items) in enumerate(threads):
        thread = Thread(id=f"thread_{number}", created_at=created_at, metadata=metadata)
        await thread_rows.insert_thread(tx, "default", thread, number + 1)
        fixed = Run(
            id=f"run_{number}", created_at=T0, assistant_id="a", thread_id=thread.id, model="m", status="failed"
        )
        for place, item in enumerate([fixed, *items]):
            made = msgspec.structs.replace(item, thread_id=thread.id, id=f"{type(item).__name__}_{number}_{place}")
            seq = await thread_rows.take_seq(tx, "default", thread.id)
            assert seq is not None
            if isinstance(made, Message):
                await message_rows.insert_message(tx, "default", made, seq)
            elif isinstance(made, Run):
                await run_rows.insert_finished_run(tx, "default", made, seq)
            else:
                made.run_id = f"Run_{number}_0"
                await step_rows.insert_step(tx, "default", made, seq, 0)


@pytest.mark.slow
@given(THREADS)
@settings(max_examples=40, deadline=None)
def test_an_export_imports_to_the_same_again(threads: list[tuple[int, dict[str, str], list[Any]]]):
    """Export, import elsewhere, export: the same bytes, whatever the text, and however many share a second."""

    async def there_and_back(folder: Path) -> None:
        first, second = (SqliteStore(folder / name, readers=1) for name in ("one.db", "two.db"))
        await first.write(lambda tx: write_threads(tx, threads))
        await export_objects(first, "default", folder / "one.jsonl")
        report = await import_objects(second, "other", [folder / "one.jsonl"])
        await export_objects(second, "other", folder / "two.jsonl")
        await first.close()
        await second.close()
        assert report.ok, list(report.lines())
        assert (folder / "one.jsonl").read_bytes() == (folder / "two.jsonl").read_bytes()

    with TemporaryDirectory() as folder:
        asyncio.run(there_and_back(Path(folder)))


async def test_a_conversation_that_moved_goes_on(start_server: Any, tmp_path: Path):
    """What one server made, tool calls included, is on another what it was, and its model sees the same history."""
    weather = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    async with start_server(tmp_path / "old") as old:
        old.model.will(calls(("get_weather", {"city": "Oslo"})), says("It rains."))
        run = await old.run("Weather in Oslo?", tools=[weather])
        [call] = run.required_action.submit_tool_outputs.tool_calls
        await old.client.beta.threads.runs.submit_tool_outputs_and_poll(
            run_id=run.id,
            thread_id=run.thread_id,
            tool_outputs=[{"tool_call_id": call.id, "output": "rain"}],
            poll_interval_ms=5,
        )
        await export_objects(old.house.store, "default", tmp_path / "old.jsonl")
        old.model.will(says("You are welcome."))
        await old.run("Thanks.", thread_id=run.thread_id)
        [*_, expected] = old.model.requests
    async with start_server(tmp_path / "new") as new:
        report = await import_objects(new.house.store, "default", [tmp_path / "old.jsonl"])
        assert report.ok, list(report.lines())
        await export_objects(new.house.store, "default", tmp_path / "new.jsonl")
        new.model.will(says("You are welcome."))
        await new.run("Thanks.", thread_id=run.thread_id, assistant_id=run.assistant_id)
        assert new.model.requests[-1].messages == expected.messages
    assert (tmp_path / "old.jsonl").read_bytes() == (tmp_path / "new.jsonl").read_bytes()
