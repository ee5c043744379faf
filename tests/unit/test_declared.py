"""Assistants that a file declares are in the store at each start, as the file says."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from afterglow.contracts import House, Transaction
from afterglow.declared import declare_assistants
from afterglow.errors import ConfigError
from afterglow.rows.assistants import AssistantRow, delete_assistant, get_assistant, list_assistants, put_assistant
from afterglow.settings import Settings
from afterglow.store.sqlite import SqliteStore
from afterglow.testing import SetClock

TUTOR = """
[assistants.asst_tutor]
model = "gpt-4o"
name = "Tutor"
instructions = "Explain."
temperature = 0.2
tools = [{ type = "function", function = { name = "grade", parameters = { type = "object" } }, x-cache = 1 }]
metadata = { team = "läs" }
"""


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    store = SqliteStore(tmp_path / "test.db", readers=1)
    plugs: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(House))
    yield House(**plugs | {"settings": Settings(), "clock": SetClock(), "store": store})
    await store.close()


def written(folder: Path, text: str) -> str:
    path = folder / "assistants.toml"
    path.write_text(text, "utf-8")
    return str(path)


async def stored(house: House, assistant_id: str, project: str = "default") -> AssistantRow | None:
    async def work(tx: Transaction) -> AssistantRow | None:
        return await get_assistant(tx, project, assistant_id)

    return await house.store.read(work)


async def must_have(house: House, assistant_id: str, project: str = "default") -> AssistantRow:
    row = await stored(house, assistant_id, project)
    assert row is not None
    return row


async def test_a_declared_assistant_is_there_under_its_id(house: House, tmp_path: Path):
    """What the file says is stored as a create request would store it, under the id that the file gives."""
    assert await declare_assistants(house, written(tmp_path, TUTOR)) == 1
    row = await must_have(house, "asst_tutor")
    assert row.declared
    assert row.asked.temperature == 0.2
    assert row.asked.top_p is None
    assert msgspec.to_builtins(row.assistant) == {
        "id": "asst_tutor",
        "object": "assistant",
        "created_at": 1_700_000_000,
        "name": "Tutor",
        "description": None,
        "model": "gpt-4o",
        "instructions": "Explain.",
        "tools": [
            {
                "type": "function",
                "function": {"name": "grade", "parameters": {"type": "object"}, "strict": False},
                "x-cache": 1,
            }
        ],
        "tool_resources": {},
        "metadata": {"team": "läs"},
        "temperature": 0.2,
        "top_p": 1.0,
        "response_format": "auto",
        "reasoning_effort": None,
    }


async def test_a_start_with_the_same_file_writes_nothing(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An assistant that is as declared is left untouched, and keeps its creation time."""
    path = written(tmp_path, TUTOR)
    await declare_assistants(house, path)
    house.clock.time += 60

    async def refuse(*_: object) -> None:
        raise AssertionError("nothing has changed, so nothing is written")

    monkeypatch.setattr("afterglow.declared.put_assistant", refuse)
    await declare_assistants(house, path)
    assert (await must_have(house, "asst_tutor")).assistant.created_at == 1_700_000_000


async def test_a_changed_file_replaces_and_keeps_the_creation_time(house: House, tmp_path: Path):
    """What changed in the file changes in the store; `created_at` and the place in lists stay."""
    await declare_assistants(house, written(tmp_path, TUTOR))
    house.clock.time += 60
    await declare_assistants(house, written(tmp_path, TUTOR.replace("gpt-4o", "gpt-4.1")))
    row = await must_have(house, "asst_tutor")
    assert row.assistant.model == "gpt-4.1"
    assert row.assistant.created_at == 1_700_000_000


async def test_the_file_wins_over_what_callers_changed(house: House, tmp_path: Path):
    """A declared assistant that was modified, or deleted, through the API is as declared after the next start."""
    path = written(tmp_path, TUTOR)
    await declare_assistants(house, path)
    row = await must_have(house, "asst_tutor")
    row.assistant.name = "Renamed"
    await house.store.write(lambda tx: put_assistant(tx, "default", row, 0))
    await declare_assistants(house, path)
    assert (await must_have(house, "asst_tutor")).assistant.name == "Tutor"
    await house.store.write(lambda tx: delete_assistant(tx, "default", "asst_tutor"))
    await declare_assistants(house, path)
    assert await stored(house, "asst_tutor")


