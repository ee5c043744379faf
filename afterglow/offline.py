"""The offline model: fixed rules, no language model, that answer like a chat-completions model.

It sees what a real model would see, a ChatRequest, and nothing else: no clock, no files, no state. The same request
gets the same answer, call ids included. How a request becomes deltas:

    messages ── _read ──> Talk ── _calls ──> a search of the files, and function calls, while some function fits and
                               │             was not called yet, then the next cell of Python, while there is one
                               └─ _answer ─> text: ANSWERS in order, the first rule that knows something

What a text holds and how it fills a JSON schema is in `offline_values.py`, what Python is run for in `offline_code.py`,
what is searched for in files in `offline_search.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from afterglow.contracts import ChatRequest, Delta, ModelEnd, ModelInfo, TextDelta, ToolCallDelta
from afterglow.objects import Json, Usage
from afterglow.offline_code import DESCRIBED as RUNS_PYTHON
from afterglow.offline_code import RESTARTED, Listing, Work, find_files, find_work
from afterglow.offline_search import DESCRIBED as SEARCHES_FILES
from afterglow.offline_search import OF_DOCUMENTS, cited, queries_for, rarity, statements_of
from afterglow.offline_tables import find_figures
from afterglow.offline_values import (
    COMMON_STEMS,
    DAY,
    MONTH,
    NUMBERS,
    QUOTED,
    STOP,
    Found,
    Scope,
    as_dict,
    as_list,
    asked_sum,
    blanked,
    clipped,
    draw,
    ends_of,
    find_names,
    find_values,
    parsed,
    sentences_of,
    stem_of,
    stems_of,
    topic_of,
    word_set,
    words_of,
    work_out,
)

MAX_ROUNDS = 8  # of function calls after one user message
MAX_CALLS = 16  # planned for one user message
LONG_CHARS = 1_000  # a longer message comes with a text, which is not what it asks for
IMAGE_TOKENS = 85
HEEDED = ("tool_choice", "parallel_tool_calls", "response_format", "max_tokens")
IGNORED = ("temperature", "top_p", "reasoning_effort", "user")

LABEL = "Afterglow's built-in offline stand-in: fixed rules, no language model"
REMEDY = "Point AFTERGLOW_MODEL_URL at an OpenAI-compatible model server to get real answers."


class OfflineModel:
    """Answers under every model name. delay_s: seconds before each delta, to make streaming visible."""

    name = "offline"
    info = ModelInfo(window_tokens=128_000, learned="configuration", vision=False, tools=True)

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s

    async def stream(self, request: ChatRequest) -> AsyncGenerator[list[Delta], None]:
        """As ChatModels.stream; every delta comes in a list of its own."""
        for delta in _deltas(request):
            await asyncio.sleep(self.delay_s)
            yield [delta]


# --- the turn --------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    name: str
    arguments: str  # JSON text


def _deltas(request: ChatRequest) -> Iterator[Delta]:
    talk = _read(request.messages, _described(request.tools, RUNS_PYTHON), _described(request.tools, SEARCHES_FILES))
    calls = _calls(request, talk)
    if calls:
        yield from _call_deltas(request, calls)
        yield _end(request, "tool_calls", sum(_tokens(call.name + call.arguments) for call in calls))
        return
    text = _formatted(request.response_format, talk, _answer(talk))
    kept = text if request.max_tokens is None else _cut(text, request.max_tokens)
    for piece in re.findall(r"\S{1,24}\s*|\s+", kept):
        yield TextDelta(piece)
    yield _end(request, "stop" if kept == text else "length", _tokens(kept))


def _call_deltas(request: ChatRequest, calls: list[Call]) -> Iterator[Delta]:
    # A conversation only grows, so ids made from the whole request never come twice in one.
    seed = json.dumps(msgspec.structs.asdict(request)).encode()
    for index, call in enumerate(calls):
        digest = hashlib.sha256(b"%d:%b" % (index, seed)).hexdigest()
        yield ToolCallDelta(index, id=f"call_{digest[:24]}", name=call.name)
        for start in range(0, len(call.arguments), 8):
            yield ToolCallDelta(index, arguments=call.arguments[start : start + 8])


def _end(request: ChatRequest, reason: Any, completion_tokens: int) -> ModelEnd:
    prompt_tokens = _prompt_tokens(request)
    usage = Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )
    return ModelEnd(
        finish_reason=reason,
        usage=usage,
        raw_usage={name: getattr(usage, name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")},
        model=OfflineModel.name,
        upstream=OfflineModel.name,
        sent={name: getattr(request, name) for name in HEEDED if getattr(request, name) is not None},
        dropped=[name for name in IGNORED if getattr(request, name) is not None],
    )


def _tokens(text: str) -> int:
    return math.ceil(len(text.encode("utf-8", "surrogatepass")) / 4)


def _prompt_tokens(request: ChatRequest) -> int:
    total = 3 + (_tokens(json.dumps(request.tools)) if request.tools else 0)
    for message in request.messages:
        total += 4 + _tokens(_text(message)) + IMAGE_TOKENS * _images(message)
        total += _tokens(json.dumps(message["tool_calls"])) if message.get("tool_calls") else 0
    return total


def _cut(text: str, max_tokens: int) -> str:
    return text.encode()[: max_tokens * 4].decode("utf-8", "ignore")


ESCAPED_NUL = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")


def _clean(text: str) -> str:
    """The text with NUL and lone surrogates as U+FFFD."""
    return re.sub("[\x00\ud800-\udfff]", "\ufffd", text)


def _json_text(value: Any) -> str:
    return _clean(ESCAPED_NUL.sub("\\1\ufffd", json.dumps(value, ensure_ascii=False)))


# --- reading the conversation ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Done:
    """A function call already made for the newest user message."""

    name: str
    arguments: Any
    output: str = ""


@dataclass(slots=True)
class Talk:
    """The conversation as the rules see it. told: earlier user messages and tool outputs, oldest first.

    done: calls made since the newest user message, by call id; rounds: in how many turns. python, search: the names of
    the tools that run Python and search files, "" when there is none; work: what Python is used for.
    """

    python: str = ""
    search: str = ""
    system: str = ""
    newest: str = ""
    images: bool = False
    told: list[str] = field(default_factory=list)
    done: dict[str, Done] = field(default_factory=dict)
    rounds: int = 0
    work: Work | None = None

    @property
    def answered(self) -> list[Done]:
        """The calls of the caller's functions."""
        return [done for done in self.done.values() if done.name not in (self.python, self.search)]

    @property
    def printed(self) -> list[str]:
        """What the cells gave that were run for the newest message."""
        return [RESTARTED.sub("", output) for output in self._outputs_of(self.python)]

    @property
    def shown(self) -> list[str]:
        """What the searches gave that were made for the newest message."""
        return self._outputs_of(self.search)

    def _outputs_of(self, tool: str) -> list[str]:
        return [done.output for done in self.done.values() if tool and done.name == tool]


