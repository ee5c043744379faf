"""What the model sees: what is kept when it is too much, and how stored things look in chat form."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afterglow.calibration import Calibration
from afterglow.objects import Json, LastError, Message, RunStep, TruncationStrategy
from afterglow.runs.context import (
    EARLIER_OUTPUT_CHARS,
    KEEP_SHARE,
    STORED_IMAGE,
    TOKENS_PER_MESSAGE,
    Cut,
    Turn,
    Window,
    calls_turn,
    chat_messages,
    completion_reserve,
    estimate_tokens,
    fixed_tokens,
    message_turn,
)
from afterglow.tools.function import BUILT_IN, chat_tool_choice, offer

AUTO = TruncationStrategy(type="auto")
RUN = "run_now"
NAMES = {"code_interpreter": "python", "file_search": "file_search"}
drawn = settings(max_examples=150, deadline=None)


def newest(count: int) -> TruncationStrategy:
    return TruncationStrategy(type="last_messages", last_messages=count)


def turn(seq: int, role: str, tokens: int = 10, *, own: bool = False) -> Turn:
    return Turn((1000 + seq // 3, seq), f"{role}_{seq}", role, [{"role": role, "content": "x"}], tokens, own)


def history(roles: str, tokens: int = 10, *, own: str = "") -> list[Turn]:
    """Turns oldest first: `u`ser, `a`ssistant and `c`alls; own: those of the run in hand, which are the newest."""
    words = {"u": "user", "a": "assistant", "c": "calls"}
    return [turn(seq, words[letter], tokens, own=seq > len(roles)) for seq, letter in enumerate(roles + own, start=1)]


def cut(
    turns: list[Turn], budget: int, strategy: TruncationStrategy = AUTO, *, factor: float = 1.0, kept_from: int = 0
) -> Cut:
    """Read newest first until the window is full, as the loop does."""
    window = Window(strategy, budget, factor, kept_from)
    for one in reversed(turns):
        if window.full:
            break
        window.add(one)
    return window.cut()


def seqs(turns: list[Turn]) -> list[int]:
    return [one.place[1] for one in turns]


def newest_user(turns: list[Turn]) -> int:
    return max((one.place[1] for one in turns if one.role == "user"), default=0)


@st.composite
def histories(draw: st.DrawFn) -> list[Turn]:
    """Anything a thread may hold; what the run in hand has made comes last."""
    earlier = draw(
        st.lists(st.tuples(st.sampled_from(["user", "assistant", "calls"]), st.integers(1, 60)), max_size=25)
    )
    made = draw(st.lists(st.tuples(st.sampled_from(["assistant", "calls"]), st.integers(1, 60)), max_size=4))
    return [
        turn(seq, role, tokens, own=seq > len(earlier)) for seq, (role, tokens) in enumerate(earlier + made, start=1)
    ]


@st.composite
def conversations(draw: st.DrawFn) -> list[Turn]:
    """Threads as they usually are: a user's message, then calls, then the answer."""
    rounds = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(5, 40)), min_size=1, max_size=30))
    roles = [role for calls, _ in rounds for role in ("user", *["calls"] * calls, "assistant")]
    tokens = draw(st.lists(st.integers(1, 40), min_size=len(roles), max_size=len(roles)))
    return [turn(seq, role, size) for seq, (role, size) in enumerate(zip(roles, tokens, strict=True), start=1)]


# --- truncation auto -------------------------------------------------------------------------------------------


@drawn
@given(histories(), st.integers(1, 400), st.floats(0.5, 3.0), st.integers(0, 1))
def test_auto_keeps_what_must_stay_in_order(turns: list[Turn], budget: int, factor: float, before: int):
    """Turns keep their order; all of the run's own and the newest user message are among them; the rest is told of."""
    kept_from = before * newest_user(turns)
    decided = cut(turns, budget, factor=factor, kept_from=kept_from)
    kept = seqs(decided.turns)
    assert kept == sorted(kept)
    assert {one.place[1] for one in turns if one.own} <= set(kept)
    assert not newest_user(turns) or newest_user(turns) in kept
    assert not set(decided.left_out) & {one.id for one in decided.turns}
    assert decided.left_out == [one.id for one in turns if one.id in set(decided.left_out)]


