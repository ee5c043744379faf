"""The house's floors: imports point down, there are no rings, and only `app.py` picks from the wing."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "afterglow"

# From a file's bytes to chunks, beside the pipeline, which knows rows and stores.
INGEST = {"archive", "child", "chunk", "doc", "extract", "html", "office", "parse", "pdf", "read", "tables"}
INGEST = {f"ingest.{name}" for name in INGEST}

# From the roof to the ground. A module may import from lower floors, and from its own.
FLOORS: list[set[str]] = [
    {"cli", "cli_access", "cli_tools", "cli_webhooks", "commands"},
    {"serve", "connection", "probes", "demo", "doctor", "backup", "migrate"},
    {"app"},
    {"api", "runs.worker", "declared", "transfer", "saved"},
    {"assistants", "threads", "files", "uploads", "vector_stores", "webhooks", "deliveries", "bills", "dry_run"}
    | {"inspection", "access", "audit", "projects", "quotas", "proxies", "tools.code_interpreter"}
    | {"messages", "finding", "retention"}
    | {"ingest.pipeline", "ingest.upkeep"}
    | {
        "runs.lifecycle",
        "runs.report",
        "runs.loop",
        "runs.calling",
        "runs.turn",
        "runs.budgets",
        "runs.ledger",
        "runs.past_prompt",
        "runs.interrupt",
        "runs.prompt",
        "runs.images",
        "runs.search",
    },
    {"runs.closing", "runs.outputs", "runs.transcript", "runs.context", "runs.images", "tools", "files"},
    {"rows", "search.ranking", "search.filters", "search.pieces", "runs.states", "ingest.states"}
    | INGEST
    | {"search.words"},
    {"contracts", "objects", "errors", "settings", "telemetry", "metrics", "ids", "signing", "addresses"}
    | {"prices", "calibration", "limits", "afterglow"},
]
# Implementations of contracts.py: they stand on the ground (and may run statements); only app.py and tests enter.
WING = {"store", "traces", "events", "queue", "sandbox", "llm", "chat", "embeddings", "outbound", "testing"}
WING |= {"mcp_servers"}
WING |= {"search.embedded", "search.stored", "search.columns", "search.pool", "search.tokens"}
WING |= {"search.postgres", "search.postings", "search.sessions", "search.statements"}
WING |= {"offline", "offline_code", "offline_search", "offline_tables", "offline_values"}
WING_STANDS_ON = {"contracts", "objects", "errors", "settings", "telemetry", "ids", "rows", "signing"}
WING_STANDS_ON |= {"addresses", "afterglow"}
OFFLINE = {"offline_code", "offline_search", "offline_tables", "offline_values"}
WING_NEIGHBOURS = {
    "llm": {"chat"},
    "embeddings": {"chat"},
    "mcp_servers": {"outbound"},
    "search.sessions": {"store"},
    "testing": {"ingest"},
    "offline": OFFLINE,
    **dict.fromkeys(OFFLINE, OFFLINE),
}
WING_ENTRANCES = {
    "cli": {"sandbox.packages", "sandbox.apparmor", "sandbox.pod"}
}  # commands that prepare a machine for an engine


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "afterglow"


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """The modules of ours that a file imports, wherever in the file, but not those for type checkers alone."""
    found = set()
    tree = ast.parse(path.read_text())
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("afterglow")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("afterglow"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner.removeprefix("afterglow.") in MODULES else str(node.module))
    return {name.removeprefix("afterglow.") for name in found}


IMPORTS = {name: imports_of(path) for name, path in MODULES.items()}


def member(name: str, group: set[str]) -> bool:
    return name in group or any(name.startswith(f"{prefix}.") for prefix in group)


def floor_of(name: str) -> int | None:
    return next((number for number, floor in enumerate(FLOORS) if member(name, floor)), None)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_place(name: str) -> None:
    """A module belongs to one floor, or to the wing."""
    if name in ("runs", "search", "ingest"):
        return
    assert (floor_of(name) is not None) != member(name, WING), f"{name} stands nowhere, or twice"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    """No module imports from a floor above its own."""
    own = floor_of(name)
    for imported in IMPORTS[name]:
        if own is None or floor_of(imported) is None:
            continue
        assert floor_of(imported) >= own, f"{name} imports {imported}, which is above it"


@pytest.mark.parametrize("name", [name for name in MODULES if member(name, WING)])
def test_the_wing_stands_on_the_ground(name: str) -> None:
    """An implementation imports the ground floor, and its own package."""
    package = name.split(".")[0]
    for imported in IMPORTS[name]:
        allowed = WING_STANDS_ON | WING_NEIGHBOURS.get(name, set()) | {package}
        assert member(imported, allowed), f"{name} imports {imported}"


@pytest.mark.parametrize("name", [name for name in MODULES if not member(name, WING) and name != "app"])
def test_only_app_enters_the_wing(name: str) -> None:
    """Nobody but app.py picks an implementation."""
    entered = {imported for imported in IMPORTS[name] if member(imported, WING)} - WING_ENTRANCES.get(name, set())
    assert not entered, f"{name} imports {entered}"


def test_there_are_no_rings() -> None:
    """The imports form no cycle."""
    try:
        TopologicalSorter({name: imports - {name} for name, imports in IMPORTS.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"a ring of imports: {' → '.join(error.args[1])}")


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_lives_there(name: str) -> None:
    """A module begins with a docstring."""
    assert ast.get_docstring(ast.parse(MODULES[name].read_text())), f"{name} has no docstring"


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("settings", "demo", "sandbox.attacks")])
def test_the_environment_is_read_in_one_place(name: str) -> None:
    """Only settings.py reads the environment (the demo starts a server in one, and an attack tries to read it)."""
    assert not re.search(r"\benviron\b|getenv", MODULES[name].read_text()), f"{name} reads the environment"
