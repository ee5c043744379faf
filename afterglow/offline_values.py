"""What the offline model reads in a text: words, values in their places, and values for a JSON schema.

Pure rules for `offline.py`; no model, no messages. Values are drawn in two steps. `find_values` marks what a text
holds (numbers, names, dates, quoted words, …); `draw` walks the schema and lets every parameter take what suits its
type and its key (KINDS, CUES). A kind of value that is written rather than found is a row in KINDS and its writer in
WRITERS. Whatever the schema says, `draw` ends: depth, number and length of what it makes are limited.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from itertools import pairwise
from typing import Any, TypeGuard

from msgspec import UNSET

from afterglow.objects import Json

MAX_DEPTH = 8  # of nested schemas; what lies deeper is left empty
MAX_VALUES = 1_000  # drawn for one schema
MAX_ITEMS = 20  # drawn for an array that does not ask for more
DRAWN_CHARS = 8_000  # of a message that are searched for values
MAX_FOUND = 300  # values in one text, from its beginning
READ_CHARS = 100_000  # of a text that are read sentence by sentence


def parsed(text: str) -> Any:
    """A JSON text's value, or the text itself when it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def as_dict(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# --- words -----------------------------------------------------------------------------------------------------


def word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


STOP = word_set(
    "a about all also am an and any are as at be been but by can could d did do does doing for from had has have he "
    "hello her here hers hey hi him his how i if in into is it its json just let like ll m many may me might mine more "
    "much my no not now of on or our ours out over please re s shall she should so some such t than thank thanks that "
    "the their them then there these they this those to today tomorrow tonight too us ve very was we were what whats "
    "when where which who whom whose why will with would yesterday you your yours"
)
# Words that begin a request rather than name what it is about.
COMMON = word_set(
    "add answer ask book build calculate call check compare compute convert count create current data delete describe "
    "display document draft echo email evaluate execute explain extract fetch file find function generate get give go "
    "help info information know list look lookup make mention multiply need new note open order plan post print put "
    "query quote read record remember remind remove repeat reply report respond result retrieve return run save say "
    "schedule search see send set show start stop store submit subtract sum summarise summarize tell tool translate "
    "try up update upload use value want write"
)
ASIDE = STOP | COMMON | word_set("monday tuesday wednesday thursday friday saturday sunday")
# Words that stand for one another; the first of a row for all.
KIN = {
    other: row.split()[0]
    for row in (
        "weather temperature forecast climate",
        "price cost worth",
        "email mail",
        "probability likelihood chance odds",
        "limit top first max maximum count results most",
        "search find lookup look",
        "add plus sum",
        "subtract minus",
        "multiply times product",
        "summarise summarize summary",
        "age old",
    )
    for other in row.split()
}
NUMBERS = {
    word: number
    for number, word in enumerate(("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"), 2)
}
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
LEADING = re.compile(r"([^\W_]+)(?:['’]\w{1,2})?[\s,:]+(?=\S)")
SUFFIXES = ("ations", "ation", "ings", "ing", "ions", "ion", "ied", "ies", "ed", "es", "s", "e", "y")