@drawn
@given(histories(), st.integers(1, 400), st.floats(0.5, 3.0))
def test_auto_fits_the_budget(turns: list[Turn], budget: int, factor: float):
    """What is kept fits, unless the turns since the newest user message alone do not; then nothing else is kept."""
    decided = cut(turns, budget, factor=factor)
    assert decided.tokens >= sum(one.tokens for one in decided.turns) * factor
    assert decided.tokens <= budget or min(seqs(decided.turns)) >= newest_user(turns)


@drawn
@given(histories(), st.integers(1, 400))
def test_auto_reads_no_further_than_it_must(turns: list[Turn], budget: int):
    """Once the window is full, older turns would not change what is kept."""
    window = Window(AUTO, budget)
    for one in reversed(turns):
        window.add(one)
    assert seqs(window.cut().turns) == seqs(cut(turns, budget).turns)


@drawn
@given(histories(), st.integers(1, 400))
def test_what_fits_is_kept_whole(turns: list[Turn], budget: int):
    """Nothing is left out of a thread that fits."""
    whole = sum(one.tokens for one in turns)
    decided = cut(turns, max(budget, whole))
    assert (decided.turns, decided.left_out, decided.kept_from, decided.tokens) == (turns, [], 0, whole)


@drawn
@given(conversations(), st.integers(60, 400))
def test_the_history_begins_with_a_user(turns: list[Turn], budget: int):
    """A cut history begins where a user speaks, not with an answer to what is no longer there."""
    decided = cut(turns, budget)
    assert decided.turns[0].role == "user"


@drawn
@given(conversations(), st.integers(170, 600))
def test_old_turns_go_in_blocks(turns: list[Turn], budget: int):
    """Turn after turn, the history starts where it did, until it no longer fits; then it is cut well below that."""
    start, kept_from = 1, 0
    for length in range(1, len(turns) + 1):
        thread = turns[:length]
        decided = cut(thread, budget, kept_from=kept_from)
        kept_from = decided.kept_from
        if decided.turns[0].place[1] != start:
            assert sum(one.tokens for one in thread[start - 1 :]) > budget
            start = decided.turns[0].place[1]
            assert decided.tokens <= budget * KEEP_SHARE or start == newest_user(thread)
        assert seqs(decided.turns) == list(range(start, length + 1))


def test_the_prefix_holds_for_many_turns():
    """A conversation of equal turns is cut once in many turns, not with each."""
    starts = []
    kept_from = 0
    for length in range(1, 200, 2):
        decided = cut(history("ua" * 100)[:length], 200, kept_from=kept_from)
        kept_from = decided.kept_from
        starts.append(decided.turns[0].place[1])
    assert starts == sorted(starts)
    assert len(set(starts)) <= len(starts) / 3


def test_a_thread_that_became_short_is_seen_whole_again():
    """When enough was deleted, the history no longer starts where the last call's did."""
    decided = cut(history("uaua"), 1000, kept_from=3)
    assert (seqs(decided.turns), decided.kept_from) == ([1, 2, 3, 4], 0)


def test_a_thread_without_a_user_is_cut_too():
    """The assistant's messages alone are kept from the newest on."""
    assert seqs(cut(history("aaaa", own="c"), 1000).turns) == [1, 2, 3, 4, 5]


def test_an_empty_thread_is_an_empty_history():
    """Nothing to say is nothing left out."""
    assert cut([], 100) == Cut(turns=[], kept_from=0, left_out=[], tokens=0)


