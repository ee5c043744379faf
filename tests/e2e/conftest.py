"""A server for the clients' stories."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from tests.e2e.processes import Served, environment, serving
from tests.e2e.talking_model import TalkingModel


@pytest.fixture
async def story_server(tmp_path: Path) -> AsyncGenerator[Served, None]:
    """A server with the key `sk-story`, whose model is `talking_model.py`, and whose streams are full of pings."""
    settings = {"AFTERGLOW_API_KEYS": "sk-story", "AFTERGLOW_KEEP_ALIVE_S": "0.01", "AFTERGLOW_POLL_AFTER_MS": "20"}
    async with TalkingModel() as model:
        flags = ("--model-url", model.url, "--default-model", "talker")
        async with serving(tmp_path, *flags, env=environment(**settings)) as served:
            yield served
