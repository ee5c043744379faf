"""Reading the code of a call while its JSON arguments are still being written."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afterglow.runs.turn import Call, CodeText


def read(arguments: str, step: int) -> tuple[list[str], str]:
    """The pieces that come of arguments given `step` characters at a time, and the whole."""
    code = CodeText()
    pieces = [code.feed(arguments[at : at + step]) for at in range(0, len(arguments), step)]
    return [*pieces, code.end()], code.text


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), st.integers(1, 9), st.booleans())
def test_the_pieces_are_the_code(source: str, step: int, ascii_only: bool) -> None:
    """However the arguments are cut, the pieces put together are the code."""
    pieces, whole = read(json.dumps({"code": source}, ensure_ascii=ascii_only), step)
    assert "".join(pieces) == whole == source


def test_the_code_comes_as_it_is_written() -> None:
    """Nothing waits for the end, except an escape that is not complete."""
    code = CodeText()
    assert [code.feed(piece) for piece in ('{"co', 'de": "a', "\\", "n", "\\ud83d", "\\ude00", 'b"}')] == [
        *("", "a", "", "\n", "", "😀", "b")
    ]


@pytest.mark.parametrize(
    ("arguments", "source"),
    [
        ("print(1)", "print(1)"),
        ('{"language": "python", "code": "x"}', "x"),
        ('{"code": "re.match(\'\\d\')\nx', "re.match('\\d')\nx"),
        ('{"code": 7}', "7"),
        ('{"source": "x"}', '{"source": "x"}'),
        ('{"code": "a\\u0000b"}', "a\ufffdb"),
        ('{"code": "\\ud83dx"}', "\ufffdx"),
        ('{"other": 1, "code": "\\ud83d"}', "\ufffd"),
        ('{"code":"', ""),
        ("", ""),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_other_forms_are_understood(arguments: str, source: str) -> None:
    """Bare code, other keys first, forgotten escapes and half pairs: the code is what the model meant."""
    assert read(arguments, 3)[1] == source


def test_output_is_told_as_deltas() -> None:
    """Texts in a row are one output; a picture is one of its own; the deltas put together are the outputs."""
    call = Call("call_1", "python", "code_interpreter")
    deltas = [call.print("a"), call.print("b"), call.show("file-1"), call.print("c")]
    assert [delta["outputs"][0]["index"] for delta in deltas] == [0, 0, 1, 2]
    assert call.outputs == [
        {"type": "logs", "logs": "ab"},
        {"type": "image", "image": {"file_id": "file-1"}},
        {"type": "logs", "logs": "c"},
    ]