def test_calibration_counts():
    """With a model whose tokens are smaller than we think, less is kept; each size is rounded up."""
    assert seqs(cut(history("ua" * 5), 100).turns) == list(range(1, 11))
    decided = cut(history("ua" * 5), 100, factor=1.51)
    assert (seqs(decided.turns), decided.tokens) == ([7, 8, 9, 10], 64)
    assert (decided.kept_from, decided.left_out) == (7, ["assistant_4", "user_5", "assistant_6"])


def test_answers_after_the_newest_user_message_can_be_left_out():
    """What must stay is the newest user message and what the run made, not what other runs wrote in between."""
    decided = cut(history("u" + "a" * 50, own="c"), 100)
    assert decided.tokens <= 100
    assert {1, 52} <= set(seqs(decided.turns))


def test_the_newest_user_message_stays_when_newer_ones_were_deleted():
    """A history that started with a message that is gone does not start behind the user's newest."""
    assert 1 in seqs(cut(history("uaaaaaaaa"), 100, kept_from=5).turns)


def test_where_the_history_starts_is_told_even_when_it_does_not_fit():
    """`kept_from` is 0 only when nothing was left out, read or not."""
    assert cut(history("uaua" + "u"), 5).kept_from == 5


# --- truncation last_messages ----------------------------------------------------------------------------------


@drawn
@given(histories().map(lambda turns: [one for one in turns if not one.own]), st.integers(1, 8), st.integers(1, 50))
def test_last_messages_keeps_the_newest_n(turns: list[Turn], count: int, budget: int):
    """Exactly the n newest messages and the calls among them, whatever their size."""
    messages = [one for one in turns if one.role != "calls"]
    kept = cut(turns, budget, newest(count), kept_from=3).turns
    assert [one for one in kept if one.role != "calls"] == messages[-count:]
    first = messages[-count] if len(messages) >= count else None
    assert kept == [one for one in turns if first is None or one.place >= first.place]


def test_auto_has_no_count():
    """`last_messages` beside `auto` says nothing."""
    strategy = TruncationStrategy(type="auto", last_messages=1)
    assert seqs(cut(history("uaua"), 1000, strategy).turns) == [1, 2, 3, 4]


@pytest.mark.parametrize("own", ["c", "cc", *("ac" * count for count in (1, 2, 3))])
def test_last_messages_are_those_before_the_run(own: str):
    """What the run itself makes is kept beside them, all of it, so that its second call sees what its first saw."""
    assert seqs(cut(history("uauau", own=own), 1000, newest(2)).turns) == list(range(4, 6 + len(own)))


# --- sizes -----------------------------------------------------------------------------------------------------


@drawn
@given(st.text(), st.text())
def test_estimates_grow_with_the_text(text: str, more: str):
    """A longer text is never fewer tokens, and any text is some."""
    assert estimate_tokens(text) <= estimate_tokens(text + more)
    assert (estimate_tokens(text) > 0) == bool(text)


def test_estimates_go_by_script():
    """An English word is about a token, a Chinese character more than half of one."""
    assert estimate_tokens("Hello, how are you today?") == 7
    assert estimate_tokens("今天天气怎么样") == 9
    assert estimate_tokens("a今") == 2


@pytest.mark.parametrize(
    ("window", "asked", "largest", "reserve"),
    [
        (128_000, None, None, 4096),
        (128_000, 1000, 8192, 1000),
        (128_000, None, 8192, 8192),
        (8192, None, None, 2048),
        (8192, 100_000, None, 2048),
    ],
)
def test_the_answers_reserve(window: int, asked: int | None, largest: int | None, reserve: int):
    """What the run allows, else what the model can, else 4,096 tokens; never more than a quarter of the window."""
    assert completion_reserve(window, asked, largest) == reserve


