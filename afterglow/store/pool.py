"""A pool of connections to Postgres whose sessions are left as they are found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import asyncpg

if TYPE_CHECKING:
    Pool = asyncpg.Pool[asyncpg.Record]

CONNECT_TIMEOUT_S = 5.0
CACHED_STATEMENTS = 512


async def open_pool(
    url: str, *, connections: int, pooled: bool, settings: Mapping[str, str], command_timeout_s: float
) -> tuple[Pool, str]:
    """The pool, and what must follow each BEGIN for `settings` to hold. Nothing is connected yet.

    connections: so many are opened at most. pooled: something between, such as PgBouncer, gives each transaction
    another session, so that nothing can be kept in one. Raises what the driver raises.
    """
    pool = await asyncpg.create_pool(
        url,
        min_size=0,
        max_size=connections,
        timeout=CONNECT_TIMEOUT_S,
        command_timeout=command_timeout_s,
        statement_cache_size=0 if pooled else CACHED_STATEMENTS,
        max_cached_statement_lifetime=0,
        server_settings={} if pooled else dict(settings),
        reset=_leave_as_it_is,
    )
    return pool, "".join(f"; SET LOCAL {name} = '{value}'" for name, value in settings.items() if pooled)


async def _leave_as_it_is(session: object) -> None:
    """In the place of the driver's own way to clean a session, a round trip: we leave nothing in any."""
