"""The server held against its own /openapi.json by schemathesis."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.e2e.clients import python_client
from tests.e2e.processes import Served, environment, run, serving

pytestmark = pytest.mark.slow

KEY = "sk-fuzz"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "use_after_free",
    "ignored_auth",
)
HOW = (
    *("--phases", "coverage,fuzzing,stateful", "--checks", ",".join(CHECKS)),
    *(
        "--max-examples",
        10,
        "--seed",
        1,
        "--generation-database",
        "none",
    ),  # for each route; about 30 seconds in all on a quiet machine
    *("--no-color", "--warnings", "off"),
)


async def test_against_its_description(tmp_path: Path):
    """Whatever is sent, in thousands of cases, answers are as described, never a 5xx, and nothing is logged as a fault
    of ours."""
    schemathesis = python_client("schemathesis", "schemathesis==4.32.5").parent / "schemathesis"
    async with serving(tmp_path, env=environment(AFTERGLOW_API_KEYS=KEY)) as served:
        file = tmp_path / "openapi.json"
        file.write_text(json.dumps(await description(served)))
        where = ("--url", served.url.removesuffix("/v1"), "--header", f"Authorization: Bearer {KEY}")
        ended = await run(schemathesis, "run", file, *where, *HOW, cwd=tmp_path, within_s=240)
        assert ended.code == 0, ended.out
        [cases] = re.findall(r"(\d+) generated", ended.out)
        assert int(cases) > 5000
        assert "Traceback" not in served.log


async def test_administration_against_its_description(tmp_path: Path):
    """The same, of the routes for administrators, with a key that may do everything."""
    schemathesis = python_client("schemathesis", "schemathesis==4.32.5").parent / "schemathesis"
    keys = f"{KEY}:default:read+write+admin"
    async with serving(tmp_path, env=environment(AFTERGLOW_API_KEYS=keys)) as served:
        file = tmp_path / "openapi.json"
        file.write_text(json.dumps(await description(served)))
        where = ("--url", served.url.removesuffix("/v1"), "--header", f"Authorization: Bearer {KEY}")
        only = ("--include-path-regex", "^/v1/organization/")
        ended = await run(schemathesis, "run", file, *where, *only, *HOW, cwd=tmp_path, within_s=120)
        assert ended.code == 0, ended.out
        assert "Traceback" not in served.log


async def description(served: Served) -> Any:
    """/openapi.json, without the schema of event streams: schemathesis would hold it against each single event."""
    async with httpx2.AsyncClient(verify=False) as plain:
        described = (await plain.get(served.url.removesuffix("/v1") + "/openapi.json")).json()
    for routes in described["paths"].values():
        for route in routes.values():
            content = route["responses"].get("200", {}).get("content", {})
            if "text/event-stream" in content:
                content["text/event-stream"] = {}
    return described