def words_of(text: str) -> list[str]:
    """Lower-case words, identifiers taken apart; in scripts without spaces, pairs of characters."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text)
    words = []
    for word in re.findall(r"[^\W_]+", parted.lower()):
        dense = len(word) > 2 and "\u2e80" <= word[0] <= "\uffef"
        words += [word[i : i + 2] for i in range(len(word) - 1)] if dense else [word]
    return words


def stem_of(word: str) -> str:
    word = KIN.get(word, word)
    for suffix in SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            word = word[: -len(suffix)]
            break
    return word[:-1] if len(word) > 2 and word[-1] == word[-2] else word


def stems_of(text: str) -> list[str]:
    return [stem_of(word) for word in words_of(text) if word not in STOP]


COMMON_STEMS = frozenset(stem_of(word) for word in COMMON)


# A line that goes on in the next one: prose that was wrapped, not a list, a heading or a short line of its own.
WRAPPED = re.compile(r"(?<=[^.!?:。！？\s])[ \t]*\n[ \t]*(?=[a-z(])")


def sentences_of(text: str) -> list[str]:
    whole = WRAPPED.sub(" ", text[:READ_CHARS])
    parts = re.split(r"(?<=[.!?])(?<![ .][A-Z]\.)\s+|(?<=[。！？])|\n+", whole)
    return [part.strip() for part in parts if part.strip()]


def topic_of(text: str) -> str:
    """What a request is about: its text without the words that only ask."""
    text = text.strip(" \t\n.,;:!?\"'")
    start = 0
    while (match := LEADING.match(text, start)) and match[1].lower() in STOP | COMMON:
        start = match.end()
    return text[start:]


def clipped(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 1].rstrip() + "…"


def ends_of(text: str) -> str:
    """The beginning and the end of a long text, where requests stand."""
    return text if len(text) <= DRAWN_CHARS else f"{text[: DRAWN_CHARS - 2_000]}\n{text[-2_000:]}"


# --- finding values in a text ----------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Found:
    """A value and its place in a text. cue: the word before it; after: what it follows in a list, if anything.

    taker: the key of the parameter that took it last.
    """

    kind: str
    value: Any
    start: int
    end: int
    cue: str = ""
    after: Found | None = None
    taker: str = ""


MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sep(?:tember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?"
)
DAY = (
    r"(?:(?:next|this|last) )?(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day)|today|tonight|tomorrow|yesterday"
    r"|(?:next|this|last) (?:week|month|year)"
)
QUOTED = re.compile(
    r'"([^"\n]{1,2000})"|“([^“”\n]{1,2000})”|«([^«»\n]{1,2000})»|`([^`]{1,2000})`|(?<!\w)[\'‘]([^\'’\n]{1,2000})[\'’](?!\w)'
)
PATTERNS = (
    ("quoted", QUOTED),
    ("uri", re.compile(r"https?://[^\s<>\"')\]]{1,500}(?<![.,;!?])", re.I)),
    ("file", re.compile(r"(?<![\w@.])[\w/-]{1,200}\.[A-Za-z][A-Za-z0-9]{0,7}(?![\w@.]?\w)")),
    ("email", re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,5}")),
    ("code", re.compile(r"\b[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\b", re.I)),
    ("date", re.compile(r"\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d)?(?:Z|[+-]\d\d:?\d\d)?)?\b")),
    ("date", re.compile(rf"\b\d{{1,2}}(?:st|nd|rd|th)? {MONTH}(?:,? \d{{4}})?(?!\w)", re.I)),
    ("date", re.compile(rf"\b{MONTH} \d{{1,2}}(?:st|nd|rd|th)?(?:,? \d{{4}})?(?!\w)", re.I)),
    ("date", re.compile(rf"\b(?:{DAY})\b", re.I)),
    ("time", re.compile(r"\b\d{1,2}(?::\d\d)? ?[ap]m\b|\b\d{1,2}:\d\d(?::\d\d)?\b", re.I)),
    ("code", re.compile(r"\b[A-Za-z][A-Za-z_-]{0,20}\d[\w-]{0,40}\b")),
    ("number", re.compile(r"(?<![\w.])[-+]?\d{1,3}(?:,\d{3}){1,4}(?:\.\d{1,10})?(?!\d)")),
    ("number", re.compile(r"(?<![\w.])[-+]?\d{1,15}(?:\.\d{1,10})?(?!\d)")),
    ("number", re.compile(rf"\b(?:{'|'.join(NUMBERS)})\b", re.I)),
)
NAME_WORD = re.compile(r"[^\W\d_][\w&-]*(?:['’](?!(?:s|m|t|d|ll|re|ve)\b)\w+)?")
LINKS = word_set("of de la le van von der del di du da el al")
PHRASE = re.compile(r"\b(?:in|at|near|for|of|to|from|about|around|into)\s+((?:[^\W\d_][\w-]*[ ,]*){1,8})", re.I)
LIST_GAP = re.compile(r"\s*(?:,\s*)?(?:(?:and|or|plus|&)\s+)?")
ARTICLES = word_set("the a an my our")


def find_values(text: str) -> list[Found]:
    """All values in a text, by place. A stretch of text gives one value: the first pattern that fits has it."""
    found: list[Found] = []
    rest = text
    for kind, pattern in PATTERNS:
        for match in pattern.finditer(rest):
            value = next(filter(None, match.groups()), match[0]).strip()
            found.append(Found(kind, _number(value) if kind == "number" else value, match.start(), match.end()))
        rest = pattern.sub(blanked, rest)
    names = find_names(rest)
    for f in names:
        rest = rest[: f.start] + " " * (f.end - f.start) + rest[f.end :]
    return _linked(text, sorted([*found, *names, *_phrases(rest)], key=lambda f: f.start)[:MAX_FOUND])


def blanked(match: re.Match[str]) -> str:
    return "\x01" * len(match[0])


def _number(text: str) -> int | float:
    text = text.replace(",", "").lower()
    if text in NUMBERS:
        return NUMBERS[text]
    return float(text) if "." in text else int(text)


def find_names(text: str) -> list[Found]:
    """Runs of capitalised words: "San Francisco, CA", "Bank of England". Words that begin a request are no names."""
    found: list[Found] = []
    link = ""
    for match in NAME_WORD.finditer(text):
        word, last = match[0], found[-1] if found else None
        gap = text[last.end : match.start()] if last else ""
        state = len(word) == 2 and word.isupper() and gap == ", "
        if not state and (not word[0].isupper() or word.lower() in ASIDE):
            link = f" {word} " if gap == " " and word in LINKS else ""
        elif last and (gap == " " or state or gap == link):
            last.end, last.value = match.end(), text[last.start : match.end()]
        else:
            found.append(Found("name", word, match.start(), match.end()))
    return found


def _phrases(text: str) -> list[Found]:
    """Lower-case words after a preposition, for those who write "weather in oslo and bergen"."""
    return [f for match in PHRASE.finditer(text) for f in _phrase_items(match[1], match.start(1))]


def _phrase_items(text: str, offset: int) -> list[Found]:
    items: list[Found] = []
    fresh = True
    for match in re.finditer(r"[^\W\d_][\w-]*|,", text):
        word = match[0].lower()
        if word in {",", "and", "or"}:
            fresh = True
        elif word in ASIDE and not (fresh and word in ARTICLES):
            break
        elif fresh and word not in ARTICLES:
            items.append(Found("phrase", match[0], offset + match.start(), offset + match.end()))
            fresh = False
        elif not fresh:
            items[-1].end = offset + match.end()
            items[-1].value = text[items[-1].start - offset : match.end()]
    return items


def _linked(text: str, found: list[Found]) -> list[Found]:
    """The same values, with what stands in one list joined."""
    linked: list[Found] = []
    for run in _runs(text, found):
        run = _paired(text, run)
        before = re.findall(r"[^\W_]+", text[max(0, run[0].start - 30) : run[0].start].lower())
        for index, f in enumerate(run):
            f.cue = next((word for word in reversed(before) if word not in ARTICLES), "")
            f.after = run[index - 1] if index else None
        linked += run
    return linked


def _runs(text: str, found: list[Found]) -> list[list[Found]]:
    runs: list[list[Found]] = []
    for f in found:
        last = runs[-1][-1] if runs else None
        gap = text[last.end : f.start] if last else ""
        if last and last.kind == f.kind and gap and "\n\n" not in gap and LIST_GAP.fullmatch(gap):
            runs[-1].append(f)
        else:
            runs.append([f])
    return runs


def _paired(text: str, run: list[Found]) -> list[Found]:
    """With "Paris, France" as one name, and "Paris, France and Oslo, Norway" as two."""
    gaps = [text[left.end : right.start] for left, right in pairwise(run)]
    pairs = len(run) % 2 == 0 and all((gap == ", ") == (index % 2 == 0) for index, gap in enumerate(gaps))
    if run[0].kind != "name" or not pairs:
        return run
    return [
        Found("name", text[left.start : right.end], left.start, right.end)
        for left, right in zip(run[::2], run[1::2], strict=True)
    ]


# --- drawing values for a schema -------------------------------------------------------------------------------

# Which kinds of values suit a parameter, by the words of its key; the first row that shares a word counts.
KINDS: tuple[tuple[frozenset[str], tuple[str, ...]], ...] = (
    (word_set("email mail recipient cc bcc sender to"), ("email", "name", "quoted", "phrase")),
    (word_set("url uri link website page href"), ("uri",)),
    (word_set("path file filename"), ("file", "quoted")),
    (word_set("date day when deadline due birthday"), ("date", "time")),
    (word_set("time hour"), ("time", "date")),
    (word_set("expression formula equation calculation"), ("sum", "quoted", "topic")),
    (word_set("symbol ticker currency iata airport"), ("capitals", "name", "code")),
    (word_set("id number sku isbn phone zip reference code"), ("code", "number", "quoted")),
    (word_set("age amount quantity total year"), ("number",)),
    (word_set("answer response explanation summary conclusion reasoning"), ("answer", "topic")),
    (word_set("query question search term topic keyword prompt input"), ("quoted", "topic")),
    (word_set("body message text content note comment description title subject"), ("quoted", "said", "topic")),
    (word_set("item task product todo thing"), ("quoted", "said", "object")),
)
OTHER_KINDS = ("name", "quoted", "phrase", "code", "email")
# Which words stand before a parameter's value, by the words of its key; the first row that shares a word counts.
CUES: tuple[tuple[frozenset[str], frozenset[str]], ...] = (
    (word_set("from origin source departure sender"), word_set("from")),
    (word_set("to destination target arrival recipient language lang"), word_set("to into")),
    (
        word_set("city location place town country region area address venue state"),
        word_set("in at near for around of to from"),
    ),
    (word_set("name person customer user author contact employee"), word_set("for to by with named called is am of")),
)
# For each string format: the kind of value that has it, and what stands in when the text has none.
FORMATS = {
    "email": ("email", "someone@example.com"),
    "uri": ("uri", "https://example.com/"),
    "url": ("uri", "https://example.com/"),
    "date": ("date", "2000-01-01"),
    "date-time": ("date", "2000-01-01T00:00:00Z"),
    "time": ("time", "00:00:00Z"),
    "uuid": ("code", "00000000-0000-0000-0000-000000000000"),
}
EMPTY: Json = {"string": "", "number": 0, "integer": 0, "boolean": False, "array": [], "object": {}, "null": None}
# The patterns that are tried: no groups and few repeats, so that no caller's pattern can take long.
TAME_PATTERN = re.compile(
    r"\^?(?:(?:[\w #/@:-]|\\[dws./-]|\[(?:[A-Za-z0-9](?:-[A-Za-z0-9])?)+\])"
    r"(?:\{\d{1,2}(?:,\d{1,2})?\}|[+*?])?){1,12}\$?"
)
SAID = re.compile(
    r"\b(?:saying|says|to say|reading|titled|entitled|called|named|(?:me|him|her|them|us) (?:to|that))\s+(\S[^\n]*)"
    r"|:\s+(\S[^\n]*)",
    re.I,
)


@dataclass(slots=True, eq=False)
class Scope:
    """What one schema's values are drawn from: what was found in `text[start:end]` first, then the rest of it.

    root: the schema that `$ref` points into; known: what tool outputs told, by key; left: values still to be drawn.
    """

    text: str
    start: int
    end: int
    found: list[Found]
    root: Json
    known: Json = field(default_factory=dict)
    answer: str = ""
    taken: list[Found] = field(default_factory=list)
    left: int = MAX_VALUES

    @property
    def near(self) -> str:
        return self.text[self.start : self.end]

    def is_near(self, f: Found) -> bool:
        return self.start <= f.start < self.end

    def take(self, f: Found, key: str) -> Any:
        f.taker = key
        self.taken.append(f)
        return f.value

    def goes_on(self, f: Found, key: str) -> bool:
        """Whether the value follows, in a list, one that the same parameter took."""
        return f.after is not None and f.after in self.taken and f.after.taker == key

    def free(self, kind: str) -> list[Found]:
        """The values of a kind that nobody took, the near ones first."""
        if kind == "capitals":
            return [f for f in self.free("name") if f.value.isupper()]
        free = [f for f in self.found if f.kind == kind and f not in self.taken]
        return sorted(free, key=lambda f: not self.is_near(f))


def _said(scope: Scope) -> str:
    match = SAID.search(scope.near)
    return (match[1] or match[2]).strip() if match else ""


def _object(scope: Scope) -> str:
    return re.split(r"\s+(?:to|in|on|at|for|from|with|by|into|onto)\s", topic_of(scope.near))[0]


def _sought(scope: Scope) -> str:
    return topic_of(re.sub(r"^.{0,60}?\b(?:search|look|query)\b[^.\n]{0,40}?\bfor\s", "", scope.near, flags=re.I))


# Kinds that are not found in a place but written from the whole.
WRITERS: dict[str, Callable[[Scope], str]] = {
    "answer": lambda scope: scope.answer,
    "object": _object,
    "said": _said,
    "sum": lambda scope: find_sum(scope.near),
    "topic": _sought,
}


def draw(schema: Any, key: str, scope: Scope, needed: bool, depth: int = 0) -> Any:
    """A value for `schema`, or UNSET when the text has none and none is needed."""
    schema = _resolved(schema, scope.root)
    scope.left -= 1
    if "const" in schema:
        return schema["const"] if needed else UNSET
    if values := as_list(schema.get("enum")):
        return _draw_enum(values, schema, scope, needed)
    kind = _type(schema)
    if depth > MAX_DEPTH or scope.left < 0:
        return EMPTY[kind] if needed else UNSET
    if options := as_list(schema.get("anyOf")) or as_list(schema.get("oneOf")):
        return _draw_option(options, schema, key, scope, needed, depth)
    nullable = "null" in _types(schema) or schema.get("nullable") is True
    value = _draw_type(kind, schema, key, scope, needed and not nullable, depth)
    return None if value is UNSET and needed else value


def _draw_type(kind: str, schema: Json, key: str, scope: Scope, needed: bool, depth: int) -> Any:
    match kind:
        case "object":
            return _draw_object(schema, scope, needed, depth)
        case "array":
            return _draw_array(schema, key, scope, needed, depth)
        case "number" | "integer":
            return _draw_number(schema, key, scope, needed)
        case "boolean":
            return _draw_boolean(schema, key, scope, needed)
        case "null":
            return UNSET
        case _:
            return _draw_string(schema, key, scope, needed)


def _resolved(schema: Any, root: Json, depth: int = 0) -> Json:
    """The schema with local references followed and `allOf` folded in."""
    plain = as_dict(schema)
    if depth < MAX_DEPTH and isinstance(reference := plain.get("$ref"), str):
        target: Any = root
        for step in reference.lstrip("#").split("/")[1:]:
            target = as_dict(target).get(step.replace("~1", "/").replace("~0", "~"))
        rest = {name: value for name, value in plain.items() if name != "$ref"}
        return _resolved({**as_dict(target), **rest}, root, depth + 1)
    for part in as_list(plain.get("allOf"))[:MAX_ITEMS] if depth < MAX_DEPTH else ():
        part = _resolved(part, root, depth + MAX_DEPTH // 2)
        plain = {**part, **{name: value for name, value in plain.items() if name != "allOf"}, **_both(part, plain)}
    return plain


def _both(one: Json, other: Json) -> Json:
    properties = as_dict(one.get("properties")) | as_dict(other.get("properties"))
    required = as_list(one.get("required")) + as_list(other.get("required"))
    return {name: value for name, value in (("properties", properties), ("required", required)) if value}


def _types(schema: Json) -> list[Any]:
    kind = schema.get("type")
    return kind if isinstance(kind, list) else [kind]


def _type(schema: Json) -> str:
    for kind in sorted(_types(schema), key=lambda kind: kind == "null"):
        if isinstance(kind, str) and kind in EMPTY:
            return kind
    if as_dict(schema.get("properties")) or as_list(schema.get("required")):
        return "object"
    if "items" in schema:
        return "array"
    return "number" if "minimum" in schema or "maximum" in schema else "string"


def _draw_option(options: list[Any], schema: Json, key: str, scope: Scope, needed: bool, depth: int) -> Any:
    """The first alternative that the text has something for; else null, if allowed; else the first."""
    rest = {name: value for name, value in schema.items() if name not in {"anyOf", "oneOf"}}
    whole = [{**rest, **_resolved(option, scope.root)} for option in options]
    for option in whole:
        value = draw(option, key, scope, False, depth + 1)
        if value is not UNSET:
            return value
    if not needed:
        return UNSET
    return None if any(_types(option) == ["null"] for option in whole) else draw(whole[0], key, scope, True, depth + 1)


def _draw_enum(values: list[Any], schema: Json, scope: Scope, needed: bool) -> Any:
    """The value that the text mentions first; else, if one is needed, the default, null or the first."""
    taken = [f.start for f in scope.taken if f.kind == "enum"]
    mentioned = []
    near = scope.near.lower()
    for value in values:
        words = [word for word in re.split(r"[\s_-]+", str(value).lower()) if word]
        spelled = r"[\s_-]?".join(map(re.escape, words))
        # Most values are not there; looking first spares compiling a pattern for each.
        for match in re.finditer(rf"(?<!\w){spelled}(?!\w)", near) if words and words[0] in near else ():
            mentioned.append(Found("enum", value, scope.start + match.start(), scope.start + match.end()))
    mentioned = [f for f in mentioned if f.start not in taken]
    if mentioned:
        return scope.take(min(mentioned, key=lambda f: f.start), "")
    if not needed:
        return UNSET
    fallbacks = [value for value in (schema.get("default"), None) if value in values]
    return [*fallbacks, *values][0]


def _draw_object(schema: Json, scope: Scope, needed: bool, depth: int) -> Any:
    """Required keys draw first, so that optional ones take nothing from them."""
    properties = as_dict(schema.get("properties"))
    required = dict.fromkeys(name for name in as_list(schema.get("required")) if isinstance(name, str))
    drawn: Json = {}
    for name in [*required, *(name for name in properties if name not in required)]:
        drawn[name] = draw(properties.get(name), name, scope, needed and name in required, depth + 1)
    if not needed and all(value is UNSET for value in drawn.values()):
        return UNSET
    for name in required:
        if drawn[name] is UNSET:
            drawn[name] = draw(properties.get(name), name, scope, True, depth + 1)
    return {name: drawn[name] for name in properties | required if drawn[name] is not UNSET}


def _draw_array(schema: Json, key: str, scope: Scope, needed: bool, depth: int) -> Any:
    """As many items as the text has; one, if any is needed and nothing says how many."""
    low, high = int(_limit(schema, "minItems") or 0), _limit(schema, "maxItems")
    most = max(MAX_ITEMS, low) if high is None else int(high)
    least = min(max(low, depth < MAX_DEPTH // 2), most, 100)
    drawn: list[Any] = []
    while len(drawn) < most:
        taken, short = len(scope.taken), len(drawn) < least
        value = draw(schema.get("items"), key, scope, short and (needed or bool(drawn)), depth + 1)
        if value is UNSET or (not short and (len(scope.taken) == taken or value in drawn)):
            break
        drawn.append(value)
    return drawn if needed or drawn else UNSET


def _limit(schema: Json, name: str) -> int | float | None:
    value = schema.get(name)
    return value if _is_number(value) else None


def _is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is one to reckon with: no bool, and so small that nothing overflows."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 10**15


def _draw_boolean(schema: Json, key: str, scope: Scope, needed: bool) -> Any:
    stems, words = set(stems_of(key)), words_of(scope.near)
    for index, word in enumerate(words):
        if stem_of(word) in stems:
            return not word_set("no not without t never disable skip") & set(words[max(0, index - 3) : index])
    return schema.get("default") is True if needed else UNSET


def _draw_number(schema: Json, key: str, scope: Scope, needed: bool) -> Any:
    answered = [f.value for f in find_values(scope.answer) if f.kind == "number"] if "answer" in _kinds(key) else []
    free = scope.free("number")
    near = [f for f in free if scope.is_near(f)]
    chosen = [f for f in near if _is_keyed(f, key, scope)] or [f for f in free if scope.goes_on(f, key)]
    if not answered and (chosen or (needed and near)):
        return _within(schema, scope.take((chosen or near)[0], key))
    if not needed:
        return UNSET
    told = [*answered[-1:], _recalled(key, scope), schema.get("default"), *(f.value for f in free), 1]
    return _within(schema, next(value for value in told if _is_number(value)))


def _within(schema: Json, value: Any) -> Any:
    """The number, moved as little as possible to keep the schema's limits."""
    low, high = _limit(schema, "minimum"), _limit(schema, "maximum")
    above, below = _limit(schema, "exclusiveMinimum"), _limit(schema, "exclusiveMaximum")
    if _type(schema) == "integer":
        lows = [math.ceil(low)] if low is not None else []
        lows += [math.floor(above) + 1] if above is not None else []
        highs = [math.floor(high)] if high is not None else []
        highs += [math.ceil(below) - 1] if below is not None else []
        return _multiple(schema, min(max([round(value), *lows]), *highs, math.inf), highs)
    if above is not None and value <= above:
        value = _between(above, below if high is None else high)
    if below is not None and value >= below:
        value = _between(below, above if low is None else low)
    value = value if low is None else max(value, low)
    return _multiple(schema, value if high is None else min(value, high), [] if high is None else [high])