def _read(messages: list[Json], python: str, search: str) -> Talk:
    talk = Talk(python, search)
    for message in messages:
        match message["role"]:
            case "system" | "developer":
                talk.system += _text(message) + "\n"
            case "user":
                _turn_to(talk, message)
            case "assistant" if message.get("tool_calls"):
                talk.rounds += 1
                for call in message["tool_calls"]:
                    made = call["function"]
                    talk.done[call["id"]] = Done(made["name"], parsed(made["arguments"]))
            case "tool" if message["tool_call_id"] in talk.done:
                talk.done[message["tool_call_id"]].output = _text(message)
    return talk


def _turn_to(talk: Talk, message: Json) -> None:
    outputs = [_rendered(parsed(done.output)) for done in talk.answered]
    talk.told += [text for text in (talk.newest, *outputs) if text]
    talk.newest, talk.images = _text(message).strip(), _images(message) > 0
    talk.done, talk.rounds = {}, 0


def _text(message: Json) -> str:
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content if part["type"] == "text")
    return _clean(content)


def _images(message: Json) -> int:
    return sum(part["type"] == "image_url" for part in as_list(message.get("content")))


# --- choosing functions ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Function:
    """A function that may be called. weights: how much each stem in a request speaks for it."""

    name: str
    schema: Json
    weights: dict[str, float]


class Wanted(NamedTuple):
    """A part of the message that asks for a function. A later stage waits for the outputs of the earlier."""

    stage: int
    function: Function
    start: int
    end: int


