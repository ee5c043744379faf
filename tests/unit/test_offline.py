"""The offline model, seen only through ChatRequest and deltas, as the run loop sees it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterglow.contracts import ChatRequest, Delta, ModelEnd, TextDelta, ToolCallDelta
from afterglow.offline import OfflineModel

STRING = {"type": "string"}
NUMBER = {"type": "number"}
INTEGER = {"type": "integer"}


def function(called: str, description: str = "", /, required: list[str] | None = None, **properties: Any) -> Any:
    """A function tool; every property is required unless `required` says otherwise."""
    required = list(properties) if required is None else required
    schema = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": called, "description": description, "parameters": schema}}


WEATHER = function(
    "get_weather",
    "Get the current weather for a city",
    required=["city"],
    city=STRING,
    unit={"type": "string", "enum": ["celsius", "fahrenheit"]},
)
TIME = function("get_time", "Local time in a place", city=STRING)
EMAIL = function("send_email", "Send an email", to=STRING, subject=STRING, body=STRING)
ADD = function("add", "Add two numbers", a=NUMBER, b=NUMBER)
MULTIPLY = function("multiply", "Multiply two numbers", a=NUMBER, b=NUMBER)
FLIGHTS = function(
    "search_flights",
    "Search for flights",
    required=["origin", "destination"],
    origin=STRING,
    destination=STRING,
    date={"type": "string", "format": "date"},
    passengers=INTEGER,
)
DOCS = function("search_docs", "Search the knowledge base", required=["query"], query=STRING, limit=INTEGER)
FIND_USER = function("find_user", "Find a user", name=STRING)
LIST_ORDERS = function("list_orders", "List the orders of a user", user_id=INTEGER)
DOCUMENT = """Acme Corporation was founded in 1947 by Wile Coyote. The company sells anvils and rockets.
Its headquarters are in Tucson, Arizona. In 2023 the company earned 12 million dollars.
Anvils remain the most popular product of the company. The chief executive is Road Runner."""


@dataclass
class Turn:
    """What one stream gave: its text, its calls as (name, arguments), their ids, the end, the raw lists."""

    text: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    end: ModelEnd = field(default_factory=lambda: ModelEnd(finish_reason="stop"))
    lists: list[list[Delta]] = field(default_factory=list)


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def called(call_id: str, function_name: str, output: str, /, **arguments: Any) -> list[dict[str, Any]]:
    """A call made earlier and its output, as two messages."""
    call = {"id": call_id, "type": "function", "function": {"name": function_name, "arguments": json.dumps(arguments)}}
    return [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "content": output},
    ]


def request(*messages: Any, **options: Any) -> ChatRequest:
    """Strings are user messages."""
    full = [said("user", message) if isinstance(message, str) else message for message in messages]
    return ChatRequest(model="gpt-4o", messages=full, **options)


async def ask(*messages: Any, **options: Any) -> Turn:
    return await play(request(*messages, **options))


async def play(asked: ChatRequest) -> Turn:
    turn = Turn(lists=[deltas async for deltas in OfflineModel().stream(asked)])
    names: list[str] = []
    arguments: list[str] = []
    for delta in (delta for deltas in turn.lists for delta in deltas):
        match delta:
            case TextDelta(text):
                turn.text += text
            case ToolCallDelta(index, call_id, name, piece):
                if index == len(names):
                    names.append(name)
                    arguments.append("")
                    turn.ids.append(call_id)
                arguments[index] += piece
            case ModelEnd():
                turn.end = delta
    turn.calls = [(name, json.loads(text)) for name, text in zip(names, arguments, strict=True)]
    return turn


def schema_answer(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


# --- choosing functions ----------------------------------------------------------------------------------------


async def test_a_function_that_fits_is_called():
    """A message about the weather calls get_weather with the city that it names."""
    turn = await ask("What's the weather in Oslo?", tools=[TIME, WEATHER])
    assert turn.calls == [("get_weather", {"city": "Oslo"})]
    assert turn.text == ""
    assert turn.end.finish_reason == "tool_calls"


@pytest.mark.parametrize("text", ["Hello there", "Thanks!", "Tell me a joke", "What is the capital of France?", ""])
async def test_a_message_that_asks_for_nothing_calls_nothing(text):
    """Small talk and other questions get a text even when functions are offered."""
    turn = await ask(text, tools=[WEATHER, TIME, EMAIL, ADD])
    assert turn.calls == []
    assert turn.text


async def test_a_description_alone_can_fit():
    """A function with a meaningless name is found by its description."""
    tool = function("fn_17", "Current temperature at a location", location=STRING)
    assert (await ask("What is the temperature in Rome?", tools=[tool])).calls == [("fn_17", {"location": "Rome"})]


async def test_camel_case_names_are_read():
    """getCurrentWeather is as good a name as get_current_weather."""
    tool = function("getCurrentWeather", city=STRING)
    assert (await ask("weather in Rome please", tools=[tool])).calls == [("getCurrentWeather", {"city": "Rome"})]


async def test_a_function_called_by_its_name_is_called():
    """Naming the function is enough."""
    tool = function("frobnicate_v2", target=STRING)
    assert (await ask("Run frobnicate_v2 on Zeus", tools=[WEATHER, tool])).calls == [
        ("frobnicate_v2", {"target": "Zeus"})
    ]


async def test_words_in_quotes_ask_for_nothing():
    """What is quoted is material: a mail about the weather is no question about the weather."""
    turn = await ask(
        "Send an email to ada@example.com with subject 'Hi' and body 'The weather is nice'", tools=[WEATHER, EMAIL]
    )
    assert turn.calls == [("send_email", {"to": "ada@example.com", "subject": "Hi", "body": "The weather is nice"})]


async def test_each_clause_calls_its_function():
    """Two clauses that ask for different functions make two calls in one turn, each with its own city."""
    turn = await ask("What's the weather in Oslo and the time in Bergen?", tools=[WEATHER, TIME])
    assert turn.calls == [("get_weather", {"city": "Oslo"}), ("get_time", {"city": "Bergen"})]


async def test_a_clause_without_a_city_borrows_the_one_of_its_neighbour():
    """A value that stands in another clause serves all that need it."""
    turn = await ask("Tell me the weather and the time in Oslo", tools=[WEATHER, TIME])
    assert turn.calls == [("get_weather", {"city": "Oslo"}), ("get_time", {"city": "Oslo"})]


@pytest.mark.parametrize(
    ("text", "cities"),
    [
        ("What's the weather in Oslo and Bergen?", ["Oslo", "Bergen"]),
        ("What's the weather in Oslo, Bergen and Rome?", ["Oslo", "Bergen", "Rome"]),
        ("weather in oslo and bergen", ["oslo", "bergen"]),
        ("Weather in San Francisco, CA?", ["San Francisco, CA"]),
        ("Weather in Paris, France and Oslo, Norway?", ["Paris, France", "Oslo, Norway"]),
        ("What's the weather in Oslo and the weather in Rome?", ["Oslo", "Rome"]),
    ],
)
async def test_each_value_of_a_list_makes_a_call(text, cities):
    """Several cities make parallel calls; a city with its country is one city."""
    turn = await ask(text, tools=[WEATHER])
    assert turn.calls == [("get_weather", {"city": city}) for city in cities]


async def test_without_parallel_calls_one_comes_at_a_time():
    """parallel_tool_calls=False gives the calls one by one, each after the output of the one before."""
    text = "Weather in Oslo and Bergen?"
    first = await ask(text, tools=[WEATHER], parallel_tool_calls=False)
    made = called("call_1", "get_weather", "rain", city="Oslo")
    second = await ask(text, *made, tools=[WEATHER], parallel_tool_calls=False)
    assert [first.calls, second.calls] == [[("get_weather", {"city": "Oslo"})], [("get_weather", {"city": "Bergen"})]]


async def test_tool_choice_none_calls_nothing():
    """tool_choice "none" gives a text whatever fits."""
    turn = await ask("Weather in Oslo?", tools=[WEATHER], tool_choice="none")
    assert turn.calls == []
    assert turn.text


async def test_tool_choice_required_calls_something():
    """tool_choice "required" calls what fits, else the first function."""
    assert (await ask("Time in Rome?", tools=[WEATHER, TIME], tool_choice="required")).calls[0][0] == "get_time"
    assert (await ask("Hi!", tools=[WEATHER, TIME], tool_choice="required")).calls[0][0] == "get_weather"


async def test_a_named_tool_choice_calls_that_function():
    """tool_choice with a name calls that function, though another fits better."""
    choice = {"type": "function", "function": {"name": "get_time"}}
    assert (await ask("Weather in Oslo?", tools=[WEATHER, TIME], tool_choice=choice)).calls == [
        ("get_time", {"city": "Oslo"})
    ]


async def test_required_is_content_with_one_call():
    """Once a call has its output, tool_choice "required" makes no second one out of nothing."""
    turn = await ask("Hi!", *called("c", "get_weather", "rain", city="Hi"), tools=[WEATHER], tool_choice="required")
    assert turn.calls == []
    assert "rain" in turn.text


# --- drawing arguments -----------------------------------------------------------------------------------------


async def test_prepositions_tell_origin_from_destination():
    """from and to, a date in words and a number with its noun each find their parameter."""
    turn = await ask("Find flights to Bergen from Oslo on 12 May 2025 for 2 passengers", tools=[FLIGHTS])
    expected = {"origin": "Oslo", "destination": "Bergen", "date": "2025-05-12", "passengers": 2}
    assert turn.calls == [("search_flights", expected)]


async def test_optional_parameters_need_something_said():
    """What is optional and not mentioned is left out."""
    turn = await ask("Search flights from Oslo to Bergen", tools=[FLIGHTS])
    assert turn.calls == [("search_flights", {"origin": "Oslo", "destination": "Bergen"})]


async def test_enum_values_are_found_in_the_text():
    """A mentioned enum value fills its parameter."""
    turn = await ask("What's the weather in Rome in Fahrenheit?", tools=[WEATHER])
    assert turn.calls == [("get_weather", {"city": "Rome", "unit": "fahrenheit"})]


async def test_a_required_enum_falls_back():
    """A required enum takes its default, else its first value."""
    tool = function("get_weather", unit={"enum": ["c", "f"]}, scale={"enum": ["x", "y"], "default": "y"})
    assert (await ask("weather?", tools=[tool])).calls == [("get_weather", {"unit": "c", "scale": "y"})]


@pytest.mark.parametrize(
    ("text", "a", "b"),
    [("add 2 and 3", 2, 3), ("Please add 1,000 to -2.5", 1000, -2.5), ("add two and seven", 2, 7)],
)
async def test_numbers_are_read_in_order(text, a, b):
    """Digits, thousands, decimals, signs and number words are numbers."""
    assert (await ask(text, tools=[ADD])).calls == [("add", {"a": a, "b": b})]


async def test_numbers_are_clamped_to_their_limits():
    """minimum, maximum and multipleOf hold, whatever the text says."""
    tool = function("roll_dice", count={**INTEGER, "maximum": 10}, sides={**INTEGER, "minimum": 4, "multipleOf": 2})
    assert (await ask("roll 50 dice with 3 sides", tools=[tool])).calls == [("roll_dice", {"count": 10, "sides": 4})]


async def test_a_query_is_the_topic_of_the_request():
    """A query is what the request is about, without the words that ask."""
    turn = await ask("Search the knowledge base for cheap laptops", tools=[DOCS])
    assert turn.calls == [("search_docs", {"query": "cheap laptops"})]


async def test_queries_are_a_list_with_the_topic():
    """An array of queries gets at least one."""
    tool = function("file_search", "Search the attached files", queries={"type": "array", "items": STRING})
    turn = await ask("Search the files for the refund policy", tools=[tool])
    assert turn.calls == [("file_search", {"queries": ["refund policy"]})]


async def test_formats_are_kept():
    """email, uri, date-time, time and uuid are drawn where the text has them, in their form."""
    tool = function(
        "book_meeting",
        mail={"type": "string", "format": "email"},
        link={"type": "string", "format": "uri"},
        at={"type": "string", "format": "date-time"},
        alarm={"type": "string", "format": "time"},
        key={"type": "string", "format": "uuid"},
    )
    text = (
        "Book a meeting with bo@example.org at https://meet.example.org/x?y=1, on 2025-03-04, alarm at 5:30 pm, "
        "key 123e4567-e89b-12d3-a456-426614174000."
    )
    assert (await ask(text, tools=[tool])).calls[0][1] == {
        "mail": "bo@example.org",
        "link": "https://meet.example.org/x?y=1",
        "at": "2025-03-04T00:00:00Z",
        "alarm": "17:30:00Z",
        "key": "123e4567-e89b-12d3-a456-426614174000",
    }


async def test_patterns_choose_the_word_that_matches():
    """A pattern is satisfied by a word of the text when one does."""
    tool = function("track_parcel", parcel={"type": "string", "pattern": r"^[A-Z]{2}\d{4}$"})
    assert (await ask("Track the parcel of Ada: NO1234", tools=[tool])).calls == [
        ("track_parcel", {"parcel": "NO1234"})
    ]


async def test_arrays_take_all_values_of_a_list():
    """A list in the text fills an array in one call."""
    tool = function("compare_weather", cities={"type": "array", "items": STRING})
    turn = await ask("Compare the weather in Oslo, Bergen and Rome", tools=[tool])
    assert turn.calls == [("compare_weather", {"cities": ["Oslo", "Bergen", "Rome"]})]


async def test_nested_objects_are_filled():
    """Objects in objects draw from the same text."""
    place = {"type": "object", "properties": {"city": STRING, "days": INTEGER}, "required": ["city", "days"]}
    tool = function("get_forecast", place=place)
    assert (await ask("forecast for Oslo, 3 days", tools=[tool])).calls == [
        ("get_forecast", {"place": {"city": "Oslo", "days": 3}})
    ]


async def test_booleans_follow_their_mention():
    """A mentioned flag is true, a negated one false, an optional unmentioned one absent."""
    flags = {"breakfast": {"type": "boolean"}, "parking": {"type": "boolean"}, "spa": {"type": "boolean"}}
    tool = function("book_hotel", required=[], **flags)
    turn = await ask("Book a hotel with breakfast but without parking", tools=[tool])
    assert turn.calls == [("book_hotel", {"breakfast": True, "parking": False})]


async def test_nullable_parameters_are_null_when_nothing_is_said():
    """In strict schemas null stands for what the text does not say."""
    tool = function(
        "get_weather", city=STRING, unit={"type": ["string", "null"]}, day={"anyOf": [STRING, {"type": "null"}]}
    )
    assert (await ask("Weather in Oslo", tools=[tool])).calls == [
        ("get_weather", {"city": "Oslo", "unit": None, "day": None})
    ]


async def test_local_references_are_followed():
    """$ref into $defs and allOf are read like what they stand for."""
    tool = function("get_weather", place={"$ref": "#/$defs/place"})
    tool["function"]["parameters"]["$defs"] = {
        "place": {"allOf": [{"type": "object", "properties": {"city": STRING}, "required": ["city"]}]}
    }
    assert (await ask("Weather in Oslo", tools=[tool])).calls == [("get_weather", {"place": {"city": "Oslo"}})]


async def test_recursive_schemas_end():
    """A schema that needs itself without end is cut off, not followed for ever."""
    tool = function("get_weather", node={"$ref": "#/$defs/n"})
    tool["function"]["parameters"]["$defs"] = {
        "n": {
            "type": "object",
            "properties": {"l": {"$ref": "#/$defs/n"}, "r": {"$ref": "#/$defs/n"}},
            "required": ["l", "r"],
        }
    }
    assert (await ask("weather", tools=[tool])).calls[0][0] == "get_weather"


async def test_what_was_told_before_serves_a_later_call():
    """A city named in an earlier message is used when the newest names none."""
    turn = await ask("I'm in Oslo.", said("assistant", "Nice."), "What's the weather?", tools=[WEATHER])
    assert turn.calls == [("get_weather", {"city": "Oslo"})]


@pytest.mark.parametrize("parameters", [None, {}, {"type": "object"}, {"properties": 3, "required": "x"}])
async def test_functions_without_parameters_get_an_empty_object(parameters):
    """Missing or meaningless parameters mean none."""
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": parameters}}
    assert (await ask("weather", tools=[tool])).calls == [("get_weather", {})]


# --- after outputs ---------------------------------------------------------------------------------------------


async def test_outputs_are_told_in_words():
    """A JSON output becomes words, with the call that it answers."""
    made = called("c", "get_weather", '{"temperature": 12, "sky": "cloudy", "wind": {"ms": 4}}', city="Oslo")
    turn = await ask("Weather in Oslo?", *made, tools=[WEATHER])
    assert turn.text == "get_weather(city=Oslo) says: temperature 12, sky cloudy, wind (ms 4)."
    assert turn.end.finish_reason == "stop"


async def test_text_outputs_are_quoted_as_they_are():
    """A short text output is told word for word."""
    turn = await ask("Weather in Oslo?", *called("c", "get_weather", "It rains, 7 °C!", city="Oslo"), tools=[WEATHER])
    assert turn.text == "get_weather(city=Oslo) says: It rains, 7 °C!"


async def test_long_outputs_are_quoted_where_they_match():
    """Of a long output the sentences that answer the question are quoted."""
    output = "Nothing of interest here. " * 40 + "The refund period is thirty days. " + "More of the same. " * 40
    turn = await ask("What is the refund period?", *called("c", "file_search", output, query="refund"))
    assert "The refund period is thirty days." in turn.text
    assert len(turn.text) < 300


async def test_later_steps_wait_for_earlier_outputs():
    """What is to be done "then" is called after the first output, with values that the output told."""
    text = "Find the user Ada, then list her orders"
    tools = [FIND_USER, LIST_ORDERS]
    first = await ask(text, tools=tools)
    made = called("c1", "find_user", '{"id": 17, "name": "Ada Lovelace"}', name="Ada")
    second = await ask(text, *made, tools=tools)
    last = await ask(text, *made, *called("c2", "list_orders", "[3, 4]", user_id=17), tools=tools)
    assert first.calls == [("find_user", {"name": "Ada"})]
    assert second.calls == [("list_orders", {"user_id": 17})]
    assert last.calls == []
    assert "list_orders(user_id=17) says: 3, 4." in last.text


async def test_a_call_is_not_made_twice():
    """A function already called is not called again, even when it was called with other arguments."""
    turn = await ask("Weather in Oslo?", *called("c", "get_weather", "rain", city="Oslo, Norway"), tools=[WEATHER])
    assert turn.calls == []


async def test_rounds_end():
    """After eight rounds of calls comes an answer, whatever is left to call."""
    cities = [f"{letter}town" for letter in "ABCDEFGHIJ"]
    made = [
        message for n, city in enumerate(cities[:8]) for message in called(f"c{n}", "get_weather", "rain", city=city)
    ]
    text = f"Weather in {', '.join(cities[:-1])} and {cities[-1]}?"
    assert len((await ask(text, tools=[WEATHER])).calls) == 10
    assert (await ask(text, *made, tools=[WEATHER], parallel_tool_calls=False)).calls == []


async def test_a_new_message_starts_afresh():
    """The same question asked again is called again."""
    turn = await ask(
        "Weather in Oslo?",
        *called("c", "get_weather", "rain", city="Oslo"),
        said("assistant", "Rain."),
        "Weather in Oslo?",
        tools=[WEATHER],
    )
    assert turn.calls == [("get_weather", {"city": "Oslo"})]


async def test_deep_outputs_are_cut_short():
    """An output nested beyond all sense is told as far as it makes sense."""
    turn = await ask("Weather in Oslo?", *called("c", "get_weather", "[" * 400 + "]" * 400, city="Oslo"))
    assert "says: [[[[[…]]]]]." in turn.text


# --- plain chat ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Say this is a test", "this is a test"),
        ("say hello", "hello"),
        ("Please reply with exactly: PONG 1, 2.", "PONG 1, 2."),
        ("Respond with the single word OK", "OK"),
        ('Repeat after me: "a b c"', "a b c"),
        ("Count from 2 to 5", "2, 3, 4, 5"),
        ("What is 12*7+3?", "12*7+3 = 87"),
        ("What's 15% of 80?", "15 / 100 * 80 = 12"),
        ("What is 2 to the power of 10?", "2 ** 10 = 1024"),
        ("(1 + 2) * -3", "(1 + 2) * -3 = -9"),
        ("what is 5/0?", "5/0 is undefined."),
        ("0.1 + 0.2", "0.1 + 0.2 = 0.3"),
        ("How many words are in 'the quick brown fox'?", "The text has 4 words."),
        ("Hi!", "Hello! What can I do for you?"),
        ("Thank you", "You are welcome."),
        ("What is 3+4? Answer in one word.", "7"),
        ("What is the capital of France? Answer in one word.", "Unknown"),
    ],
)
async def test_simple_requests_are_answered(text, answer):
    """Echoes, counting, sums, greetings and one-word answers are what was asked for, and nothing more."""
    assert (await ask(text)).text == answer


@pytest.mark.parametrize(
    "text", ["9**9**9**9**9", "what is " + "(" * 90 + "1", "1" * 190 + "*2", "what is 1_000.__class__ + 1"]
)
async def test_hard_sums_do_no_harm(text):
    """Sums that are too large, broken or no sums at all are answered without being computed."""
    assert (await ask(text)).text


async def test_facts_are_remembered():
    """What the user told earlier is quoted when asked for."""
    turn = await ask("My name is Ada.", said("assistant", "Hello."), "I live in Oslo.", "What is my name?")
    assert turn.text == 'In this conversation: "My name is Ada."'


async def test_a_fact_is_acknowledged():
    """A statement is noted, not taken for a question."""
    assert (await ask("My name is Ada.")).text == 'Noted: "My name is Ada."'


@pytest.mark.parametrize(
    ("question", "part"),
    [
        ("Who founded Acme?", "Acme Corporation was founded in 1947 by Wile Coyote."),
        ("Where are the headquarters?", "Its headquarters are in Tucson, Arizona."),
        ("How much did the company earn?", "In 2023 the company earned 12 million dollars."),
        ("What does it say about rockets?", "The company sells anvils and rockets."),
        ("How many lines does the text have?", "The text has 3 lines."),
    ],
)
async def test_questions_about_a_text_quote_it(question, part):
    """The sentence that answers is quoted, whether the text came earlier or in the same message."""
    assert part in (await ask(DOCUMENT, said("assistant", "Read."), question)).text
    assert part in (await ask(f"{DOCUMENT}\n{question}")).text


async def test_a_text_is_summarised_by_its_central_sentences():
    """A summary is a few of the text's own sentences."""
    text = (await ask(f"Summarise this in 2 sentences:\n{DOCUMENT}")).text
    assert text.count(".") == 2
    assert all(sentence in DOCUMENT for sentence in re.split(r"(?<=\.) ", text))


