"""Saved objects of the API, as other servers, SDKs and our own export write them, brought into the form of ours.

Pure. `read_object` takes one object as plain data and says what had to be guessed for it and what of it is lost.
Files, and what becomes of the objects, are in `transfer.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct, inspect

from afterglow import objects
from afterglow.api import faults
from afterglow.assistants import SHOWN_DEFAULTS, show_sampling
from afterglow.objects import Assistant, Json, Message, Metadata, Run, RunStep, Thread, ToolResources
from afterglow.rows.assistants import Asked
from afterglow.rows.transfer import Table
from afterglow.runs.states import ACTIVE

MAX_USER_TEXT_CHARS = 256_000

# --- what saved objects look like ------------------------------------------------------------------------------
# As in objects.py, with everything checked that a stored object is relied on for. Limits that only a request has
# are not here: a model may write more.

Id = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$(?!\n)")]
Seconds = Annotated[int, Meta(ge=0, le=253_402_300_799)]  # to the year 9999; what is larger counts milliseconds
NO_RESOURCES = msgspec.field(default_factory=ToolResources)


class SavedAssistant(Struct, kw_only=True):
    id: Id
    object: Literal["assistant"]
    created_at: Seconds
    model: str
    name: Annotated[str, Meta(max_length=256)] | None = None
    description: Annotated[str, Meta(max_length=512)] | None = None
    instructions: objects.Instructions | None = None
    tools: objects.Tools = []
    tool_resources: ToolResources = NO_RESOURCES
    metadata: Metadata = {}
    temperature: objects.Temperature | None = None
    top_p: objects.TopP | None = None
    response_format: objects.ResponseFormat | None = None
    reasoning_effort: objects.ReasoningEffort | None = None


class SavedThread(Struct, kw_only=True):
    id: Id
    object: Literal["thread"]
    created_at: Seconds
    metadata: Metadata = {}
    tool_resources: ToolResources = NO_RESOURCES


class SavedTextValue(Struct, kw_only=True):
    value: str
    annotations: list[Json] = []


class SavedText(Struct, kw_only=True, tag_field="type", tag="text"):
    text: SavedTextValue


class SavedRefusal(Struct, kw_only=True, tag_field="type", tag="refusal"):
    refusal: str


class SavedMessage(Struct, kw_only=True):
    id: Id
    object: Literal["thread.message"]
    created_at: Seconds
    thread_id: Id
    status: Literal["incomplete", "completed"] = "completed"
    incomplete_details: objects.IncompleteDetails | None = None
    completed_at: Seconds | None = None
    incomplete_at: Seconds | None = None
    role: Literal["user", "assistant"]
    content: list[SavedText | SavedRefusal | objects.ImageFileInput | objects.ImageUrlInput] = []
    assistant_id: Id | None = None
    run_id: Id | None = None
    attachments: list[objects.Attachment] = []
    metadata: Metadata = {}


class SavedRun(Struct, kw_only=True):
    id: Id
    object: Literal["thread.run"]
    created_at: Seconds
    assistant_id: Id
    thread_id: Id
    status: Literal["cancelled", "failed", "completed", "incomplete", "expired"]
    started_at: Seconds | None = None
    expires_at: Seconds | None = None
    cancelled_at: Seconds | None = None
    failed_at: Seconds | None = None
    completed_at: Seconds | None = None
    required_action: Json | None = None
    last_error: objects.LastError | None = None
    incomplete_details: objects.IncompleteDetails | None = None
    model: str
    instructions: str = ""
    tools: objects.Tools = []
    tool_resources: ToolResources = NO_RESOURCES
    metadata: Metadata = {}
    temperature: objects.Temperature | None = None
    top_p: objects.TopP | None = None
    reasoning_effort: objects.ReasoningEffort | None = None
    max_prompt_tokens: int | None = None
    max_completion_tokens: int | None = None
    truncation_strategy: objects.TruncationStrategy = msgspec.field(
        default_factory=lambda: objects.TruncationStrategy(type="auto")
    )
    tool_choice: objects.ToolChoice = "auto"
    parallel_tool_calls: bool = True
    response_format: objects.ResponseFormat = "auto"
    usage: objects.Usage | None = None


class SavedMessageId(Struct, kw_only=True):
    message_id: Id


class SavedCreation(Struct, kw_only=True, tag_field="type", tag="message_creation"):
    message_creation: SavedMessageId


class SavedFunction(Struct, kw_only=True):
    name: str
    arguments: str
    output: str | None = None


class SavedFunctionCall(Struct, kw_only=True, tag_field="type", tag="function"):
    id: str
    function: SavedFunction


class SavedLogs(Struct, kw_only=True, tag_field="type", tag="logs"):
    logs: str


class SavedImage(Struct, kw_only=True, tag_field="type", tag="image"):
    image: Json


class SavedCode(Struct, kw_only=True):
    input: str
    outputs: list[SavedLogs | SavedImage] = []


class SavedCodeCall(Struct, kw_only=True, tag_field="type", tag="code_interpreter"):
    id: str
    code_interpreter: SavedCode


class SavedSearchCall(Struct, kw_only=True, tag_field="type", tag="file_search"):
    id: str
    file_search: Json = {}


class SavedCalls(Struct, kw_only=True, tag_field="type", tag="tool_calls"):
    tool_calls: list[SavedFunctionCall | SavedCodeCall | SavedSearchCall]


class SavedStep(Struct, kw_only=True):
    id: Id
    object: Literal["thread.run.step"]
    created_at: Seconds
    run_id: Id
    assistant_id: Id
    thread_id: Id
    type: Literal["message_creation", "tool_calls"]
    status: Literal["cancelled", "failed", "completed", "expired"]
    cancelled_at: Seconds | None = None
    completed_at: Seconds | None = None
    expired_at: Seconds | None = None
    failed_at: Seconds | None = None
    expires_at: Seconds | None = None
    last_error: objects.LastError | None = None
    step_details: SavedCreation | SavedCalls
    metadata: Metadata | None = None
    usage: objects.Usage | None = None


class Kind(NamedTuple):
    """noun: as the reports call it; saved: what is demanded of it; wire: what is stored of it; prefix: of its ids."""

    noun: str
    prefix: str
    table: Table
    saved: type[Struct]
    wire: type[Struct]


# By the value of `object`. Where a thread was given newest first, this is also the order within one second.
KINDS = {
    "assistant": Kind("assistant", "asst_", "assistants", SavedAssistant, Assistant),
    "thread": Kind("thread", "thread_", "threads", SavedThread, Thread),
    "thread.message": Kind("message", "msg_", "messages", SavedMessage, Message),
    "thread.run": Kind("run", "run_", "runs", SavedRun, Run),
    "thread.run.step": Kind("run step", "step_", "steps", SavedStep, RunStep),
}


# --- one object ------------------------------------------------------------------------------------------------


class Note(NamedTuple):
    """guessed: the input does not say it; lost: it is not kept; kept: as given, though it names what an
    import does not bring."""

    verdict: Literal["guessed", "lost", "kept"]
    text: str


Notes = list[Note]


class Taken(NamedTuple):
    """kind: a key of KINDS; object: ready to be stored; fields: the keys that were given and are kept."""

    kind: str
    object: Any
    fields: list[str]
    notes: Notes


class LeftOut(Exception):
    """Well-formed, but of a sort that is not imported. args: which sort."""


def read_object(plain: Any) -> Taken:
    """Bring one saved object into the form of ours. `plain` is used up.

    Raises LeftOut, or InvalidRequest, worded as the API words it, for the first thing that is wrong with it.
    """
    notes: Notes = []
    kind = _kind_of(plain, notes)
    if kind in ("thread.run", "thread.run.step") and plain.get("status") in list(ACTIVE):
        raise LeftOut(f"{KINDS[kind].noun}s that are not over: nobody could go on with them")
    given = list(plain)
    plain["object"] = kind
    MENDS[kind](plain, notes)
    whole = _complete(_shape(KINDS[kind].saved), plain, "", notes)
    faults.check_shape(KINDS[kind].saved, whole)
    if kind == "thread.message":
        _check_length(whole)
    notes += [
        Note("kept", f"`{path}`: names what an import does not bring") for path in sorted(set(_dangling(whole, "")))
    ]
    found = msgspec.convert(whole, KINDS[kind].wire)
    if isinstance(found, Assistant):
        show_sampling(found, asked_of(found))
    return Taken(kind, found, [key for key in given if key in whole], notes)


def _kind_of(plain: Any, notes: Notes) -> str:
    if not isinstance(plain, dict):
        raise faults.wrong_type("", "an object of the API", plain)
    name = plain.get("object")
    if name is None:
        return _kind_by_id(plain.get("id"), notes)
    if not isinstance(name, str):
        raise faults.wrong_type("object", "a string", name)
    if name not in KINDS:
        raise LeftOut(f"objects of the kind '{faults.shown(name)}'")
    return name


def _kind_by_id(object_id: Any, notes: Notes) -> str:
    for name, kind in KINDS.items():
        if isinstance(object_id, str) and object_id.startswith(kind.prefix):
            notes.append(Note("guessed", f"`object`: not given, told by the id as '{name}'"))
            return name
    raise faults.missing("object")


@cache
def _shape(kind: type[Struct]) -> inspect.Type:
    return inspect.type_info(kind)


def _complete(shape: inspect.Type, value: Any, path: str, notes: Notes) -> Any:
    """Drop keys that the type does not know, and fill in defaults for what is left out, or null where it may not be.

    What does not fit at all stays as it is, for `faults.check_shape` to word.
    """
    options = shape.types if isinstance(shape, inspect.UnionType) else (shape,)
    for option in options:
        if isinstance(value, list) and isinstance(option, inspect.ListType):
            return [_complete(option.item_type, item, f"{path}[]", notes) for item in value]
        if isinstance(value, dict) and isinstance(option, inspect.StructType) and _has_tag(option, value):
            return _complete_struct(option, value, path, notes)
    return value


def _has_tag(shape: inspect.StructType, value: Json) -> bool:
    return shape.tag_field is None or value.get(shape.tag_field) == shape.tag


def _complete_struct(shape: inspect.StructType, value: Json, path: str, notes: Notes) -> Json:
    fields = {row.encode_name: row for row in shape.fields}
    keeps_vendor_keys = fields.pop(objects.VENDOR_KEYS, None) is not None
    whole: Json = {}
    for key, item in value.items():
        place = faults.inside(path, key)
        if key == shape.tag_field or (keeps_vendor_keys and key.startswith("x-")):
            whole[key] = item
        elif key not in fields:
            if item not in (None, [], {}):
                notes.append(Note("lost", f"`{place}`: not a key that is kept"))
        elif item is not None or fields[key].required or _takes_null(fields[key].type):
            whole[key] = _complete(fields[key].type, item, place, notes)
        elif default := _default(fields[key]):
            notes.append(Note("guessed", f"`{place}`: null, taken as {json.dumps(default)}"))
    for key, row in fields.items():
        if key not in whole and (default := _default(row)) is not None:
            whole[key] = default
    return whole


def _takes_null(shape: inspect.Type) -> bool:
    options = shape.types if isinstance(shape, inspect.UnionType) else (shape,)
    return any(isinstance(option, inspect.NoneType) for option in options)


def _default(row: inspect.Field) -> Any:
    """As plain data; None also when there is none."""
    if row.default_factory is not msgspec.NODEFAULT:
        return msgspec.to_builtins(row.default_factory())
    return None if row.default is msgspec.NODEFAULT else msgspec.to_builtins(row.default)


def _check_length(message: Json) -> None:
    """A caller's text has the limit of a request; a model's has none."""
    for index, part in enumerate(message["content"] if message["role"] == "user" else ()):
        if part["type"] == "text" and len(part["text"]["value"]) > MAX_USER_TEXT_CHARS:
            flaw = f"string too long. Expected a string with maximum length {MAX_USER_TEXT_CHARS}."
            raise faults.invalid(f"content[{index}].text.value", flaw, "string_above_max_length")


def _dangling(value: Any, path: str) -> Iterator[str]:
    """Paths of what names files and vector stores, which may be here or not: they are not imported."""
    if isinstance(value, list):
        for item in value:
            yield from _dangling(item, f"{path}[]")
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in ("file_id", "file_ids", "vector_store_ids") and item:
                yield faults.inside(path, key)
            elif key not in ("metadata", "tools", "response_format"):
                yield from _dangling(item, faults.inside(path, key))


def asked_of(assistant: Assistant) -> Asked:
    """Which sampling values were set: a dump shows defaults as well, so that those count as not set."""
    shown = {name: getattr(assistant, name) for name in SHOWN_DEFAULTS}
    return Asked(**{name: value for name, value in shown.items() if value != SHOWN_DEFAULTS[name]})


# --- what older and other dumps have otherwise -----------------------------------------------------------------


def _mend_assistant(plain: Json, notes: Notes) -> None:
    _mend_options(plain, notes)
    for name, default in SHOWN_DEFAULTS.items():
        if default is not None and plain.get(name) == default:
            notes.append(Note("guessed", f"`{name}`: {json.dumps(default)} is the default and counts as not set"))
    if file_ids := plain.pop("file_ids", None):
        kinds = [tool.get("type") for tool in _dicts(plain.get("tools"))]
        if "code_interpreter" in kinds and not plain.get("tool_resources"):
            plain["tool_resources"] = {"code_interpreter": {"file_ids": file_ids}}
            notes.append(Note("guessed", "`file_ids`: of v1, taken as files of the code interpreter"))
        if "code_interpreter" not in kinds or "file_search" in kinds:
            notes.append(Note("lost", "`file_ids`: of v1, not searched: file search takes a vector store"))


def _mend_options(plain: Json, notes: Notes) -> None:
    """What assistants and runs have in common."""
    for tool in _dicts(plain.get("tools")):
        if tool.get("type") == "retrieval":
            tool["type"] = "file_search"
            notes.append(Note("guessed", "`tools`: retrieval of v1, taken as file_search"))
        if tool.get("type") == "file_search":
            _drop_nulls(tool, "file_search")
            if tool.get("file_search", ...) is None:
                del tool["file_search"]
        elif isinstance(function := tool.get("function"), dict):
            function["strict"] = function.get("strict") or False
    for schema_format in _dicts([plain.get("response_format")]):
        for found in _dicts([schema_format.get("json_schema")]):
            if "schema_" in found:  # so called in dumps of the Python SDK
                found["schema"] = found.pop("schema_")
    _drop_nulls(plain, "tool_resources")


def _mend_thread(plain: Json, notes: Notes) -> None:
    _drop_nulls(plain, "tool_resources")


def _mend_message(plain: Json, notes: Notes) -> None:
    status = plain.get("status")
    if status is None:
        cut = plain.get("incomplete_at") or plain.get("incomplete_details")
        plain["status"] = "incomplete" if cut else "completed"
        notes.append(Note("guessed", f"`status`: not given, taken as {plain['status']}"))
    elif status == "in_progress":
        plain["status"] = "incomplete"
        notes.append(Note("guessed", "`status`: in_progress, taken as incomplete: nobody goes on writing it"))
    if isinstance(content := plain.get("content"), str):
        plain["content"] = [{"type": "text", "text": content}]
    for part in _dicts(plain.get("content")):
        _mend_text(part, notes)
    if isinstance(file_ids := plain.get("file_ids"), list) and file_ids:
        both = [{"type": "code_interpreter"}, {"type": "file_search"}]
        named = [{"file_id": file_id, "tools": both} for file_id in plain.pop("file_ids")]
        plain["attachments"] = [*_dicts(plain.get("attachments")), *named]
        notes.append(Note("guessed", "`file_ids`: of v1, taken as attachments for both tools"))


def _mend_text(part: Json, notes: Notes) -> None:
    if isinstance(text := part.get("text"), str):
        part["text"] = {"value": text, "annotations": []}
        notes.append(Note("guessed", "`content`: given as in a request, taken as text without annotations"))
    elif isinstance(text, dict):
        for annotation in _dicts(text.get("annotations")):
            citation = annotation.get("file_citation")
            if isinstance(citation, dict) and citation.pop("quote", None):
                notes.append(Note("lost", "`content[].text.annotations[].file_citation.quote`: not part of v2"))


def _mend_step(plain: Json, notes: Notes) -> None:
    details = plain.get("step_details")
    for call in _dicts(details.get("tool_calls") if isinstance(details, dict) else None):
        if call.get("type") == "retrieval":
            call["type"] = "file_search"
            call["file_search"] = call.pop("retrieval", None) or {}
            notes.append(Note("guessed", "`step_details.tool_calls`: retrieval of v1, taken as file_search"))
        _drop_nulls(call, "file_search")


MENDS: dict[str, Callable[[Json, Notes], None]] = {
    "assistant": _mend_assistant,
    "thread": _mend_thread,
    "thread.message": _mend_message,
    "thread.run": _mend_options,
    "thread.run.step": _mend_step,
}


def _dicts(value: Any) -> list[Json]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _drop_nulls(plain: Json, key: str) -> None:
    """SDKs dump keys that were never sent as nulls."""
    if isinstance(value := plain.get(key), dict):
        plain[key] = {name: item for name, item in value.items() if item is not None}