class Planned(NamedTuple):
    stage: int
    name: str
    arguments: Json


PARTING = re.compile(
    r"[.!?;](?:\s+|$)|\n+|,?\s+(?:and\s+)?(?:then|after that|afterwards|finally|and|also)\s+|,\s+", re.I
)
NEXT = re.compile(r"\b(?:then|after that|afterwards|finally)\b", re.I)


def _calls(request: ChatRequest, talk: Talk) -> list[Call]:
    """The calls that are due now: what the newest message asks for, less what was already called.

    Files are searched beside the first of the caller's functions. These come before Python, which can then use what
    they told.
    """
    tools = [tool["function"] for tool in request.tools if tool["type"] == "function"]
    functions = [_function(made) for made in tools if made["name"] not in (talk.python, talk.search)]
    if request.tool_choice == "none":
        return []
    text = ends_of(talk.newest)
    talk.work = _work(request.tool_choice, talk, functions, text)
    if talk.rounds >= MAX_ROUNDS:
        return []
    queries = _queries(request.tool_choice, talk, functions, text)
    choice = "auto" if (talk.work or queries) and request.tool_choice == "required" else request.tool_choice
    wanted = _chosen(choice, functions, text, bool(talk.done)) if functions else []
    due = _not_done(_planned(wanted, talk, text), talk.answered)
    calls = [Call(talk.search, _json_text({"queries": queries}))] if queries else []
    calls += [Call(each.name, _json_text(each.arguments)) for each in due if each.stage == due[0].stage]
    if not calls and talk.work and (code := talk.work.next_code(talk.printed)):
        calls = [Call(talk.python, _json_text({"code": code}))]
    return calls[:1] if request.parallel_tool_calls is False else calls


def _described(tools: list[Json], start: str) -> str:
    """The name of the tool whose description begins so, or ""."""
    functions = (tool["function"] for tool in tools if tool["type"] == "function")
    return next((made["name"] for made in functions if str(made.get("description") or "").startswith(start)), "")


def _function(made: Json) -> Function:
    schema = as_dict(made.get("parameters"))
    properties = as_dict(schema.get("properties"))
    values = [str(value) for each in properties.values() for value in as_list(as_dict(each).get("enum"))]
    weights = dict.fromkeys(stems_of(" ".join([*properties, *values])), 1.0)
    described = stems_of(str(made.get("description") or "")[:300])
    weights |= {stem: 0.5 if stem in COMMON_STEMS else 2.0 for stem in described}
    named = set(stems_of(made["name"]))
    telling = named - COMMON_STEMS or named
    weights |= dict.fromkeys(named - telling, 1.0) | dict.fromkeys(telling, 3.0)
    return Function(made["name"], schema, weights)


def _work(choice: Any, talk: Talk, functions: list[Function], text: str) -> Work | None:
    """What Python is to be used for under this tool_choice."""
    named = _named(choice)
    if not talk.python or named not in ("", talk.python):
        return None
    figures = [each for done in talk.answered for each in find_figures(done.name, parsed(done.output))]
    question = text if len(text) <= LONG_CHARS else _ask_and_body(text)[0]
    fits = bool(functions and _wanted(functions, text))
    work = find_work(talk.newest, question, find_files(talk.system), figures, fits)
    demanded = named or (choice == "required" and not functions and not talk.search)
    return work or (Listing() if demanded else None)


def _named(choice: Any) -> str:
    """The function that a tool_choice demands, or ""."""
    return str(as_dict(as_dict(choice).get("function")).get("name", ""))


def _queries(choice: Any, talk: Talk, functions: list[Function], text: str) -> list[str]:
    """What to search the files for, once for each message, under this tool_choice."""
    named = _named(choice)
    if not talk.search or talk.shown or named not in ("", talk.search):
        return []
    ask, body = _ask_and_body(text)
    if not (named or (choice == "required" and not functions)):
        fits = bool(functions and _wanted(functions, text))
        if talk.work or _is_long(body) or (fits and not OF_DOCUMENTS.search(ask)):
            return []
        if any(rule(talk) for rule in NEED_NO_FILES):
            return []
    return queries_for(ask) or ["*"]