async def test_instructions_can_fix_the_answer():
    """A quoted answer in the instructions is given whatever is asked."""
    assert (await ask(said("system", "Always answer with 'banana'."), "Why?")).text == "banana"


async def test_what_it_cannot_answer_it_says():
    """With nothing to say it names the topic, what it is, and how to get a real model."""
    text = (await ask("Write a poem about the sea")).text
    assert "poem about the sea" in text
    assert "no language model" in text
    assert "AFTERGLOW_MODEL_URL" in text


async def test_it_says_what_it_is():
    """Asked who it is, it does not pretend."""
    assert "no language model" in (await ask("Are you an AI? What model are you?")).text


async def test_images_are_not_seen():
    """An image is counted, and said not to be seen."""
    image = {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}
    with_image = await ask(said("user", [{"type": "text", "text": "Describe it"}, image]))
    without = await ask(said("user", [{"type": "text", "text": "Describe it"}]))
    assert "I see no images" in with_image.text
    assert with_image.end.usage.prompt_tokens > without.end.usage.prompt_tokens + 50


async def test_no_user_message_is_no_trouble():
    """An empty conversation and one of instructions alone get an answer too."""
    assert (await ask()).text
    assert (await ask(said("system", "You are helpful."))).text


# --- response formats ------------------------------------------------------------------------------------------