def _between(limit: float, other: float | None) -> float:
    """A number beyond `limit` on the side of `other`: one further, or half-way when that is too far."""
    if other is None or abs(other - limit) > 1:
        return limit + (1 if other is None or other > limit else -1)
    return (limit + other) / 2


def _multiple(schema: Json, value: Any, highs: list[Any]) -> Any:
    step = _limit(schema, "multipleOf")
    if not step or step < 1e-9:
        return value
    step = int(step) if step == int(step) else step
    up = math.ceil(value / step) * step
    return up if not highs or up <= min(highs) else math.floor(value / step) * step


def _draw_string(schema: Json, key: str, scope: Scope, needed: bool) -> Any:
    form = schema.get("format")
    if isinstance(form, str) and form in FORMATS:
        return _draw_format(form, schema, key, scope, needed)
    value = _stated(key, scope, needed)
    if not value and not needed:
        return UNSET
    return _fitted(schema, value or _stand_in(schema, key, scope), scope)


def _stated(key: str, scope: Scope, needed: bool) -> str:
    """What the near text says for a key, "" for nothing. Where it is not needed only what is clearly meant counts."""
    if label := _labelled(key, scope):
        return label
    kinds = _kinds(key)
    fits = [(_cue_fit(f, key, scope), kind, f) for kind in kinds for f in scope.free(kind) if scope.is_near(f)]
    distinct = word_set("email uri date time code capitals") if kinds is not OTHER_KINDS else frozenset()
    if not needed:
        fits = [(fit, kind, f) for fit, kind, f in fits if fit >= 2 or kind in distinct]
    if fits:
        return _taken(max(fits, key=lambda each: each[0])[2], key, scope)
    usable = kinds if needed else [kind for kind in kinds if kind in {"said", "sum"}]
    return next(filter(None, (WRITERS[kind](scope) for kind in usable if kind in WRITERS)), "")