def _chosen(choice: Any, functions: list[Function], text: str, answered: bool) -> list[Wanted]:
    """What is to be called under this tool_choice. Once there are outputs, `required` has had its call."""
    if isinstance(choice, dict):
        name = as_dict(choice.get("function")).get("name", choice.get("type"))
        return [Wanted(0, function, 0, len(text)) for function in functions if function.name == name]
    wanted = _wanted(functions, text)
    if choice == "required" and not wanted and not answered:
        return [Wanted(0, _best(functions, text) or functions[0], 0, len(text))]
    return wanted


def _wanted(functions: list[Function], text: str) -> list[Wanted]:
    """The parts of `text` that ask for functions. A clause that asks for none belongs to the part before it."""
    wanted: list[Wanted] = []
    plain = QUOTED.sub(blanked, text)
    stage = 0
    for start, end, parting in _clauses(plain):
        function = _best(functions, plain[start:end])
        last = wanted[-1] if wanted else None
        if last and (function is None or (function is last.function and not find_values(text[start:end]))):
            wanted[-1] = last._replace(end=end)
        elif function:
            stage += last is not None and NEXT.search(parting) is not None
            wanted.append(Wanted(stage, function, start, end))
    return wanted


def _clauses(text: str) -> list[tuple[int, int, str]]:
    """Start and end of each clause, and the words that part it from the one before. Of a long text the ends only."""
    clauses, start, parting = [], 0, ""
    for match in [*PARTING.finditer(text), None]:
        end = match.start() if match else len(text)
        if end > start:
            clauses.append((start, end, parting + text[start : start + 12]))
        if match:
            start, parting = match.end(), match[0]
    return clauses if len(clauses) <= 24 else clauses[:8] + clauses[-8:]


def _best(functions: list[Function], clause: str) -> Function | None:
    """The function that a clause asks for, if any."""
    asked = set(stems_of(clause))
    names = {stem for found in find_names(clause) for stem in stems_of(found.value)}
    spelled = set(re.findall(r"[\w-]+", clause))
    fits = [10.0 if function.name in spelled else _fit(function, asked, names) for function in functions]
    best = max(range(len(functions)), key=fits.__getitem__)
    return functions[best] if fits[best] else None


def _fit(function: Function, asked: set[str], names: set[str]) -> float:
    """How well the stems of a clause ask for a function; 0 when not well enough. names: those that are only names."""
    matched = [function.weights[stem] for stem in asked if stem in function.weights]
    mostly = 2 * len(matched) > len(asked - names)
    return sum(matched) if sum(matched) >= 3 or (sum(matched) >= 2 and mostly) else 0.0


def _whole(text: str, talk: Talk) -> str:
    """The newest text and after it what was told last: a city named earlier will do when this message names none."""
    return "\n\n".join([text, *(clipped(told, 1_000) for told in talk.told[:-4:-1])])


def _planned(wanted: list[Wanted], talk: Talk, text: str) -> list[Planned]:
    whole = _whole(text, talk)
    found = find_values(whole) if wanted else []
    planned: list[Planned] = []
    for part in wanted:
        for arguments in _argument_sets(part, whole, found, _known(talk)):
            each = Planned(part.stage, part.function.name, arguments)
            if each not in planned:
                planned.append(each)
    return planned[:MAX_CALLS]


def _argument_sets(part: Wanted, text: str, found: list[Found], known: Json) -> Iterator[Json]:
    """One set of arguments, and one more for every further value in a list that a value was taken from."""
    schema = {**part.function.schema, "type": "object"}
    for _ in range(MAX_CALLS):
        scope = Scope(text, part.start, part.end, found, schema, known)
        yield as_dict(draw(schema, "", scope, True))
        spent = next((f.after for f in found if f.after in scope.taken and f not in scope.taken), None)
        if spent is None:
            return
        found = [f for f in found if f is not spent]


def _not_done(planned: list[Planned], done: list[Done]) -> list[Planned]:
    """Without the calls that were made: by their arguments, else by count, as outputs may change what is drawn."""
    same = [each for each in planned if any((d.name, d.arguments) == (each.name, each.arguments) for d in done)]
    other = Counter(d.name for d in done)
    other.subtract(each.name for each in same)
    due = []
    for each in planned:
        if each not in same and other[each.name] > 0:
            other[each.name] -= 1
        elif each not in same:
            due.append(each)
    return due