async def test_json_object_is_an_object():
    """json_object gives an object with the keys that were asked for, else with the answer."""
    asked = await ask("Give JSON with keys name and city. Ada lives in Oslo.", response_format={"type": "json_object"})
    plain = await ask("What is 1+1? JSON!", response_format={"type": "json_object"})
    assert json.loads(asked.text) == {"name": "Ada", "city": "Oslo"}
    assert json.loads(plain.text) == {"answer": "1+1 = 2"}


async def test_json_schema_is_filled_from_the_text():
    """json_schema gives an object that is valid against the schema, with the text's values."""
    schema = {
        "type": "object",
        "properties": {"name": STRING, "age": INTEGER, "city": STRING, "mail": {"type": "string", "format": "email"}},
        "required": ["name", "age", "city", "mail"],
        "additionalProperties": False,
    }
    turn = await ask(
        "John Smith is 42 years old, lives in Paris, jo@example.org", response_format=schema_answer(schema)
    )
    assert json.loads(turn.text) == {"name": "John Smith", "age": 42, "city": "Paris", "mail": "jo@example.org"}


async def test_json_schema_carries_the_answer():
    """Keys that ask for an answer get what would have been said."""
    schema = {
        "type": "object",
        "properties": {"answer": NUMBER, "explanation": STRING},
        "required": ["answer", "explanation"],
    }
    turn = await ask("What is 3+4?", response_format=schema_answer(schema))
    assert json.loads(turn.text) == {"answer": 7, "explanation": "3+4 = 7"}