def _taken(f: Found, key: str, scope: Scope) -> str:
    scope.take(f, key)
    return f.value if isinstance(f.value, str) else scope.text[f.start : f.end]


def _stand_in(schema: Json, key: str, scope: Scope) -> str:
    """A value for a key that must have one though the near text says nothing."""
    for told in (_recalled(key, scope), schema.get("default")):
        if isinstance(told, str | int | float):
            return str(told)
    for kind in _kinds(key):
        if kind != "phrase" and (free := scope.free(kind)):
            return _taken(free[0], key, scope)
    examples = [example for example in as_list(schema.get("examples")) if isinstance(example, str)]
    return next(filter(None, [*examples, topic_of(scope.near), " ".join(words_of(key))]), "text")


def _key_words(key: str) -> set[str]:
    words = words_of(key)
    return {
        *words,
        *(word[:-1] for word in words if word.endswith("s")),
        *(re.sub("ies$", "y", word) for word in words),
    }


def _kinds(key: str) -> tuple[str, ...]:
    words = _key_words(key)
    return next((kinds for row, kinds in KINDS if row & words), OTHER_KINDS)


def _cue_fit(f: Found, key: str, scope: Scope) -> int:
    """3: the text names the key beside the value, or goes on listing; 2: the word before it suits; -1: it does not."""
    if _is_keyed(f, key, scope) or scope.goes_on(f, key):
        return 3
    words, ways = _key_words(key), word_set("from to into")
    cues = next((cues for row, cues in CUES if row & words), frozenset())
    if f.cue in cues:
        return 2
    return -1 if cues and cues <= ways and f.cue in ways else 0


