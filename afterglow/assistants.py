"""What happens to assistants: created, modified and deleted by callers, or declared by the operator in a file."""

from __future__ import annotations

from msgspec import UNSET

from afterglow.contracts import House, Transaction
from afterglow.errors import NotFound
from afterglow.ids import new_id
from afterglow.objects import Assistant, CreateAssistant, ModifyAssistant
from afterglow.rows import assistants as assistant_rows
from afterglow.rows.assistants import Asked, AssistantRow
from afterglow.rows.requests import Origin, insert_request
from afterglow.runs.lifecycle import plain
from afterglow.threads import checked_resources, wake_for_files
from afterglow.tools.function import stored_form
from afterglow.tools.mcp import check_mcp_tools

SAMPLING = ("temperature", "top_p", "response_format", "reasoning_effort")
SHOWN_DEFAULTS = {"temperature": 1.0, "top_p": 1.0, "response_format": "auto", "reasoning_effort": None}


async def create_assistant(house: House, project: str, body: CreateAssistant, origin: Origin) -> Assistant:
    now = house.clock.now()

    async def work(tx: Transaction) -> Assistant:
        resources = await checked_resources(tx, house, project, body.tool_resources)
        row = new_assistant(body, new_id("asst"), int(now))
        check_mcp_tools(house, row.assistant.tools)
        row.assistant.tool_resources = resources
        await assistant_rows.put_assistant(tx, project, row, round(now * 1_000_000))
        await insert_request(tx, project, origin, row.assistant.id, int(now))
        return row.assistant

    assistant = await house.store.write(work)
    wake_for_files(house, assistant.tool_resources)
    return assistant


def new_assistant(body: CreateAssistant, assistant_id: str, created_at: int, *, declared: bool = False) -> AssistantRow:
    """The assistant that `body` describes, without its tool resources."""
    assistant = Assistant(
        id=assistant_id,
        created_at=created_at,
        name=body.name,
        description=body.description,
        model=body.model,
        instructions=body.instructions,
        tools=[stored_form(tool) for tool in body.tools or []],
        metadata=body.metadata or {},
    )
    asked = Asked(**{name: plain(getattr(body, name)) for name in SAMPLING})
    show_sampling(assistant, asked)
    return AssistantRow(assistant, asked, declared)


def show_sampling(assistant: Assistant, asked: Asked) -> None:
    """Let the object show what was set, and the defaults for the rest."""
    for name, default in SHOWN_DEFAULTS.items():
        value = getattr(asked, name)
        setattr(assistant, name, default if value is None else value)


async def modify_assistant(house: House, project: str, assistant_id: str, body: ModifyAssistant) -> Assistant:
    """Change what `body` names: left out means unchanged, null means cleared, lists are replaced."""

    async def work(tx: Transaction) -> Assistant:
        row = await assistant_rows.get_assistant(tx, project, assistant_id)
        if row is None:
            raise NotFound.of("assistant", assistant_id)
        assistant, asked = row.assistant, row.asked
        if body.model is not UNSET:
            assistant.model = body.model
        for name in ("name", "description", "instructions"):
            if (value := getattr(body, name)) is not UNSET:
                setattr(assistant, name, value)
        if body.tools is not UNSET:
            assistant.tools = [stored_form(tool) for tool in body.tools or []]
            check_mcp_tools(house, assistant.tools)
        if body.metadata is not UNSET:
            assistant.metadata = body.metadata or {}
        if body.tool_resources is not UNSET:
            assistant.tool_resources = await checked_resources(tx, house, project, body.tool_resources)
        for name in SAMPLING:
            if (value := getattr(body, name)) is not UNSET:
                setattr(asked, name, plain(value))
        show_sampling(assistant, asked)
        await assistant_rows.update_assistant(tx, project, row)
        return assistant

    return await house.store.write(work)


async def delete_assistant(house: House, project: str, assistant_id: str) -> None:
    async def work(tx: Transaction) -> None:
        if not await assistant_rows.delete_assistant(tx, project, assistant_id):
            raise NotFound.of("assistant", assistant_id)

    await house.store.write(work)
