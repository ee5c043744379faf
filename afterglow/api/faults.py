"""What is wrong with a body, worded as the API words it.

msgspec decodes the good case and says little about a bad one: it names neither map keys nor the values and lengths
it saw. So a refused body is read once more as plain data, and `check_shape` walks it beside the same type until it
meets the first fault, in document order. `check_rules` holds what no type can say, and looks at good bodies too.
Nothing here reads requests; `api/bodies.py` does.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from msgspec import UNSET, Struct, UnsetType, inspect

from afterglow import objects
from afterglow.errors import InvalidRequest
from afterglow.search.filters import depth

NOT_JSON = (
    "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP library "
    "correctly. The OpenAI API expects a JSON payload, but what was sent was not valid JSON. If you have trouble "
    "figuring out how to fix this, please contact us through our help center at help.openai.com.)"
)
# Columns and model servers hold 64-bit integers; JSON sets no limit.
LARGEST_INTEGER = 2**63 - 1
# Nothing between here and the model server may run out of stack on what was accepted here.
MAX_DEPTH = 100
MAX_FILTER_DEPTH = 10
MAX_SHOWN_CHARS = 256
UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")
# A pattern that also counts characters, like that of function names: the API words length and characters apart.
COUNTING_PATTERN = re.compile(r"(?P<body>.+)\{(?P<low>\d+),(?P<high>\d+)\}\$(\(\?!\\n\))?")

# What the API does not know goes unnamed in its words.
OUR_TAGS = {"mcp"}
# Which types take a plain value.
TAKES: dict[type, tuple[type[inspect.Type], ...]] = {
    str: (inspect.StrType, inspect.LiteralType),
    bool: (inspect.BoolType,),
    float: (inspect.FloatType,),  # before int, so that a float is named by its own kind
    int: (inspect.IntType, inspect.FloatType),
    list: (inspect.ListType,),
    dict: (inspect.StructType, inspect.DictType),
    type(None): (inspect.NoneType,),
}
NAMES: dict[type, str] = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a decimal number",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


# --- wording ---------------------------------------------------------------------------------------------------


def not_json() -> InvalidRequest:
    """The body is no JSON, or nested beyond reading."""
    return InvalidRequest(NOT_JSON)


def wrong_type(path: str, expected: str, got: Any) -> InvalidRequest:
    """expected: as in `an integer`; got: the plain value. The path of the body itself is empty."""
    place = f" for '{path}'" if path else ""
    message = f"Invalid type{place}: expected {expected}, but got {NAMES[type(got)]} instead."
    return InvalidRequest(message, param=path or None, code="invalid_type")


def invalid(path: str, flaw: str, code: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid '{path}': {flaw}", param=path, code=code)


def unsupported_value(path: str, got: str, supported: Sequence[str]) -> InvalidRequest:
    message = f"Invalid value: '{shown(got)}'. Supported values are: {listed(quoted(supported), 'and')}."
    return InvalidRequest(message, param=path, code="invalid_value")


def too_many_properties(path: str, high: int, size: int) -> InvalidRequest:
    got = f"an object with {size} properties"
    flaw = f"too many properties. Expected an object with at most {high} properties, but got {got} instead."
    return invalid(path, flaw, "object_above_max_properties")


def nested_too_deeply(path: str, levels: int) -> InvalidRequest:
    return invalid(path, f"nested too deeply. Expected at most {levels} levels.", "invalid_value")


def mutually_exclusive(path: str, *names: str) -> InvalidRequest:
    """path: of what holds them, empty for the body itself."""
    both = quoted([inside(path, name) for name in names])
    message = (
        f"Mutually exclusive parameters: {listed(both, 'and')}. "
        f"Ensure you are only providing one of: {listed(both, 'or')}."
    )
    return InvalidRequest(message, param=path or names[0], code="mutually_exclusive_parameters")


def unknown(path: str) -> InvalidRequest:
    return InvalidRequest(f"Unknown parameter: '{path}'.", param=path, code="unknown_parameter")


def missing(path: str) -> InvalidRequest:
    return InvalidRequest(f"Missing required parameter: '{path}'.", param=path, code="missing_required_parameter")


def listed(words: Sequence[str], last: Literal["and", "or"]) -> str:
    """`a`, `a and b`, `a, b, and c`."""
    if len(words) < 3:
        return f" {last} ".join(words)
    return f"{', '.join(words[:-1])}, {last} {words[-1]}"


def quoted(values: Iterable[str]) -> list[str]:
    return [f"'{value}'" for value in values]


def shown(text: str) -> str:
    """A caller's text as an error may repeat it: of bounded length, and nothing in it that cannot be sent."""
    clean = UNSTORABLE.sub("\ufffd", text[: MAX_SHOWN_CHARS + 1])
    return clean if len(clean) <= MAX_SHOWN_CHARS else clean[:MAX_SHOWN_CHARS] + "..."