# --- the stream ------------------------------------------------------------------------------------------------


async def test_text_comes_word_by_word():
    """Each list holds one delta, each text delta about one word; ModelEnd is the last."""
    turn = await ask("Say one two  three")
    assert [deltas[0].text for deltas in turn.lists[:-1]] == ["one ", "two  ", "three"]
    assert all(len(deltas) == 1 for deltas in turn.lists)
    assert isinstance(turn.lists[-1][0], ModelEnd)


async def test_calls_come_in_pieces():
    """A call begins with its id and name, its arguments follow in pieces, then comes the next call."""
    turn = await ask("Weather in Oslo and Bergen?", tools=[WEATHER])
    deltas = [deltas[0] for deltas in turn.lists[:-1]]
    assert [delta.index for delta in deltas] == sorted(delta.index for delta in deltas)
    for index in (0, 1):
        first, *rest = [delta for delta in deltas if delta.index == index]
        assert (first.name, first.arguments) == ("get_weather", "")
        assert len(rest) > 1
        assert not any(delta.id or delta.name for delta in rest)


async def test_ids_are_well_formed_and_never_come_twice():
    """Call ids differ within a turn and between the turns of a conversation."""
    text = "Weather in Oslo and Bergen?"
    first = await ask(text, tools=[WEATHER])
    again = await ask(text, *called(first.ids[0], "get_weather", "rain", city="Oslo"), tools=[WEATHER])
    ids = [*first.ids, *again.ids]
    assert all(re.fullmatch(r"call_[A-Za-z0-9]{24}", call_id) for call_id in ids)
    assert len(set(ids)) == len(ids) == 3