async def test_an_assistant_no_longer_declared_stays(
    house: House, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """One that left the file stays as an ordinary assistant, and the log says so once."""
    monkeypatch.setattr("afterglow.telemetry.log.propagate", True)
    await declare_assistants(house, written(tmp_path, TUTOR + '[assistants.asst_b]\nmodel = "m"\n'))
    for _ in range(2):
        assert await declare_assistants(house, written(tmp_path, '[assistants.asst_b]\nmodel = "m"\n')) == 1
    assert not (await must_have(house, "asst_tutor")).declared
    assert (await must_have(house, "asst_b")).declared
    assert [record.getMessage() for record in caplog.records] == [
        f"asst_tutor is no longer declared in {tmp_path / 'assistants.toml'}; it stays as an ordinary assistant."
    ]


async def test_declared_assistants_stand_in_lists_as_in_the_file(house: House, tmp_path: Path):
    """Assistants declared at one start are listed in the order of the file."""
    text = "".join(f'[assistants."asst_{name}"]\nmodel = "m"\n' for name in "cab")
    await declare_assistants(house, written(tmp_path, text))

    async def work(tx: Transaction) -> list[str]:
        return (await list_assistants(tx, "default", limit=9, order="asc", after=None, before=None)).ids

    assert await house.store.read(work) == ["asst_c", "asst_a", "asst_b"]


async def test_project_instructions_file_and_ids_of_files(house: House, tmp_path: Path):
    """`project` says whose it is, `instructions_file` is read from beside the file, ids in tool_resources are kept."""
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "x.md").write_text("Være så god.\nLine two.\n", "utf-8")
    text = """
        [assistants.asst_x]
        model = "m"
        project = "school"
        instructions_file = "prompts/x.md"
        tool_resources = { code_interpreter = { file_ids = ["file-1"] }, file_search = { vector_store_ids = ["vs_1"] } }
    """
    await declare_assistants(house, written(tmp_path, text))
    assert await stored(house, "asst_x") is None
    row = await must_have(house, "asst_x", "school")
    assert row.assistant.instructions == "Være så god.\nLine two."
    assert row.assistant.tool_resources == {
        "code_interpreter": {"file_ids": ["file-1"]},
        "file_search": {"vector_store_ids": ["vs_1"]},
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[assistants.asst_x]\nname = 'x'", "[assistants.asst_x]: Missing required parameter: 'model'."),
        ("[assistants.asst_x]\nmodel = 'm'\nsize = 1", "[assistants.asst_x]: Unknown parameter: 'size'."),
        (
            "[assistants.asst_x]\nmodel = 'm'\ntemperature = 3",
            "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but got 3 instead.",
        ),
        (
            "[assistants.asst_x]\nmodel = 'm'\ntools = [{type = 'function', function = {name = 'a b'}}]",
            "Invalid 'tools[0].function.name': string does not match pattern.",
        ),
        ("[assistants.asst_x]\nmodel = 'm'\nname = 2024-01-01", "2024-01-01 is a date, which JSON does not have"),
        ("[assistants.asst_x]\nmodel = 'm'\ntop_p = nan", "not JSON compliant"),
        ("[assistants.asst_x]\nmodel = 'm\\u0000'".replace("'", '"'), "Invalid 'model': string contains a NUL"),
        ("[assistants.'a b']\nmodel = 'm'", "[assistants.a b]: an id is up to 64 letters"),
        ("[assistants]\nasst_x = 'm'", "[assistants.asst_x]: expected a table."),
        ("[[assistant]]\nmodel = 'm'", "expected tables named [assistants.ID] and nothing else."),
        ("[[assistants]]\nmodel = 'm'", "expected tables named [assistants.ID] and nothing else."),
        ("[assistants.asst_x]\nmodel = 'm'\nproject = 1", "[assistants.asst_x]: project: expected a name."),
        ("[assistants.asst_x]\nmodel = 'm'\ninstructions_file = 'no.md'", "instructions_file no.md cannot be read"),
        ("[assistants.asst_x]\nmodel = 'm'\ninstructions_file = 1", "instructions_file: expected the path"),
        (
            "[assistants.asst_x]\nmodel = 'm'\ninstructions = ''\ninstructions_file = 'a'",
            "give instructions or instructions_file, not both",
        ),
        (
            "[assistants.asst_x]\nmodel = 'm'\ntool_resources = {file_search = {vector_stores = [{}]}}",
            "tool_resources.file_search: name vector_store_ids",
        ),
        ("model =", "is no TOML"),
    ],
)
async def test_a_wrong_file_is_refused(house: House, tmp_path: Path, text: str, told: str):
    """The error names the file, the id and the key, and nothing of the file is taken."""
    path = written(tmp_path, '[assistants.asst_good]\nmodel = "m"\n' + text if text[1:2] == "a" else text)
    with pytest.raises(ConfigError) as caught:
        await declare_assistants(house, path)
    assert path in str(caught.value)
    assert told in str(caught.value)
    assert await stored(house, "asst_good") is None


async def test_a_missing_file_is_refused(house: House, tmp_path: Path):
    """The error names the file that cannot be read."""
    with pytest.raises(ConfigError, match=r"nowhere\.toml cannot be read: No such file"):
        await declare_assistants(house, str(tmp_path / "nowhere.toml"))