def _known(talk: Talk) -> Json:
    """What the outputs so far told, by key."""
    known: Json = {}
    for done in talk.done.values():
        output = parsed(done.output)
        for each in as_list(output) or [output]:
            known |= {key: value for key, value in as_dict(each).items() if isinstance(value, str | int | float)}
    return known


# --- answering -------------------------------------------------------------------------------------------------


def _answer(talk: Talk) -> str:
    """The first answer that a rule knows, in the form that was asked for; else who is speaking, and what to do."""
    known = next(filter(None, (rule(talk) for rule in ANSWERS)), "")
    for pattern, form in FORMS:
        if match := pattern.search(f"{talk.system}\n{ends_of(talk.newest)}"):
            known = form(known, talk, match)
    return known or _excuse(talk)


def _excuse(talk: Talk) -> str:
    topic = clipped(" ".join(topic_of(_ask_and_body(ends_of(talk.newest))[0]).split()), 80)
    about = f' about "{topic}"' if topic else ""
    return f"I have no real answer{about}: I am {LABEL}{', and I see no images' if talk.images else ''}. {REMEDY}"


def _ordered(talk: Talk) -> str:
    """What the instructions say to answer always."""
    match = re.search(
        r"\balways (?:answer|reply|respond|say)\b(?: only| exactly| with)*:?\s*[\"'“‘]([^\"”’\n]{1,500}?)[\"'”’](?!\w)"
        r"|\b(?:answer|reply|respond) (?:only with|with exactly|with only):\s*([^\n]{1,500})",
        talk.system,
        re.I,
    )
    return (match[1] or match[2]).strip() if match else ""


def _report(talk: Talk) -> str:
    """What the files, Python and the functions answered."""
    found = talk.work.findings(talk.printed) if talk.work else ""
    used = talk.work.used(talk.printed) if talk.work else ""
    told = "\n".join(_reported(done, talk.newest) for done in talk.answered if done.name != used)
    return "\n\n".join(filter(None, (_cited(talk), found, told)))


def _cited(talk: Talk) -> str:
    """What the files say, each sentence with the marker of its passage."""
    if not talk.shown:
        return ""
    ask = _ask_and_body(ends_of(talk.newest))[0]
    stated = {each.text: each for each in statements_of(talk.shown) if not ASKING.search(each.text)}
    weights = rarity(list(stated))
    # Of a question with parts that other tools answer, the part that files know something about.
    parts = [ask, *(ask[start:end] for start, end, _ in _clauses(ask) if len(stems_of(ask[start:end])) > 1)]
    best = next(filter(None, (_matching(part, list(stated), 4, weights=weights) for part in parts)), [])
    # Passages overlap, so that one of them may begin or end in the middle of a sentence that another has whole.
    whole = [text for text in best if not any(text != other and text in other for other in best)]
    if not whole:
        return f'The files say nothing about "{clipped(" ".join(topic_of(ask).split()), 80)}" that I can find.'
    return f"The files say: {cited([stated[text] for text in whole[:2]])}"


def _reported(done: Done, question: str) -> str:
    given = ", ".join(f"{key}={clipped(_rendered(value), 60)}" for key, value in as_dict(done.arguments).items())
    output = _rendered(parsed(done.output)).strip()
    if len(output) > 600:
        output = " ".join(_matching(question, sentences_of(output), 3)) or clipped(output, 600)
    end = "" if output.endswith((".", "!", "?", "…", "。")) else "."
    return f"{done.name}({given}) says: {output or 'nothing'}{end}"


def _rendered(value: Any, depth: int = 0) -> str:
    """A JSON value in words: `temperature 12, sky cloudy`."""
    match value:
        case dict() | list() if depth > 5:
            return "…"
        case dict():
            text = ", ".join(f"{key} {_rendered(each, depth + 1)}" for key, each in value.items())
            return f"({text})" if depth else text
        case list():
            text = ", ".join(_rendered(each, depth + 1) for each in value)
            return f"[{text}]" if depth else text
        case bool():
            return "yes" if value else "no"
        case None:
            return "none"
        case _:
            return str(value)