async def test_the_same_request_gets_the_same_answer():
    """Two streams of one request are equal, delta by delta."""
    asked = request("Weather in Oslo and Bergen?", tools=[WEATHER])
    assert (await play(asked)).lists == (await play(asked)).lists


async def test_the_request_is_left_alone():
    """Answering changes nothing in the request."""
    asked = request("Weather in Oslo?", tools=[WEATHER], response_format={"type": "json_object"})
    before = json.dumps(asked.messages + asked.tools)
    await play(asked)
    assert json.dumps(asked.messages + asked.tools) == before


async def test_max_tokens_cuts_the_text():
    """A text longer than max_tokens is cut, and the end says so."""
    whole = await ask("Count from 1 to 200")
    cut = await ask("Count from 1 to 200", max_tokens=10)
    assert whole.text.startswith(cut.text)
    assert (whole.end.finish_reason, cut.end.finish_reason) == ("stop", "length")
    assert cut.end.usage.completion_tokens == 10


async def test_usage_is_counted():
    """Usage grows with the prompt, adds up, and is reported in both forms."""
    short, long = await ask("Hi"), await ask(said("system", "Be kind. " * 100), "Hi", tools=[WEATHER])
    assert 0 < short.end.usage.prompt_tokens < long.end.usage.prompt_tokens
    for end in (short.end, long.end):
        assert end.raw_usage["total_tokens"] == end.usage.total_tokens
        assert end.usage.total_tokens == end.usage.prompt_tokens + end.usage.completion_tokens