def inside(path: str, key: str | int) -> str:
    """The path of a key of an object, or of an index of an array."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{shown(key)}" if path else shown(key)


# --- the walk --------------------------------------------------------------------------------------------------


def check_shape(kind: type[Struct], plain: Any) -> None:
    """Raise InvalidRequest for the first thing in `plain` (as read by json) that is no `kind`.

    Keys beginning `x-` on tools pass; `gather_vendor_keys` puts them where the type has them.
    """
    if isinstance(plain, dict) and "filters" in kind.__struct_fields__:
        _check_nesting(plain.get("filters"))  # the one shape that holds itself, so that the walk would have no end
    _check(_shape(kind), plain, "")


def _check_nesting(filters: Any) -> None:
    level = [filters]
    for _ in range(MAX_FILTER_DEPTH):
        inner = [node.get("filters") for node in level if isinstance(node, dict)]
        level = [node for nodes in inner if isinstance(nodes, list) for node in nodes]
    if level:
        raise nested_too_deeply("filters", MAX_FILTER_DEPTH)


@cache
def _shape(kind: type[Struct]) -> inspect.Type:
    return inspect.type_info(kind)


def _check(shape: inspect.Type, value: Any, path: str) -> None:
    options = shape.types if isinstance(shape, inspect.UnionType) else (shape,)
    fitting = [option for option in options if isinstance(option, (*TAKES[type(value)], inspect.AnyType))]
    if not fitting:
        raise wrong_type(path, _expected(options), value)
    match fitting[0]:
        case inspect.StrType() as text:
            _check_string(text, value, path)
        case inspect.LiteralType(values=values):
            _check_choice(as_declared(values), value, path)
        case inspect.IntType() | inspect.FloatType() as number:
            _check_number(number, value, path)
        case inspect.ListType() as array:
            _check_array(array, value, path)
        case inspect.DictType(value_type=inspect.AnyType()) | inspect.AnyType():
            _check_free_form(value, path)
        case inspect.DictType() as mapping:
            _check_mapping(mapping, value, path)
        case inspect.StructType():
            structs = [option for option in fitting if isinstance(option, inspect.StructType)]
            _check_struct(_by_tag(structs, value, path), value, path)


def _check_string(shape: inspect.StrType, value: str, path: str) -> None:
    check_text(value, path)
    _check_string_length(value, shape.min_length or 0, shape.max_length, path)
    if shape.pattern is not None and not re.search(shape.pattern, value):
        _refuse_characters(shape.pattern, value, path)


def _refuse_characters(pattern: str, value: str, path: str) -> NoReturn:
    if counting := COUNTING_PATTERN.fullmatch(pattern):
        _check_string_length(value, int(counting["low"]), int(counting["high"]), path)
        pattern = counting["body"] + "+$"
    flaw = f"string does not match pattern. Expected a string that matches the pattern '{pattern}'."
    raise invalid(path, flaw, "invalid_value")


def _check_string_length(value: str, low: int, high: int | None, path: str) -> None:
    got = f"a string with length {len(value)}" if value else "an empty string"
    if high is not None and len(value) > high:
        flaw = f"string too long. Expected a string with maximum length {high}, but got {got} instead."
        raise invalid(path, flaw, "string_above_max_length")
    if len(value) < low:
        flaw = f"string too short. Expected a string with minimum length {low}, but got {got} instead."
        raise invalid(path, flaw, "string_below_min_length")


def _check_choice(supported: Sequence[str], value: str, path: str) -> None:
    check_text(value, path)
    if value not in supported:
        raise unsupported_value(path, value, supported)


def _check_number(shape: inspect.IntType | inspect.FloatType, value: float, path: str) -> None:
    if isinstance(shape, inspect.IntType):
        check_range(value, shape.ge, shape.le, path)
    else:
        check_range(value, shape.ge, shape.le, path, "decimal")
        _check_finite(value, path)


def _check_finite(value: float, path: str) -> None:
    check_range(value, -sys.float_info.max, sys.float_info.max, path, "decimal")


def check_range(
    value: float, low: float | None, high: float | None, path: str, noun: Literal["integer", "decimal"] = "integer"
) -> None:
    """Both ends are allowed values; None means no limit."""
    if high is not None and value > high:
        flaw = f"{noun} above maximum value. Expected a value <= {high}, but got {_number(value)} instead."
        raise invalid(path, flaw, f"{noun}_above_max_value")
    if low is not None and value < low:
        flaw = f"{noun} below minimum value. Expected a value >= {low}, but got {_number(value)} instead."
        raise invalid(path, flaw, f"{noun}_below_min_value")


def _number(value: float) -> str:
    return shown(json.dumps(value))


def _check_array(shape: inspect.ListType, value: list[Any], path: str) -> None:
    high, low, length = shape.max_length, shape.min_length, len(value)
    if high is not None and length > high:
        got = f"an array with length {length}"
        flaw = f"array too long. Expected an array with maximum length {high}, but got {got} instead."
        raise invalid(path, flaw, "array_above_max_length")
    if low and not value:
        flaw = f"empty array. Expected an array with minimum length {low}, but got an empty array instead."
        raise invalid(path, flaw, "empty_array")
    for index, item in enumerate(value):
        _check(shape.item_type, item, inside(path, index))


def _check_mapping(shape: inspect.DictType, value: dict[str, Any], path: str) -> None:
    high, size = shape.max_length, len(value)
    if high is not None and size > high:
        raise too_many_properties(path, high, size)
    for key, item in value.items():
        _check_key(shape.key_type, key, path)
        _check(shape.value_type, item, inside(path, key))


def _check_key(shape: inspect.Type, key: str, path: str) -> None:
    _check_key_text(key, path)
    match shape:
        case inspect.LiteralType(values=values) if key not in values:
            raise unknown(inside(path, key))
        case inspect.StrType(max_length=int(high)) if len(key) > high:
            message = (
                f"Invalid property name in '{path}': '{key[:3]}...{key[-3:]}' is too long. Expected a string with "
                f"maximum length {high}, but got a string with length {len(key)} instead."
            )
            raise InvalidRequest(message, param=inside(path, key), code="property_name_above_max_length")


def _by_tag(structs: Sequence[inspect.StructType], value: dict[str, Any], path: str) -> inspect.StructType:
    field = structs[0].tag_field
    if field is None:
        return structs[0]
    place = inside(path, field)
    if field not in value:
        raise missing(place)
    tags = {str(struct.tag): struct for struct in structs}
    tag = value[field]
    if isinstance(tag, str) and tag in tags:
        return tags[tag]
    known = [name for name in tags if name not in OUR_TAGS]
    if not isinstance(tag, str):
        raise wrong_type(place, _choice(known), tag)
    check_text(tag, place)
    raise unsupported_value(place, tag, known)


def _check_struct(shape: inspect.StructType, value: dict[str, Any], path: str) -> None:
    fields = {field.encode_name: field for field in shape.fields}
    keeps_vendor_keys = fields.pop(objects.VENDOR_KEYS, None) is not None
    for key, item in value.items():
        _check_key_text(key, path)
        place = inside(path, key)
        if key in fields:
            _check(fields[key].type, item, place)
        elif keeps_vendor_keys and key.startswith("x-"):
            _check_free_form(item, place)
        elif key != shape.tag_field:
            raise unknown(place)
    for key, field in fields.items():
        if field.required and key not in value:
            raise missing(inside(path, key))


def _check_free_form(value: Any, path: str) -> None:
    """What the type leaves open: a JSON schema, keys beginning `x-`."""
    _check_depth(value, path)
    _check_open(value, path)


def _check_depth(value: Any, path: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [item for node in level if isinstance(node, list | dict) for item in _items(node)]
        if not level:
            return
    raise nested_too_deeply(path, MAX_DEPTH)


def _items(node: list[Any] | dict[str, Any]) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node


def _check_open(value: Any, path: str) -> None:
    if isinstance(value, str):
        check_text(value, path)
    elif isinstance(value, float):
        _check_finite(value, path)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_open(item, inside(path, index))
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_key_text(key, path)
            _check_open(item, inside(path, key))


def check_text(value: str, path: str) -> None:
    """Refuse what databases and encoders cannot hold: NUL and lone surrogates."""
    if found := UNSTORABLE.search(value):
        raise invalid(path, f"string contains {_flaw(found)}.", "invalid_value")


def _check_key_text(key: str, path: str) -> None:
    if found := UNSTORABLE.search(key):
        place = f" in '{path}'" if path else ""
        message = f"Invalid property name{place}: string contains {_flaw(found)}."
        raise InvalidRequest(message, param=inside(path, key), code="invalid_value")


def _flaw(found: re.Match[str]) -> str:
    return "a NUL character" if found[0] == "\x00" else "a lone surrogate"


def _expected(options: Iterable[inspect.Type]) -> str:
    """How the API names what it would have taken; that null is allowed too, it leaves out."""
    names: dict[str, None] = {}
    options = [option for option in options if not isinstance(option, inspect.NoneType)]
    for option in options:
        names[_name(option, alone=len(options) == 1)] = None
    first, *others = names
    if not others:
        return first
    return "one of " + listed([first, *(name.removeprefix("an ").removeprefix("a ") for name in others)], "or")


def _name(shape: inspect.Type, alone: bool) -> str:
    if isinstance(shape, inspect.LiteralType):
        return _choice(as_declared(shape.values))
    if isinstance(shape, inspect.ListType) and not alone:
        return f"an array of {_name(shape.item_type, alone=True).split()[-1]}s"
    json_type = next((kind for kind, shapes in TAKES.items() if isinstance(shape, shapes)), dict)
    return NAMES[json_type]


def _choice(values: Sequence[str]) -> str:
    names = quoted(values)
    return names[0] if len(names) == 1 else f"one of {listed(names, 'or')}"


def as_declared(values: Iterable[Any]) -> Sequence[str]:
    """msgspec sorts the values of a Literal; the API lists them as the reference does, and so does objects.py."""
    found = frozenset(values)
    return _literals().get(found) or sorted(found)


@cache
def _literals() -> dict[frozenset[Any], tuple[Any, ...]]:
    structs = [kind for kind in vars(objects).values() if isinstance(kind, type) and issubclass(kind, Struct)]
    waiting = [hint for struct in structs for hint in get_type_hints(struct, include_extras=True).values()]
    found = {}
    while waiting:
        hint = waiting.pop()
        if get_origin(hint) is Literal:
            found[frozenset(get_args(hint))] = get_args(hint)
        else:
            waiting.extend(get_args(hint))
    return found


# --- keys of other vendors -------------------------------------------------------------------------------------


def gather_vendor_keys(plain: Any) -> None:
    """Move the keys beginning `x-` of each tool to where the type keeps them. `plain` has passed `check_shape`."""
    for tool in plain.get("tools") or ():
        vendor = {key: tool.pop(key) for key in list(tool) if key.startswith("x-")}
        if vendor:
            tool[objects.VENDOR_KEYS] = vendor


def holds_vendor_keys(body: Struct) -> bool:
    """Whether a tool has them. Straight from msgspec that means that the caller wrote our own name for them."""
    return any(tool.vendor is not UNSET for tool in getattr(body, "tools", None) or ())


# --- rules that types cannot say -------------------------------------------------------------------------------


def check_rules(body: Struct) -> None:
    """Raise InvalidRequest for the first rule that a well-shaped body breaks."""
    match body:
        case objects.CreateMessage():
            check_message(body, "")
        case objects.CreateThread():
            _check_thread(body, "")
        case objects.CreateAssistant():
            _check_open_parts(body.tools, body.response_format)
            _check_resources(body.tool_resources, "tool_resources")
        case objects.ModifyAssistant():
            _check_open_parts(body.tools, body.response_format)
        case objects.CreateRun():
            _check_run(body)
            _check_messages(body.additional_messages, "additional_messages")
        case objects.CreateThreadAndRun():
            _check_run(body)
            if body.thread is not None:
                _check_thread(body.thread, "thread")
        case objects.CreateVectorStore() | objects.CreateVectorStoreFile():
            _check_chunking(body, "")
        case objects.CreateFileBatch():
            _check_batch(body)
        case objects.SearchVectorStore(filters=filters) if filters:
            if depth(filters) > MAX_FILTER_DEPTH:
                raise nested_too_deeply("filters", MAX_FILTER_DEPTH)


IMAGE_SCHEMES = ("https://", "http://", "data:image/")


def check_message(body: objects.CreateMessage, path: str) -> None:
    """Refuse a message that says nothing: no image, and no text but white space. path: of the message itself.

    Wording and null code as recorded from the public API, for `content: ""`.
    """
    content = body.content
    blank = not content.strip() if isinstance(content, str) else all(map(_is_blank, content))
    if blank:
        raise InvalidRequest("Message content must be non-empty.", param=inside(path, "content"))
    for index, part in enumerate(content if isinstance(content, list) else ()):
        if isinstance(part, objects.ImageUrlInput) and not part.image_url.url.lower().startswith(IMAGE_SCHEMES):
            where = inside(inside(inside(inside(path, "content"), index), "image_url"), "url")
            text = f"Invalid '{where}'. Expected a URL that begins with 'https://', 'http://' or 'data:'."
            raise InvalidRequest(text, param=where, code="invalid_value")


def _is_blank(part: objects.ContentInput) -> bool:
    return isinstance(part, objects.TextInput) and not part.text.strip()


def _check_messages(messages: list[objects.CreateMessage] | None, path: str) -> None:
    for index, message in enumerate(messages or ()):
        check_message(message, inside(path, index))


def _check_thread(body: objects.CreateThread, path: str) -> None:
    _check_messages(body.messages, inside(path, "messages"))
    _check_resources(body.tool_resources, inside(path, "tool_resources"))


def _check_run(body: objects.CreateRun | objects.CreateThreadAndRun) -> None:
    _check_storable(body.max_prompt_tokens, "max_prompt_tokens")
    _check_storable(body.max_completion_tokens, "max_completion_tokens")
    if body.truncation_strategy is not None:
        _check_storable(body.truncation_strategy.last_messages, "truncation_strategy.last_messages")
    _check_open_parts(body.tools, body.response_format)


def _check_storable(value: int | None, path: str) -> None:
    if value is not None:
        check_range(value, None, LARGEST_INTEGER, path)


def _check_open_parts(
    tools: list[objects.Tool] | UnsetType | None, response_format: objects.ResponseFormat | UnsetType | None
) -> None:
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        if isinstance(tool, objects.FunctionTool):
            _check_depth(tool.function.parameters, f"tools[{index}].function.parameters")
        if isinstance(tool, objects.McpTool) and tool.server_url:
            check_url(tool.server_url, f"tools[{index}].server_url")
        if tool.vendor is not UNSET and objects.EXTENSION in tool.vendor:
            _check_calling(tool, f"tools[{index}].{objects.EXTENSION}")
    if isinstance(response_format, objects.JsonSchemaResponseFormat):
        _check_depth(response_format.json_schema.schema, "response_format.json_schema.schema")


def _check_calling(tool: objects.Tool, path: str) -> None:
    if not isinstance(tool, objects.FunctionTool):
        raise unknown(path)
    assert tool.vendor is not UNSET
    told = tool.vendor[objects.EXTENSION]
    _check(_shape(objects.FunctionCalling), told, path)
    if told.get("url") is None and told.get("retries") is not None:
        raise missing(f"{path}.url")
    if told.get("url") is not None:
        check_url(told["url"], f"{path}.url")


def check_url(url: str, path: str) -> None:
    """Refuse what is no http(s) URL; whether its address may be asked shows when it is."""
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        fine = False
    if not fine or parts.username is not None or any(char.isspace() for char in url):
        text = f"Invalid '{path}'. Expected a URL that begins with 'https://' or 'http://', without user and password."
        raise InvalidRequest(text, param=path, code="invalid_value")


def _check_resources(resources: objects.CreateToolResources | None, path: str) -> None:
    search = resources and resources.file_search
    if not isinstance(search, objects.CreateFileSearchResources) or search.vector_stores is UNSET:
        return
    place = inside(path, "file_search")
    if search.vector_store_ids is not UNSET:
        raise mutually_exclusive(place, "vector_store_ids", "vector_stores")
    for index, store in enumerate(search.vector_stores):
        _check_chunking(store, inside(f"{place}.vector_stores", index))


def _check_batch(body: objects.CreateFileBatch) -> None:
    if body.file_ids is UNSET and body.files is UNSET:
        raise missing("file_ids")
    if body.file_ids is not UNSET and body.files is not UNSET:
        raise mutually_exclusive("", "file_ids", "files")
    _check_chunking(body, "")
    for index, file in enumerate(body.files or ()):
        _check_chunking(file, inside("files", index))


def _check_chunking(
    body: objects.CreateVectorStore | objects.CreateVectorStoreFile | objects.CreateFileBatch | objects.NewVectorStore,
    path: str,
) -> None:
    if isinstance(body.chunking_strategy, objects.StaticChunking):
        sizes = body.chunking_strategy.static
        place = inside(path, "chunking_strategy") + ".static.chunk_overlap_tokens"
        check_range(sizes.chunk_overlap_tokens, None, sizes.max_chunk_size_tokens // 2, place)