def _is_keyed(f: Found, key: str, scope: Scope) -> bool:
    before = re.split(r"[.;,!?\n]\s", scope.text[max(0, f.start - 40) : f.start])[-1]
    after = re.split(r"[.;,!?\n]", scope.text[f.end : f.end + 20])[0] if f.kind == "number" else ""
    return not {*stems_of(before)[-2:], *stems_of(after)[:2]}.isdisjoint(stems_of(key))


def _labelled(key: str, scope: Scope) -> str:
    """The value of "title: The Art of War" for the key `title`."""
    spelled = r"[\s_-]?".join(map(re.escape, words_of(key)))
    match = re.search(rf"(?<!\w){spelled}\s{{0,3}}[:=]\s{{0,3}}([^\s\"'“][^,;\n]{{0,500}})", scope.near, re.I)
    if not spelled or not match:
        return ""
    value = re.split(r"[.!?](?:\s|$)|\s+and\s", match[1])[0].strip()
    start = scope.start + match.start(1)
    for f in scope.found:
        if start <= f.start < start + len(value):
            scope.take(f, key)
    return value


def _recalled(key: str, scope: Scope) -> Any:
    """What a tool's output told under this key: `id` will do for `user_id`."""
    spelled = "_".join(words_of(key))
    told = (value for name, value in scope.known.items() if f"_{spelled}".endswith("_" + "_".join(words_of(name))))
    return next(told, None)


