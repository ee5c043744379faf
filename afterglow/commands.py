"""What the commands have in common: how one is added, its flags, the settings, and the database it works on."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from afterglow import settings
from afterglow.contracts import Store
from afterglow.settings import Settings

T = TypeVar("T")


def add_command(
    commands: Any, name: str, act: Callable[[argparse.Namespace], int], help: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
    parser.set_defaults(act=act)
    return parser


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of the settings")
    parser.add_argument("--data", metavar="DIR", help="the data folder")
    parser.add_argument("--database-url", metavar="URL", help="the Postgres that stands in its place")


def load_settings(options: argparse.Namespace) -> Settings:
    known = {row.name for row in dataclasses.fields(Settings)}
    flags = {name: value for name, value in vars(options).items() if name in known}
    return settings.load(flags, config=options.config)


def with_store(options: argparse.Namespace, act: Callable[[Store], Awaitable[T]]) -> T:
    """Work on the data folder's database, beside a running server if there is one."""
    from afterglow.app import open_store

    async def run() -> T:
        async with open_store(load_settings(options)) as store:
            return await act(store)

    return asyncio.run(run())
