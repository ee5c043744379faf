"""What several suites of contracts need."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.postgres import fresh_database

ON_POSTGRES = {"postgres", "pooled postgres", "apart"}
FILES_ON_POSTGRES = {
    f"test_{name}"
    for name in ("events_apart", "locks", "migrate", "notify", "postgres_store", "search_postgres", "side_by_side")
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A Postgres takes seconds to start, in each process of tests: what needs one is slow."""
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if item.path.stem in FILES_ON_POSTGRES or any(str(value) in ON_POSTGRES for value in parameters):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def database_url() -> Iterator[str]:
    """A Postgres database with our schema that the tests of a file share; they take care not to meet in it."""
    with asyncio.Runner() as runner:
        opening = fresh_database()
        yield runner.run(opening.__aenter__())
        runner.run(opening.__aexit__(None, None, None))