def _draw_format(form: str, schema: Json, key: str, scope: Scope, needed: bool) -> Any:
    kind, stand_in = FORMATS[form]
    for f in scope.free(kind):
        if (value := _formed(form, f.value)) and (needed or scope.is_near(f)):
            scope.take(f, key)
            return value
    default = schema.get("default")
    return (default if isinstance(default, str) else stand_in) if needed else UNSET


def _formed(form: str, text: str) -> str:
    """The text in a string format, or "" when it cannot be."""
    match form:
        case "date":
            return _iso_date(text)
        case "date-time" if re.search(r"T.{8}(Z|[+-]\d\d:\d\d)$", text):
            return text
        case "date-time":
            day = _iso_date(text)
            return day and f"{day}T00:00:00Z"
        case "time":
            return _iso_time(text)
        case "uuid":
            return text if len(text) == 36 and text.count("-") == 4 else ""
        case _:
            return text


def _iso_date(text: str) -> str:
    """Only dates that are whole: which day tomorrow is, this model cannot know."""
    months = [MONTHS.index(word[:3]) + 1 for word in re.findall(r"[a-z]{3,}", text.lower()) if word[:3] in MONTHS]
    numbers = sorted(int(number) for number in re.findall(r"\d+", text))
    try:
        if months and len(numbers) == 2:
            return date(numbers[1], months[0], numbers[0]).isoformat()
        return date.fromisoformat(text[:10]).isoformat()
    except ValueError:
        return ""