START = r"(?:^|[.!?\n]\s*)(?:please |just |now |only |can you |could you ){0,4}"
SAY = re.compile(
    rf"{START}(?:say|echo|repeat(?: after me)?)(?: exactly)?(?:[:,]\s*|\s+"
    r"(?!something|anything|nothing|a |an |more|that|it\b))(\S.*)",
    re.I | re.S,
)
REPLY = re.compile(
    rf"{START}(?:reply|answer|respond|say)(?: only| just)? with(?: exactly| only| just)?"
    r"(?: the (?:single |exact )?(?:word|text|phrase))?"
    r"(?:(?<=exactly)|(?<=only)|(?<=just)|(?<=word)|(?<=text)|(?<=phrase)|(?=:)|(?= [\"'“‘])|(?= [\w-]+[.!]?$))"
    r"[:,]?\s+(\S.*)",
    re.I | re.S,
)


def _echo(talk: Talk) -> str:
    """`Say hello`, `Reply with exactly: X`."""
    # In a long message only the beginning is a request; further on such words are part of a text.
    look = re.Pattern.search if len(talk.newest) <= 400 else re.Pattern.match
    match = look(SAY, talk.newest) or look(REPLY, talk.newest)
    if not match:
        return ""
    quoted = QUOTED.match(match[1])
    return next(filter(None, quoted.groups())) if quoted else match[1].strip()


def _count_up(talk: Talk) -> str:
    match = re.search(r"\bcount (?:up )?(?:from (\d{1,4}) )?to (\d{1,4})\b", ends_of(talk.newest), re.I)
    first, last = (int(match[1] or 1), int(match[2])) if match else (0, -1)
    return ", ".join(map(str, range(first, min(last, first + 999) + 1)))


GREETINGS = (
    (
        re.compile(r"(?:hi|hello|hey|greetings|good (?:morning|afternoon|evening|day))\b", re.I),
        "Hello! What can I do for you?",
    ),
    (re.compile(r"(?:thanks|thank you|thx|cheers)\b", re.I), "You are welcome."),
    (re.compile(r"(?:bye|goodbye|good night|see you)\b", re.I), "Goodbye!"),
)
IDENTITY = re.compile(
    r"\b(?:who|what) are you\b|\bare you (?:an? )?(?:ai|human|real|bot|robot|language model|llm|gpt\S*|chatgpt)\b"
    r"|\b(?:what|which) (?:language )?model (?:are|is|do|am)\b|\bwhat(?:'s| is) your name\b|\bwhat can you do\b",
    re.I,
)


def _greeting(talk: Talk) -> str:
    if len(talk.newest.split()) > 5 or "?" in talk.newest:
        return ""
    return next((answer for pattern, answer in GREETINGS if pattern.match(talk.newest)), "")


def _identity(talk: Talk) -> str:
    if not IDENTITY.search(ends_of(talk.newest)):
        return ""
    can = "call your functions, search your files, run Python on tables, do sums, and count, summarise and quote text"
    return f"I am {LABEL}. I {can}. {REMEDY}"


def _arithmetic(talk: Talk) -> str:
    found = asked_sum(ends_of(talk.newest))
    result = work_out(found)
    return "" if not result else f"{found} is undefined." if result == "undefined" else f"{found} = {result}"


