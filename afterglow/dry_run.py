"""What a run would send and cost, without making it: everything is done as for a run, and rolled back.

No model is called, and nothing is kept; all that is refused of a run is refused here, too. Extension of ours.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from msgspec import Struct

from afterglow.contracts import House, ModelInfo, Transaction
from afterglow.objects import CreateRun, CreateThreadAndRun, Json, Usage
from afterglow.prices import Price, cost_of, price_of
from afterglow.rows import runs as run_rows
from afterglow.rows.assistants import get_assistant
from afterglow.rows.messages import list_messages_between
from afterglow.rows.model_calls import MILLION
from afterglow.rows.projects import get_project_settings
from afterglow.rows.runs import RunRow
from afterglow.runs.budgets import NextCall, read_limits, refusal
from afterglow.runs.context import completion_reserve
from afterglow.runs.ledger import Amount, PromptParts, amount
from afterglow.runs.lifecycle import Happened, RunQuery, make_room
from afterglow.runs.past_prompt import Dropped, dropped_messages, estimated_parts, shown_request
from afterglow.runs.prompt import Prompt, PromptRules, chat_request, chat_response_format, read_prompt, request_hash
from afterglow.threads import insert_run_on_thread, insert_thread_and_run
from afterglow.tools.code_interpreter import list_files_of
from afterglow.tools.function import offer, stored_form
from afterglow.tools.mcp import ListedServers, list_mcp_tools

SHOWN = 100  # messages that were dropped


class DryRunCost(Struct, kw_only=True):
    """At the operator's prices; null without a price. completion: if the answer is as long as it may be."""

    prompt: Amount | None
    completion: Amount | None


class DryRun(Struct, kw_only=True):
    """The first call of the model that a run would make.

    prompt: the request, as `…/steps/{step_id}/prompt` shows it later, with the same prompt_hash. estimated: tokens by
    parts; estimated_tokens: together. budget_tokens: room for the prompt. completion_tokens: of the answer at most.
    would: `run`, `incomplete: max_prompt_tokens`, `failed: budget` or `failed: tool_off`; reason: why not, in words.
    """

    object: str = "thread.run.dry_run"
    model: str
    prompt: Json
    prompt_hash: str
    estimated: PromptParts
    estimated_tokens: int
    budget_tokens: int
    window_tokens: int
    completion_tokens: int
    dropped: Dropped
    cost: DryRunCost
    would: str
    reason: str | None = None


class _Done(Exception):
    """Carries the result out of the transaction, which is rolled back."""

    def __init__(self, result: DryRun) -> None:
        super().__init__()
        self.result = result


async def dry_run(house: House, project: str, thread_id: str, body: CreateRun, query: RunQuery) -> DryRun:
    """Raises what creating the run would raise."""

    async def insert(tx: Transaction) -> Happened:
        await make_room(tx, house, project, thread_id, "reject")
        return await insert_run_on_thread(tx, house, project, thread_id, body, query)

    return await _try(house, project, body, insert)


async def dry_thread_and_run(house: House, project: str, body: CreateThreadAndRun, query: RunQuery) -> DryRun:
    """As `dry_run`, of a thread that would be made with it."""

    async def insert(tx: Transaction) -> Happened:
        _, happened = await insert_thread_and_run(tx, house, project, body, query)
        return happened

    return await _try(house, project, body, insert)


async def _try(
    house: House,
    project: str,
    body: CreateRun | CreateThreadAndRun,
    insert: Callable[[Transaction], Awaitable[Happened]],
) -> DryRun:
    model, tools = await _model_and_tools(house, project, body)
    info = await house.models.info(model)
    listed = await list_mcp_tools(house, project, tools)

    async def work(tx: Transaction) -> None:
        run = (await insert(tx)).run
        row = await run_rows.get_run(tx, project, run.thread_id, run.id)
        assert row is not None
        raise _Done(await _look(tx, house, row, info, listed))

    try:
        await house.store.write(work)
    except _Done as done:
        return done.result
    raise AssertionError("a dry run was written")