def test_what_is_fixed_is_counted_in_parts():
    """Instructions, tools and format each have a size, and none when there are none."""
    assert fixed_tokens("", [], None) == {"instructions": 0, "tools": 0, "response_format": 0}
    parts = fixed_tokens("Be brief.", [{"type": "function"}], {"type": "json_object"})
    assert parts["instructions"] == TOKENS_PER_MESSAGE + estimate_tokens("Be brief.")
    assert parts["tools"] > 0
    assert parts["response_format"] > 0


# --- calibration -----------------------------------------------------------------------------------------------


def test_calibration_starts_with_the_first_report_and_follows_slowly():
    """The first report is believed, later ones by their weight; each model has its own factor."""
    calibration = Calibration()
    assert calibration.factor("m") == 1.0
    calibration.learn("m", 1000, 1200)
    assert calibration.factor("m") == pytest.approx(1.2)
    calibration.learn("m", 1000, 2200)
    assert calibration.factor("m") == pytest.approx(1.5)
    assert calibration.factor("other") == 1.0


@pytest.mark.parametrize(("estimated", "reported"), [(199, 1000), (1000, 0), (1000, -1), (0, 10)])
def test_calibration_ignores_what_teaches_nothing(estimated: int, reported: int):
    """A short prompt and a missing report change no factor."""
    calibration = Calibration()
    calibration.learn("m", estimated, reported)
    assert calibration.factor("m") == 1.0


@drawn
@given(st.lists(st.tuples(st.integers(200, 10**6), st.integers(1, 10**7)) | st.none(), max_size=20))
def test_calibration_stays_within_bounds(reports: list[tuple[int, int] | None]):
    """Whatever servers report, and however often a prompt overflows, the factor stays between its bounds."""
    calibration = Calibration()
    for report in reports:
        before = calibration.factor("m")
        if report:
            calibration.learn("m", *report)
        else:
            calibration.overflowed("m")
            assert calibration.factor("m") >= before
        assert Calibration.LOWEST <= calibration.factor("m") <= Calibration.HIGHEST


# --- messages in chat form -------------------------------------------------------------------------------------


def message(*content: Json, role: Any = "user", run_id: str | None = None) -> Message:
    return Message(id="msg_1", created_at=1, thread_id="thread_1", role=role, content=list(content), run_id=run_id)


def text(value: str) -> Json:
    return {"type": "text", "text": {"value": value, "annotations": []}}


def image(url: str, detail: str = "low") -> Json:
    return {"type": "image_url", "image_url": {"url": url, "detail": detail}}


IMAGE_FILE: Json = {"type": "image_file", "image_file": {"file_id": "file-1", "detail": "auto"}}


def chat_of(stored: Message, *, vision: bool = True) -> Any:
    made = message_turn((1, 1), stored, RUN, vision=vision)
    assert made is not None
    assert made.tokens > TOKENS_PER_MESSAGE
    (only,) = made.chat
    assert only["role"] == stored.role == made.role
    return only["content"]


def test_texts_become_one_text():
    """Text parts are joined by lines; empty ones say nothing."""
    assert chat_of(message(text("one"), text(""), text("two"))) == "one\ntwo"


def test_images_are_passed_to_models_that_see():
    """A user's image URL is sent beside the text, in parts."""
    picture = image("https://a.test/x.png")
    assert chat_of(message(text("See"), picture)) == [{"type": "text", "text": "See"}, picture]