def _ask_and_body(text: str) -> tuple[str, str]:
    """The request in a message, and the text it comes with: a line, a question or what stands before a colon."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1:
        ask = next((line for line in (lines[0], lines[-1]) if ASKING.search(line)), lines[0])
        return ask, "\n".join(line for line in lines if line is not ask)
    if (colon := text.find(": ")) in range(1, 120) and ASKING.search(text[:colon]):
        return text[:colon], text[colon + 2 :]
    sentences = sentences_of(text)
    ask = next((sentence for sentence in reversed(sentences) if ASKING.search(sentence)), text)
    return ask, "" if ask == text else " ".join(sentence for sentence in sentences if sentence is not ask)


ASKING = re.compile(
    r"[?？]\s*$|^\W*(?:please |can you |could you )?(?:who|what|when|where|why|which|how|count|summari[sz]e|tl;?dr|"
    r"find|list|tell|quote|give|show|explain|describe|translate)\b",
    re.I,
)


def _document(talk: Talk) -> str:
    """The text that the newest message is about: its own, else what it quotes, else the last long one told before."""
    ask, body = _ask_and_body(talk.newest)
    if body:
        return body
    if quoted := QUOTED.search(ask):
        return str(next(filter(None, quoted.groups())))
    return next((told for told in reversed(talk.told) if _is_long(told)), "\n".join(talk.told))


def _is_long(text: str) -> bool:
    return len(text.split(None, 25)) > 25 or text.count("\n") > 1


COUNTED: dict[str, Callable[[str], int]] = {
    "word": lambda text: len(text.split()),
    "line": lambda text: len(text.splitlines()),
    "character": len,
    "letter": lambda text: sum(map(str.isalpha, text)),
    "sentence": lambda text: len(sentences_of(text)),
    "paragraph": lambda text: len(re.findall(r"\S(?:.|\n(?!\s*\n))*", text)),
}


def _measure(talk: Talk) -> str:
    pattern = rf"\b(?:how many|count (?:the|all)?|number of) ?({'|'.join(COUNTED)})s?\b"
    match, text = re.search(pattern, _ask_and_body(talk.newest)[0], re.I), _document(talk)
    if not match or not text:
        return ""
    unit = match[1].lower()
    number = COUNTED[unit](text)
    return f"The text has {number} {unit}{'' if number == 1 else 's'}."


def _summary(talk: Talk) -> str:
    ask = _ask_and_body(talk.newest)[0]
    if not re.search(r"\b(?:summar(?:y|i[sz]\w+)|tl;?dr|(?:key|main) points|gist|recap|in short)\b", ask, re.I):
        return ""
    wanted = re.search(r"\b(\d{1,2}|one|two|three|four|five) (?:\w+ )?(?:sentence|point|bullet|line)", ask, re.I)
    size = int(wanted[1]) if wanted and wanted[1].isdigit() else NUMBERS.get(wanted[1].lower(), 1) if wanted else 2
    return " ".join(_central(sentences_of(_document(talk)), size))


NO_WEIGHTS: Mapping[str, float] = {}


def _central(sentences: list[str], size: int) -> list[str]:
    """The sentences whose words come most often in all of them, in their order; the first has a small advantage."""
    stems = [stems_of(sentence) for sentence in sentences]
    often = Counter(stem for each in stems for stem in each)
    scores = [sum(often[stem] for stem in set(each)) / (len(each) + 3) for each in stems]
    best = sorted(range(len(sentences)), key=lambda index: -scores[index] * (1.2 if index == 0 else 1))
    return [sentences[index] for index in sorted(best[:size])]


def _matching(
    question: str, sentences: list[str], size: int, least: float = 0.3, weights: Mapping[str, float] = NO_WEIGHTS
) -> list[str]:
    """The sentences that share most words with a question, best first; `least` is the share of its words.

    weights: how much a stem counts; 1 when it is not among them.
    """
    asked = {stem: weights.get(stem, 1.0) for stem in stems_of(question) if stem not in ASKED_OF_TEXTS}
    scored = [(_share(question, asked, sentence), sentence) for sentence in sentences]
    best = sorted((each for each in scored if each[0] > least), key=lambda each: -each[0])
    return [sentence for share, sentence in best[:size] if share >= 0.7 * best[0][0]]


ASKED_OF_TEXTS = {
    stem_of(word) for word in word_set("text document file article it say mention according quote tell find")
}
EVIDENCE = (
    (re.compile(r"\bwho(?:se|m)?\b", re.I), re.compile(r"\w[ \"“]+[A-Z]")),
    (re.compile(r"\bwhen\b|\bwhat (?:year|date|day|time)\b", re.I), re.compile(rf"\d|\b{MONTH} |\b(?:{DAY})\b", re.I)),
    (re.compile(r"\bhow (?:many|much|old|long|far|tall|big)\b", re.I), re.compile(r"\d")),
    (re.compile(r"\bwhere\b", re.I), re.compile(r"\b(?:in|at|near|from|on) ")),
)


def _share(question: str, asked: Mapping[str, float], sentence: str) -> float:
    stems = set(stems_of(sentence))
    shared = sum(weight for stem, weight in asked.items() if stem in stems) / (sum(asked.values()) or 1)
    fits = any(asks.search(question) and has.search(sentence) for asks, has in EVIDENCE)
    return shared * (1.3 if fits else 1.0)


def _quote(talk: Talk) -> str:
    """What the conversation's texts say about a question."""
    ask, body = _ask_and_body(talk.newest)
    if not ASKING.search(ask):
        return ""
    for text in filter(None, (body, *reversed(talk.told))):
        said = [sentence for sentence in sentences_of(text) if not ASKING.search(sentence)]
        source, size, least = ("The text says", 2, 0.3) if _is_long(text) else ("In this conversation", 1, 0.5)
        if found := _matching(ask, said, size, least):
            return f"{source}: " + " ".join(f'"{sentence}"' for sentence in found)
    return ""


