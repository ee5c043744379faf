"""Calls that go out of this server while a run waits: functions that have an endpoint, and tools of MCP servers.

Whatever goes wrong becomes an output that tells the model so; the run goes on. The step in which the calls stand is in
the database before the first is made. A call that was under way when its worker died is not made again
(`runs/closing.py`): nobody knows whether it had its effect.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from afterglow.contracts import House, Transaction
from afterglow.errors import OutboundFailed
from afterglow.objects import FunctionCalling
from afterglow.rows.runs import RunRow
from afterglow.rows.tool_calls import get_tool_secret, take_tool_secret
from afterglow.runs import report
from afterglow.runs.context import ASCII_BYTES_PER_TOKEN, clipped
from afterglow.runs.turn import Call, ModelTurn
from afterglow.signing import new_secret, signed_headers
from afterglow.tools.endpoint import MAX_OUTPUT_BYTES, CalledFor, headers_of, output_of, request_body, tries_again
from afterglow.tools.function import Offer
from afterglow.tools.mcp import NO_MCP

AT_ONCE = 8
RETRIES = 2
PAUSE_S = 0.25  # before the second try; twice as long before each one after
LEAST_ROOM_CHARS = 2000


class OutgoingCalls:
    """Makes the outgoing calls of one turn."""

    def __init__(self, house: House, row: RunRow, turn: ModelTurn, offered: Offer) -> None:
        self._house = house
        self._row = row
        self._turn = turn
        self._offered = offered
        self._free = asyncio.Semaphore(AT_ONCE)
        self._secret = ""

    async def make(self, calls: list[Call], room_tokens: int) -> None:
        """Give each its output. room_tokens: what the window has left for all of them."""
        if any(call.kind == "endpoint" for call in calls):
            self._secret = await self._take_secret()
        await asyncio.gather(*map(self._make, calls))
        room = max(int(room_tokens * ASCII_BYTES_PER_TOKEN) // len(calls), LEAST_ROOM_CHARS)
        for call in calls:
            call.output = clipped(call.output or "", room)

    async def _make(self, call: Call) -> None:
        async with self._free:
            with report.tool_call(self._house, self._row, self._turn, call):
                try:
                    output = await (self._call_mcp if call.kind == "mcp" else self._call_endpoint)(call)
                except OutboundFailed as error:
                    call.failure = str(error)
                    output = f"ERROR: {error}"
                call.output = output.replace("\0", "\ufffd")

    # --- MCP ---------------------------------------------------------------------------------------------------

    async def _call_mcp(self, call: Call) -> str:
        server, name = self._offered.mcp[call.name]
        if self._house.mcp is None:
            raise OutboundFailed(NO_MCP)
        timeout_s = self._row.asked.tool_timeout_s or self._house.settings.tool_timeout_s
        return await self._house.mcp.call_tool(self._row.project, server, name, _arguments(call), timeout_s=timeout_s)

    # --- endpoints ---------------------------------------------------------------------------------------------

    async def _call_endpoint(self, call: Call) -> str:
        """Try as often as the tool allows. Raises OutboundFailed."""
        calling = self._offered.callings[call.name]
        key, body = self._request(call)
        tries = 1 + (RETRIES if calling.retries is None else calling.retries)
        for number in range(tries):
            if number:
                await asyncio.sleep(PAUSE_S * 2 ** (number - 1))
            try:
                return await self._try(calling, key, body)
            except OutboundFailed as error:
                if error.forbidden or number + 1 == tries:
                    raise
        raise AssertionError("unreachable")

    def _request(self, call: Call) -> tuple[str, bytes]:
        """The call's key, the same for every try, and what is posted."""
        run, step = self._row.run, self._turn.step
        assert step is not None
        called = CalledFor(call.id, run.id, run.thread_id, run.assistant_id, step.id, step.created_at)
        return called.key, request_body(called, call.name, "".join(call.arguments))

    async def _try(self, calling: FunctionCalling, key: str, body: bytes) -> str:
        """Raises OutboundFailed; it is `forbidden` when trying again does not help."""
        assert calling.url is not None
        settings = self._house.settings
        signature = signed_headers(self._secret, key, int(self._house.clock.now()), body)
        reply = await self._house.outbound.post(
            calling.url,
            headers_of(key) | signature,
            body,
            timeout_s=calling.timeout_s or self._row.asked.tool_timeout_s or settings.tool_timeout_s,
            max_bytes=MAX_OUTPUT_BYTES + 1,
            allow_private=settings.private_tools,
        )
        if 200 <= reply.status < 300:
            return output_of(reply)
        raise OutboundFailed(
            f"The tool's server answered {reply.status}. {output_of(reply)[:500]}".strip(),
            forbidden=not tries_again(reply.status),
        )

    async def _take_secret(self) -> str:
        """The project's; made when this is its first call."""
        project, new, now = self._row.project, new_secret(), int(self._house.clock.now())

        async def look(tx: Transaction) -> str:
            return await get_tool_secret(tx, project) or ""

        async def work(tx: Transaction) -> str:
            return await take_tool_secret(tx, project, new, now)

        if found := await self._house.store.read(look):
            return found
        return await self._house.store.write(work)


def _arguments(call: Call) -> dict[str, Any]:
    """Raises OutboundFailed for what is no JSON object: the model wrote it, and can write it anew."""
    try:
        return msgspec.json.decode("".join(call.arguments) or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        raise OutboundFailed("The arguments are no JSON object.") from None