def test_stored_images_are_passed_as_what_stands_for_them():
    """A user's image file is sent as a URL that stands for its bytes, and counts as an image URL does."""
    stored = {"type": "image_file", "image_file": {"file_id": "file-1", "detail": "low"}}
    assert chat_of(message(stored)) == [image(STORED_IMAGE + "file-1")]
    tokens = [
        message_turn((1, 1), message(part), RUN, vision=True).tokens for part in (stored, image("https://a.test"))
    ]  # type: ignore[union-attr]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("stored", "vision", "said"),
    [
        (message(image("https://a.test/x.png")), False, "[image: https://a.test/x.png]"),
        (message(image("https://a.test/x.png"), role="assistant"), True, "[image: https://a.test/x.png]"),
        (message(image("data:image/png;base64," + "A" * 200)), False, "[image: inline data]"),
        (message(IMAGE_FILE), False, "[image: file-1]"),
        (message(IMAGE_FILE, role="assistant"), True, "[image: file-1]"),
        (message({"type": "refusal", "refusal": "No."}, role="assistant"), True, "No."),
    ],
)
def test_what_cannot_be_sent_is_named(stored: Message, vision: bool, said: str):
    """An image that the model cannot be given is told of in words, and a refusal is what the assistant said."""
    assert chat_of(stored, vision=vision) == said


@pytest.mark.parametrize("content", [[], [text("")]])
def test_a_message_that_says_nothing_is_no_turn(content: list[Json]):
    """An answer that broke off before its first word is not shown to the model."""
    assert message_turn((1, 1), message(*content), RUN, vision=True) is None


def test_a_message_of_the_run_is_its_own():
    """Own turns are those of the run in hand."""
    for run_id, own in ((RUN, True), ("run_before", False), (None, False)):
        made = message_turn((1, 1), message(text("x"), run_id=run_id), RUN, vision=True)
        assert made is not None
        assert made.own is own


# --- calls in chat form ----------------------------------------------------------------------------------------


def step(*calls: Json, run_id: str = RUN, error: str | None = None) -> RunStep:
    return RunStep(
        id="step_1",
        created_at=1,
        run_id=run_id,
        assistant_id="asst_1",
        thread_id="thread_1",
        type="tool_calls",
        step_details={"type": "tool_calls", "tool_calls": list(calls)},
        last_error=LastError("server_error", error) if error else None,
    )


def function_call(call_id: str, output: str | None, arguments: str = '{"a":1}') -> Json:
    function = {"name": "f", "arguments": arguments, "output": output}
    return {"id": call_id, "type": "function", "function": function}


def code_call(*logs: str) -> Json:
    outputs: list[Json] = [{"type": "logs", "logs": said} for said in logs]
    outputs.append({"type": "image", "image": {"file_id": "file-1"}})
    return {"id": "call_code", "type": "code_interpreter", "code_interpreter": {"input": "1+1", "outputs": outputs}}


SEARCH_CALL: Json = {"id": "call_search", "type": "file_search", "file_search": {"x-queries": ["what"], "results": []}}
FOUND = {"call_search": "what was found"}


def chat_of_calls(stored: RunStep) -> list[Json]:
    made = calls_turn((1, 1), stored, RUN, NAMES, FOUND)
    assert made is not None
    assert (made.role, made.id, made.own) == ("calls", stored.id, stored.run_id == RUN)
    return made.chat


def test_calls_and_outputs_are_one_turn():
    """All calls of a step are one assistant message, and their outputs follow in the same order."""
    asked, *outputs = chat_of_calls(step(function_call("call_1", "one"), code_call("2"), SEARCH_CALL))
    assert (asked["role"], asked["content"]) == ("assistant", None)
    called = [(call["id"], call["function"]["name"]) for call in asked["tool_calls"]]
    assert called == [("call_1", "f"), ("call_code", "python"), ("call_search", "file_search")]
    assert [json.loads(call["function"]["arguments"]) for call in asked["tool_calls"]] == [
        {"a": 1},
        {"code": "1+1"},
        {"queries": ["what"]},
    ]
    assert [(said["role"], said["tool_call_id"]) for said in outputs] == [("tool", name) for name, _ in called]
    assert [said["content"] for said in outputs] == ["one", "2\n[image: file-1]", "what was found"]


def test_a_call_without_output_is_not_shown():
    """Nor are those beside it: the model would refuse calls that nothing answers."""
    assert calls_turn((1, 1), step(function_call("call_1", "x"), function_call("call_2", None)), RUN, NAMES) is None