async def _model_and_tools(house: House, project: str, body: CreateRun | CreateThreadAndRun) -> tuple[str, list[Json]]:
    """What is known of a model, and what MCP servers have, must be asked outside a transaction; an assistant that is
    missing is told later."""

    async def look(tx: Transaction) -> tuple[str, list[Json]]:
        row = await get_assistant(tx, project, body.assistant_id)
        return (row.assistant.model, row.assistant.tools) if row else ("", [])

    model, tools = await house.store.read(look)
    return body.model or model, tools if body.tools is None else [stored_form(tool) for tool in body.tools]


async def _look(tx: Transaction, house: House, row: RunRow, info: ModelInfo, listed: ListedServers) -> DryRun:
    offered = offer([]) if info.tools is False else offer(row.run.tools, listed.tools)
    instructions = "\n\n".join(filter(None, [row.run.instructions, listed.paragraph()]))
    if "code_interpreter" in offered.names:
        listing = await list_files_of(tx, house, row)
        instructions = "\n\n".join(filter(None, [instructions, listing.paragraph()]))
    response_format = chat_response_format(row.asked.response_format)
    history = house.settings.history
    rules = PromptRules(row, instructions, offered, info, house.calibration, history, response_format)
    prompt = await read_prompt(tx, rules)
    price = price_of(house.settings.models, house.models.names(row.run.model))
    would, reason = await _outcome(tx, house, row, prompt, price)
    request = chat_request(row, prompt.made, instructions, prompt.cut.turns, offered)
    most = row.run.max_completion_tokens or completion_reserve(info.window_tokens, None, info.max_output_tokens)
    return DryRun(
        model=row.run.model,
        prompt=shown_request(request),
        prompt_hash=request_hash(request),
        estimated=estimated_parts(prompt.estimated, round(prompt.factor * MILLION), prompt.needed_tokens),
        estimated_tokens=prompt.needed_tokens,
        budget_tokens=prompt.budget_tokens,
        window_tokens=info.window_tokens,
        completion_tokens=most,
        dropped=await _dropped(tx, row, prompt),
        cost=DryRunCost(
            prompt=_priced(house, price, Usage(prompt_tokens=prompt.needed_tokens), price.prompt),
            completion=_priced(house, price, Usage(completion_tokens=most), price.completion),
        ),
        would=would,
        reason=reason,
    )


async def _outcome(tx: Transaction, house: House, row: RunRow, prompt: Prompt, price: Price) -> tuple[str, str | None]:
    run, choice = row.run, row.asked.tool_choice
    if isinstance(choice, dict) and (off := house.why_off(choice["type"])):
        return "failed: tool_off", off
    if run.max_prompt_tokens is not None and prompt.needed_tokens > run.max_prompt_tokens:
        least = f"The prompt takes about {prompt.needed_tokens} tokens at least, more than max_prompt_tokens."
        return "incomplete: max_prompt_tokens", least
    limits = await read_limits(tx, house, row, (await get_project_settings(tx, row.project)).budget)
    why = refusal(limits, NextCall(prompt.needed_tokens, price), run.model, house.settings.currency)
    return ("failed: budget", why) if why else ("run", None)


def _priced(house: House, price: Price, usage: Usage, each: int | None) -> Amount | None:
    nanos = cost_of(price, usage).nanos
    return None if each is None or nanos is None else amount(nanos, house.settings.currency)


async def _dropped(tx: Transaction, row: RunRow, prompt: Prompt) -> Dropped:
    cut, left_out = prompt.cut, []
    if cut.left_out:
        not_sent = set(cut.left_out)
        read = await list_messages_between(tx, row.project, row.run.thread_id, cut.kept_from, prompt.cut_off)
        left_out = [(placed.seq, placed.message.id, False) for placed in read if placed.message.id in not_sent]
    return await dropped_messages(tx, row, cut.kept_from, left_out, SHOWN)