def _noted(talk: Talk) -> str:
    """A fact told for later."""
    fact = re.match(
        r"(?:please )?(?:remember|note|my|our|i am|i'm|i have|i live|i like|i work|we are)\b", talk.newest, re.I
    )
    if not fact or "?" in talk.newest:
        return ""
    return f'Noted: "{clipped(sentences_of(talk.newest)[0], 200)}"'


ANSWERS: tuple[Callable[[Talk], str], ...] = (
    _ordered,
    _report,
    _echo,
    _count_up,
    _greeting,
    _identity,
    _arithmetic,
    _measure,
    _summary,
    _quote,
    _noted,
)
NEED_NO_FILES = (_ordered, _echo, _count_up, _greeting, _identity, _arithmetic, _noted)


def _one_word(answer: str, talk: Talk, match: re.Match[str]) -> str:
    """The number or the name in the answer that the question did not have, else its last word."""
    asked = set(words_of(talk.newest.rsplit("\n", 1)[-1])) if "?" in talk.newest else set()
    words = re.findall(r"[\w.'-]*\w", answer.split("= ")[-1].split(": ", 1)[-1])
    telling = [word for word in words[1:] if word[0].isdigit() or (word[0].isupper() and word.lower() not in asked)]
    return str(telling[0] if telling else words[-1] if words else "Unknown")


# How an answer is to look: what the instructions or the message say, and what that makes of it.
FORMS: tuple[tuple[re.Pattern[str], Callable[[str, Talk, re.Match[str]], str]], ...] = (
    (re.compile(r"\b(?:in|with|using) (?:just |only |exactly )?(?:one|a single) word\b", re.I), _one_word),
    (
        re.compile(r"\b(?:in|with|using) (?:just |only |exactly )?(?:one|a single) sentence\b", re.I),
        lambda answer, talk, match: next(iter(sentences_of(answer)), ""),
    ),
    (
        re.compile(r"\b(?:in|with|at most|under) (?:at most |under )?(\d{1,4}) words\b", re.I),
        lambda answer, talk, match: " ".join(answer.split()[: int(match[1])]),
    ),
    (
        re.compile(r"\b(?:in|use|using) (?:all |only )?(?:upper ?case|capitals|capital letters|caps)\b", re.I),
        lambda answer, talk, match: answer.upper(),
    ),
)


def _formatted(form: Any, talk: Talk, answer: str) -> str:
    """The answer in the response_format. The keys of a json_object are those that the text asks for."""
    kind = as_dict(form).get("type")
    if kind not in ("json_object", "json_schema"):
        return _clean(answer)
    if kind == "json_object" and isinstance(made := parsed(answer), dict):
        return _json_text(made)
    schema = as_dict(as_dict(form.get("json_schema")).get("schema"))
    schema = schema or {"type": "object", "required": _asked_keys(talk)}
    text = ends_of(talk.newest)
    whole = _whole(text, talk)
    scope = Scope(whole, 0, len(text), find_values(whole), schema, _known(talk), answer)
    return _json_text(draw(schema, "answer", scope, True))


def _asked_keys(talk: Talk) -> list[str]:
    match = re.search(r"\b(?:keys?|fields?|properties)\b[: ]+([^.\n]{1,300})", f"{talk.newest}\n{talk.system}", re.I)
    keys = re.findall(r"[A-Za-z_]\w*", match[1]) if match else []
    return [key for key in dict.fromkeys(keys) if key.lower() not in STOP] or ["answer"]