def test_empty_arguments_and_outputs_are_made_sense_of():
    """A function called with nothing has an empty object, and code that printed nothing says so."""
    asked, output = chat_of_calls(step(function_call("call_1", "", arguments="")))
    assert asked["tool_calls"][0]["function"]["arguments"] == "{}"
    assert output["content"] == ""
    silent: Json = {"id": "call_1", "type": "code_interpreter", "code_interpreter": {"input": "x=1", "outputs": []}}
    assert chat_of_calls(step(silent))[1]["content"] == "(no output)"


def test_a_tool_that_failed_says_why():
    """The step's error stands in for the output of code that shows none, and not for what a search beside it found."""
    silent: Json = {"id": "call_1", "type": "code_interpreter", "code_interpreter": {"input": "x=1", "outputs": []}}
    _, *outputs = chat_of_calls(step(SEARCH_CALL, silent, error="No disk."))
    assert [said["content"] for said in outputs] == ["what was found", "ERROR: No disk."]


def test_outputs_of_earlier_runs_are_clipped():
    """The run's own outputs are whole; those of earlier runs are cut, and the cut is told."""
    output = "x" * (EARLIER_OUTPUT_CHARS + 5)
    assert chat_of_calls(step(function_call("call_1", output)))[1]["content"] == output
    clipped = chat_of_calls(step(function_call("call_1", output), run_id="run_before"))[1]["content"]
    assert clipped.count("x") == EARLIER_OUTPUT_CHARS
    assert "\n[5 characters left out]\n" in clipped
    assert calls_turn((1, 1), step(function_call("call_1", output)), RUN, NAMES).tokens > estimate_tokens(output)


def test_searches_of_earlier_runs_are_not_shown():
    """File search results are seen within their own run only; other calls of the step stay."""
    assert calls_turn((1, 1), step(SEARCH_CALL, run_id="run_before"), RUN, NAMES) is None
    asked, _ = chat_of_calls(step(SEARCH_CALL, function_call("call_1", "x"), run_id="run_before"))
    assert [call["id"] for call in asked["tool_calls"]] == ["call_1"]


# --- the prompt ------------------------------------------------------------------------------------------------


def said_turn(seq: int, words: str, *, own: bool) -> Turn:
    stored = message(text(words), role="assistant", run_id=RUN if own else "run_before")
    made = message_turn((1, seq), stored, RUN, vision=True)
    assert made is not None
    return made


def called_turn(seq: int, *, own: bool) -> Turn:
    made = calls_turn((1, seq), step(function_call("call_1", "out"), run_id=RUN if own else "run_before"), RUN, NAMES)
    assert made is not None
    return made


def test_a_text_and_the_calls_after_it_are_one_message():
    """What the run's model said before it called goes back as the one message that it was."""
    said, called = said_turn(1, "Let me see.", own=True), called_turn(2, own=True)
    asked, output = chat_messages("", [said, called])
    assert asked == {"role": "assistant", "content": "Let me see.", "tool_calls": called.chat[0]["tool_calls"]}
    assert output == called.chat[1]
    assert "tool_calls" not in said.chat[0]


@pytest.mark.parametrize(("said", "called"), [(False, True), (True, False)])
def test_a_text_of_another_run_is_not_joined(said: bool, called: bool):
    """Only what one run said and called becomes one message."""
    turns = [said_turn(1, "Done.", own=said), called_turn(2, own=called)]
    assert chat_messages("", turns) == turns[0].chat + turns[1].chat


def test_calls_are_not_joined_to_calls():
    """Two steps of calls are two messages, each with its outputs after it."""
    turns = [called_turn(1, own=True), called_turn(2, own=True)]
    assert chat_messages("", turns) == turns[0].chat + turns[1].chat


def test_instructions_come_first_if_there_are_any():
    """They are the system's message, and none when empty."""
    assert chat_messages("Be brief.", []) == [{"role": "system", "content": "Be brief."}]
    assert chat_messages("", []) == []