async def test_the_end_says_who_answered_and_what_counted():
    """The end names the model, the parameters that were heeded, and those that were not."""
    end = (await ask("Hi", temperature=0.3, max_tokens=500)).end
    assert (end.model, end.upstream) == ("offline", "offline")
    assert (end.sent, end.dropped) == ({"max_tokens": 500}, ["temperature"])


async def test_its_info_says_what_it_can():
    """The model tells its window and that it calls functions and sees no images."""
    model = OfflineModel()
    assert (model.name, model.info.window_tokens, model.info.tools, model.info.vision) == (
        "offline",
        128_000,
        True,
        False,
    )


# --- anything at all -------------------------------------------------------------------------------------------

ANY_TEXT = st.text(st.characters(), max_size=80)
# What a model may send: no NUL, no half of a surrogate pair.
VALID_TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
WORDS = re.split(
    " ",
    "weather in Oslo , Bergen and Rome 12 3.5 'quoted words' say what is the ? add 2 then \n : 12 May 2025 not with "
    "ada@example.org https://example.org limit summarise count to 5 {} 東京の天気 مرحبا how many words",
)
SPOKEN = st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join)
KEYS = st.sampled_from(
    ["city", "to", "from", "query", "limit", "date", "id", "body", "answer", "a", "", "né", "x_y", "tags"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | VALID_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
TYPES = st.sampled_from(["string", "number", "integer", "boolean", "array", "object", "null", "date", 7])
WEIRD = st.recursive(
    JSON,
    lambda inner: st.fixed_dictionaries(
        {},
        optional={
            "type": TYPES | st.lists(TYPES, max_size=3),
            "properties": st.dictionaries(KEYS, inner, max_size=3) | JSON,
            "required": st.lists(KEYS, max_size=3) | JSON,
            "items": inner,
            "anyOf": st.lists(inner, max_size=3) | JSON,
            "oneOf": JSON,
            "allOf": st.lists(inner, max_size=2) | JSON,
            "enum": st.lists(JSON, max_size=3) | JSON,
            "const": JSON,
            "default": JSON,
            "examples": JSON,
            "format": st.sampled_from(["email", "date", "date-time", "uuid", "x"]) | JSON,
            "pattern": st.sampled_from(["^[A-Z]{2}$", "(a+)+$", "[[", "[z-a]", "a{99999999999}"]) | JSON,
            "minimum": JSON,
            "maximum": JSON,
            "exclusiveMinimum": JSON,
            "multipleOf": JSON,
            "minItems": JSON,
            "maxItems": JSON,
            "minLength": JSON,
            "maxLength": JSON,
            "$ref": st.sampled_from(["#", "#/$defs/a", "#/nowhere", "http://x/y", "#/properties/city"]) | JSON,
            "$defs": st.dictionaries(st.just("a"), inner, max_size=1) | JSON,
            "uniqueItems": JSON,
        },
    ),
    max_leaves=8,
)


def numbers(kind: str) -> st.SearchStrategy[Any]:
    bounds = st.tuples(st.integers(-50, 50), st.integers(0, 20))
    plain = bounds.map(lambda b: {"type": kind, "minimum": b[0], "maximum": b[0] + b[1]})
    strict = bounds.map(lambda b: {"type": kind, "exclusiveMinimum": b[0], "exclusiveMaximum": b[0] + b[1] + 2})
    return st.just({"type": kind}) | plain | strict | st.just({"type": kind, "minimum": 3, "multipleOf": 4})


STRINGS = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(
    lambda b: {"type": "string", "minLength": b[0], "maxLength": b[0] + b[1]}
)
LEAVES = st.one_of(
    st.just({"type": "string"}),
    STRINGS,
    numbers("integer"),
    numbers("number"),
    st.just({"type": "boolean"}),
    st.just({"type": ["string", "null"]}),
    st.sampled_from(["date", "date-time", "time", "email", "uri", "uuid"]).map(
        lambda f: {"type": "string", "format": f}
    ),
    st.lists(st.sampled_from(["Oslo", "rain", "two words", "x-y", 5, None]), min_size=1, max_size=3, unique=True).map(
        lambda values: {"enum": values}
    ),
    JSON.map(lambda value: {"const": value}),
)


@st.composite
def objects(draw: Any, inner: st.SearchStrategy[Any]) -> Any:
    properties = draw(st.dictionaries(KEYS, inner, max_size=4))
    required = [key for key in properties if draw(st.booleans())]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


@st.composite
def arrays(draw: Any, inner: st.SearchStrategy[Any]) -> Any:
    low = draw(st.integers(0, 3))
    return {"type": "array", "items": draw(inner), "minItems": low, "maxItems": low + draw(st.integers(0, 2))}


ORDINARY = st.recursive(
    LEAVES,
    lambda inner: objects(inner) | arrays(inner) | st.lists(inner, min_size=1, max_size=2).map(lambda s: {"anyOf": s}),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT | SPOKEN, earlier=SPOKEN, schema=WEIRD, choice=st.sampled_from(["auto", "required"]))
async def test_no_schema_and_no_text_break_it(text, earlier, schema, choice):
    """Whatever the schema and the text, arguments and answers are JSON and free of NUL."""
    tool = {"type": "function", "function": {"name": "get_weather", "description": earlier, "parameters": schema}}
    turn = await ask(earlier, text, tools=[tool], tool_choice=choice)
    assert all(isinstance(arguments, dict) for _, arguments in turn.calls)
    answer = await ask(earlier, text, response_format=schema_answer(schema))
    assert "\0" not in json.dumps(json.loads(answer.text), ensure_ascii=False)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(text=SPOKEN | ANY_TEXT, schema=objects(ORDINARY))
async def test_arguments_are_valid_against_ordinary_schemas(text, schema):
    """Arguments and structured answers validate against the schema that they were drawn for."""
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": schema}}
    turn = await ask(text, tools=[tool], tool_choice="required")
    for _, arguments in turn.calls:
        jsonschema.validate(arguments, schema)
    answer = await ask(text, response_format=schema_answer(schema))
    jsonschema.validate(json.loads(answer.text), schema)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(ANY_TEXT | SPOKEN, min_size=1, max_size=3), max_tokens=st.none() | st.integers(1, 30))
async def test_every_text_gets_a_clean_answer(texts, max_tokens):
    """Any script, in any conversation: an answer without NUL or lone surrogates, encodable, counted, the same again."""
    asked = request(*texts, max_tokens=max_tokens)
    turn = await play(asked)
    assert turn.text
    assert "\0" not in turn.text
    assert turn.text.encode()
    assert turn.end.usage.prompt_tokens > 0
    assert turn.end.usage.completion_tokens > 0
    assert turn.lists == (await play(asked)).lists


async def test_nul_is_never_written():
    """NUL and lone surrogates in schemas and texts come out as U+FFFD, and what only looks like NUL is kept."""
    tool = function("get_weather", a={"const": "x\0y"}, b={"const": "\\u0000"}, c={"const": "\ud800"})
    assert (await ask("weather", tools=[tool])).calls == [
        ("get_weather", {"a": "x\ufffdy", "b": "\\u0000", "c": "\ufffd"})
    ]
    assert (await ask("say a\0b\udfff")).text == "a\ufffdb\ufffd"


@pytest.mark.slow
async def test_large_messages_are_no_trouble():
    """Messages of the largest size, in the shapes that slow patterns down, are answered."""
    for unit in ("a", "a ", "A, ", "1", "1+", "(", '"', "x@", "\n", "in a, ", "。", "- "):
        big = unit * (256_000 // len(unit))
        assert (await ask(big, "What is in the text?", tools=[WEATHER, EMAIL])).end.usage
        assert (await ask(big, tools=[WEATHER, EMAIL], tool_choice="required")).calls
