"""One short trial of each shape; `make chaos SEEDS=1-20` has many long ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.trial import Plan, try_out

pytestmark = pytest.mark.slow

SHORT = {"chaos_s": 8.0, "apis": 2, "workers": 2, "callers": 8, "run_expires_s": 12}


@pytest.mark.parametrize("shape", ["cluster", "laptop"])
async def test_nothing_is_lost_doubled_or_stuck(tmp_path: Path, shape: str):
    """Processes are killed, stand still and are asked to stop, and the database breaks off, while callers talk: what
    was acknowledged is there, once; every run ends, as it must, once; and streams are what was stored."""
    report = await try_out(Plan(1, shape, **SHORT), tmp_path)
    assert not report.violations, report
    assert report.runs["completed"] > 10