@drawn
@given(histories())
def test_nothing_is_lost_in_the_prompt(turns: list[Turn]):
    """Every call is followed by all of its outputs, and every turn's text is there, in order."""
    shown = [
        called_turn(one.place[1], own=one.own) if one.role == "calls" else said_turn(one.place[1], one.id, own=one.own)
        for one in turns
    ]
    messages = chat_messages("", shown)
    assert [said["content"] for said in messages if said["role"] == "assistant" and said["content"]] == [
        one.id for one in turns if one.role != "calls"
    ]
    for before, said in zip([{}, *messages], [*messages, {}], strict=True):
        assert ("tool_calls" in before) == (said.get("role") == "tool")


# --- tools -----------------------------------------------------------------------------------------------------


def tools(*functions: str, built_in: tuple[str, ...] = ("code_interpreter", "file_search")) -> list[Json]:
    named = [{"type": "function", "function": {"name": name, "strict": False}} for name in functions]
    return [*named, *({"type": kind} for kind in built_in)]


@pytest.mark.parametrize(
    ("functions", "names"),
    [
        ([], {"code_interpreter": "python", "file_search": "file_search"}),
        (["python"], {"code_interpreter": "code_interpreter", "file_search": "file_search"}),
        (["file_search"], {"code_interpreter": "python", "file_search": "search_files"}),
        (
            ["python", "code_interpreter", "file_search", "search_files"],
            {"code_interpreter": "run_python_code", "file_search": "search_attached_files"},
        ),
    ],
)
def test_a_callers_function_keeps_its_name(functions: list[str], names: dict[str, str]):
    """When a function bears the name of a built-in tool, the tool takes another, wherever either stands."""
    for given_tools in (tools(*functions), tools(*functions)[::-1]):
        offered = offer(given_tools)
        assert offered.names == names
        assert offered.kinds == {**dict.fromkeys(functions, "function"), **{name: kind for kind, name in names.items()}}
        assert len(offered.tools) == len(given_tools) == len(offered.kinds)


def test_a_name_is_found_when_all_are_taken():
    """A caller whose functions bear every name that we have still gets both tools."""
    taken = [name for built_in in BUILT_IN.values() for name in built_in.names]
    offered = offer(tools(*taken))
    assert len(set(offered.kinds)) == len(taken) + len(BUILT_IN)


def test_a_built_in_tool_is_offered_once():
    """However often an assistant lists it."""
    assert len(offer([{"type": "file_search"}, {"type": "file_search"}]).tools) == 1


def test_a_function_is_sent_as_it_was_given():
    """Without what is null or merely a default; vendor keys are for clients, not for the model."""
    definition = {"name": "f", "description": None, "parameters": {"type": "object"}, "strict": False}
    (sent,) = offer([{"type": "function", "function": definition, "x-mine": 1}]).tools
    assert sent == {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    (strict,) = offer([{"type": "function", "function": {**definition, "strict": True}}]).tools
    assert strict["function"]["strict"] is True


@pytest.mark.parametrize(
    ("choice", "sent"),
    [
        (None, None),
        ("required", "required"),
        ({"type": "function", "function": {"name": "python"}}, {"type": "function", "function": {"name": "python"}}),
        ({"type": "code_interpreter"}, {"type": "function", "function": {"name": "code_interpreter"}}),
        ({"type": "file_search"}, None),
    ],
)
def test_a_tool_choice_names_what_was_offered(choice: Any, sent: Any):
    """A choice of a built-in tool becomes the name under which it is offered, and nothing when it is not."""
    assert chat_tool_choice(choice, offer(tools("python", built_in=("code_interpreter",)))) == sent


def test_there_is_no_choice_without_tools():
    """Servers refuse a tool_choice that comes without tools."""
    assert chat_tool_choice("required", offer([])) is None