def _iso_time(text: str) -> str:
    hour, minute, second = ([int(number) for number in re.findall(r"\d+", text)] + [0, 0])[:3]
    if text.lower().endswith("m"):
        hour = hour % 12 + 12 * text.lower().endswith("pm")
    return f"{hour:02}:{minute:02}:{second:02}Z" if hour < 24 and minute < 60 and second < 60 else ""


def _fitted(schema: Json, value: str, scope: Scope) -> str:
    """The value, changed to suit the schema's pattern and lengths where that is possible."""
    pattern = schema.get("pattern")
    if isinstance(pattern, str) and TAME_PATTERN.fullmatch(pattern) and len(re.findall("[*+]", pattern)) <= 3:
        words = re.findall(r"[\w@./#-]{1,64}(?<![.])", scope.near)
        value = next((word for word in [value, *words] if _matches(pattern, word)), value)
    low, high = _limit(schema, "minLength"), _limit(schema, "maxLength")
    value = value if high is None else value[: max(0, int(high))]
    return value.ljust(min(int(low or 0), DRAWN_CHARS), "_")


def _matches(pattern: str, word: str) -> bool:
    try:
        return re.search(pattern, word) is not None
    except re.error:
        return False


# --- sums ------------------------------------------------------------------------------------------------------

SPOKEN = (
    (re.compile(r"(\d)\s*(?:%|percent) of\b", re.I), r"\1 / 100 *"),
    (re.compile(r"\bplus\b", re.I), "+"),
    (re.compile(r"\bminus\b", re.I), "-"),
    (re.compile(r"\b(?:times|multiplied by)\b|[×·]|(?<=\d)\s?x\s?(?=\d)", re.I), "*"),
    (re.compile(r"\b(?:divided by|over)\b|÷", re.I), "/"),
    (re.compile(r"\bto the power of\b|\^", re.I), "**"),
    (re.compile(r"\bsquared\b", re.I), "** 2"),
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))"), ""),
)
SUM = re.compile(r"(?<![\w.])[(\d.-][\d\s.()+*/%-]{0,200}[\d)](?![\w])")
OPERATORS: dict[type[ast.AST], Callable[..., int | float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def find_sum(text: str) -> str:
    """The first sum in a text, as `12 * 7 + 3`, or ""."""
    for pattern, sign in SPOKEN:
        text = pattern.sub(sign, text)
    sums = (match[0].strip() for match in SUM.finditer(text))
    return next((found for found in sums if re.search(r"[\d)]\s*[-+*/%]", found)), "")


def asked_sum(text: str) -> str:
    """The first sum in a text that is asked for, or that is all there is; "" when there is none."""
    for sentence in sentences_of(text):
        found = find_sum(topic_of(sentence).rstrip("= "))
        asked = re.search(r"\b(?:what|calculate|compute|how much|evaluate|solve)\b", sentence, re.I)
        if found and (asked or not re.search(r"[^\W\d]", sentence)) and work_out(found):
            return found
    return ""


def _value(node: ast.AST) -> int | float:
    """What a parsed sum comes to. Raises ValueError for anything but numbers and their operators."""
    match node:
        case ast.Expression(body):
            return _value(body)
        case ast.Constant(int() | float() as number):
            return number
        case ast.UnaryOp(sign, operand) if type(sign) in OPERATORS:
            return OPERATORS[type(sign)](_value(operand))
        case ast.BinOp(left, ast.Pow(), right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left, sign, right) if type(sign) in OPERATORS:
            return OPERATORS[type(sign)](_value(left), _value(right))
    raise ValueError("no sum")


def _power(base: int | float, exponent: int | float) -> int | float:
    if abs(base) > 10**6 or abs(exponent) > 64:
        raise ValueError("too large")
    power = base**exponent
    if isinstance(power, complex):
        raise ValueError("no real number")
    return power


def work_out(found: str) -> str:
    """What a sum comes to, or "" when it is none."""
    try:
        value = _value(ast.parse(found, mode="eval"))
    except ZeroDivisionError:
        return "undefined"
    except (SyntaxError, ValueError, OverflowError, RecursionError):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.10g}"
