"""The program behind `make bench`: runs the scenarios one after another, prints one table, writes one JSON file.

    python -m bench.run [--only NAME]… [--json FILE] [--quick] [--afterglow PROGRAM]
                        [--beir FOLDER]… [--embeddings URL --embedding-model NAME] [--postgres URL [--large]]

Ends with 0 also when a promise is missed (the machine may be busy), with 1 when something could not be measured.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import resource
import signal
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from time import perf_counter, time
from typing import Any

import msgspec
import uvloop

from bench.client import BenchFailure, percentile
from bench.processes import ROOT, stub
from bench.scenarios import SCENARIOS, Findings, Row, Setup
from bench.search import Embedder

TOTAL_S = {False: 300.0, True: 60.0}
LARGE_S = 900.0
RESULTS = ROOT / "bench" / "results" / "latest.json"


class Outcome(msgspec.Struct):
    """A scenario's part of the JSON file. failed: why there are no rows."""

    rows: list[Row]
    raw: dict[str, Any]
    took_s: float
    failed: str | None = None


async def measure(options: argparse.Namespace) -> dict[str, Outcome]:
    """Run these scenarios in turn. One that fails leaves its reason; so do those for which no time is left."""
    outcomes: dict[str, Outcome] = {}
    deadline = perf_counter() + (LARGE_S if options.large else TOTAL_S[options.quick])
    embed = Embedder(options.embeddings, options.embedding_model) if options.embeddings else None
    with tempfile.TemporaryDirectory(prefix="afterglow-bench-") as folder:
        async with stub() as stub_port:
            setup = Setup(
                options.afterglow,
                stub_port,
                Path(folder),
                options.quick,
                options.beir,
                embed,
                options.postgres,
                options.large,
            )
            for name in options.only or SCENARIOS:
                print(f"{name} …", end=" ", file=sys.stderr, flush=True)
                outcomes[name] = await _outcome(name, setup, deadline - perf_counter())
                skipped = outcomes[name].raw.get("skipped")
                print(outcomes[name].failed or skipped or f"{outcomes[name].took_s:.1f} s", file=sys.stderr)
    return outcomes


async def _outcome(name: str, setup: Setup, left_s: float) -> Outcome:
    began = perf_counter()
    findings = Findings([], {})
    failed = None
    try:
        async with asyncio.timeout(left_s):
            findings = await SCENARIOS[name](setup)
    except TimeoutError:
        failed = f"stopped after {perf_counter() - began:.0f} s: it took too long"
    except (BenchFailure, OSError, msgspec.DecodeError) as error:
        failed = f"{type(error).__name__}: {error}"
    return Outcome(findings.rows, findings.raw, perf_counter() - began, failed)


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "uvloop": version("uvloop"),
        "load_average": os.getloadavg(),
        "fsync_ms_p50": _fsync_ms(),
    }


def _fsync_ms() -> float:
    """What making one page durable costs where the data folders will be: every acknowledged write pays it."""
    took_ms = []
    with tempfile.TemporaryFile(prefix="afterglow-bench-") as file:
        for _ in range(50):
            file.write(bytes(4096))
            file.flush()
            began = perf_counter()
            os.fsync(file.fileno())
            took_ms.append((perf_counter() - began) * 1000)
    return percentile(took_ms, 50)


def table(outcomes: dict[str, Outcome]) -> str:
    """All rows, aligned, one per line; a scenario that failed has one line with its reason."""
    lines = [("what", "target", "measured", "beside", "")]
    failures = []
    for name, outcome in outcomes.items():
        lines += [_cells(row) for row in outcome.rows]
        if outcome.failed:
            failures.append(f"{name} FAILED: {outcome.failed}")
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    texts.insert(1, "─" * (sum(widths) + 8))
    return "\n".join(texts + failures)


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    target = f"{row.sign} {row.owed:,g} {row.unit}" if row.owed is not None else "–"
    verdict = {None: "", True: "ok", False: "MISSED"}[row.kept]
    return row.what, target, f"{_number(row.measured)} {row.unit}", row.beside, verdict


def _number(value: float) -> str:
    """Three digits that matter, and whole numbers whole."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


async def _measure_until_told(options: argparse.Namespace) -> dict[str, Outcome]:
    """Measure, and on SIGTERM end as on Ctrl-C: with no process left behind."""
    task = asyncio.current_task()
    assert task
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await measure(options)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.run", description="Measure Afterglow against a model stub.")
    parser.add_argument("--only", action="append", choices=SCENARIOS, metavar="NAME", help=", ".join(SCENARIOS))
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="where the figures go")
    parser.add_argument("--quick", action="store_true", help="smaller counts; under a minute")
    parser.add_argument(
        "--afterglow",
        type=Path,
        default=Path(sys.executable).parent / "afterglow",
        metavar="PROGRAM",
        help="what to start, e.g. another checkout's; by default the one beside this Python",
    )
    parser.add_argument(
        "--beir", type=Path, action="append", default=[], metavar="FOLDER", help="a test collection for `retrieval`"
    )
    parser.add_argument("--embeddings", metavar="URL", help="base URL of a server that embeds it, ending in /v1")
    parser.add_argument("--embedding-model", default="", metavar="NAME")
    parser.add_argument("--postgres", default="", metavar="URL", help="a server to make a database on, for `cluster`")
    parser.add_argument(
        "--large", action="store_true", help="there, with many runs at once and 10,000,000 messages, too; ten minutes"
    )
    options = parser.parse_args(arguments)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    facts = machine()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcomes = runner.run(_measure_until_told(options))
    report = {"at": int(time()), "quick": options.quick, "machine": facts, "scenarios": outcomes}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    print(table(outcomes))
    loads = " ".join(f"{load:.1f}" for load in facts["load_average"])
    print(f"\n{facts['cores_usable']} cores, Python {facts['python']}, load before {loads}, ", end="")
    print(f"fsync {facts['fsync_ms_p50']:.2f} ms. Figures: {options.json}")
    return 1 if any(outcome.failed for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
