"""Writes the pages that come from the code: configuration.md from the settings table, map.md from the docstrings.

`make docs` runs it; a test fails while a page on disk differs from what is generated.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from afterglow.settings import PREFIX, TABLES, ModelSettings, Settings

DOCS = Path(__file__).parent
ROOT = DOCS.parent
NOTE = "<!-- Written by docs/generate.py. Change the source and run `make docs`. -->\n"

CONFIGURATION = """# Configuration

{note}
Every setting has a default; none must be given. A value is taken from the first of these places that has it:

1. the flag of `afterglow serve` (or `afterglow doctor`, which takes the same flags);
2. the environment variable: `{prefix}` and the setting's name in capitals;
3. the TOML file named with `--config FILE`;
4. the default below.

Nothing else is read: no `.env` file, no file in the home folder, and no `OPENAI_…` variable. A key in the file that is
no setting is refused at the start; a misspelt environment variable is not noticed. Settings are read once, at the
start. In the file, lists are TOML lists and aliases a TOML table; in flags and variables they are comma-separated.
Yes-or-no settings take `on`, `off`, `true`, `false`, `yes`, `no`, `1` and `0`; in the file also `true` and `false`
without quotes.

| Setting | Flag | Variable | Default | Meaning |
|---|---|---|---|---|
{settings}

Keep the secrets (`{secrets}`) in the environment or in a file that only the server's user can read: what is on a
command line, every user of the machine can see.

## Model servers

One server needs no table: `model_url` and `model_key` are enough. For several, name each in the file:

| Key of `[upstreams.NAME]` | Meaning |
|---|---|
| `url` | Base URL, as a rule ending in `/v1`. The only key that must be there. |
| `key_env` | Name of the environment variable that holds the key. It must be set. |
| `models` | Names for which this server is asked, whatever the servers list. |
| `max_concurrency` | Calls at the same time; the rest wait their turn. 0, the default, is no limit. |
| `inline_images` | `true`: Afterglow fetches image URLs and sends data. Not given: the kind of server decides. |

What the server does not tell of a model, or tells wrongly, goes into `[models."NAME"]`:

| Key of `[models."NAME"]` | Takes |
|---|---|
{models}

How a name finds its server, and what is known of a model, is in [Models](models.md).

## MCP servers

Each is a table; [Tools](tools.md#mcp-servers) says what they are for. The extra `mcp` must be installed.

| Key of `[mcp.NAME]` | Meaning |
|---|---|
| `url` | A streamable HTTP endpoint; or |
| `command` | A list of texts: the program to start and its arguments. It speaks on stdin and stdout. |
| `key_env` | With `url`: name of the environment variable that holds a bearer token. |
| `headers_env` | With `url`: a table of header names and the variables that hold their values. |
| `env` | With `command`: names of variables that the program gets, beside `PATH`, `HOME` and the like. |
| `allowed_tools` | Names of the tools that may be used. Not given: all. |

## A whole file

```toml
{example}```
"""

# Loaded by a test, so that it cannot go out of date.
EXAMPLE = """host = "127.0.0.1"
port = 8000
data = "/var/lib/afterglow"
default_model = "gpu/qwen3-32b"
log_format = "json"
allowed_hosts = ["assistants.example.com"]
run_expires_s = 1800
currency = "EUR"

[aliases]
"gpt-4o" = "gpu/qwen3-32b"
"gpt-4o-mini" = "laptop/qwen3:8b"

[upstreams.gpu]
url = "http://10.0.0.5:8001/v1"
key_env = "GPU_KEY"
models = ["qwen3-32b"]
max_concurrency = 64
inline_images = false

[upstreams.laptop]
url = "http://127.0.0.1:11434/v1"

[mcp.tickets]
command = ["tickets-mcp", "--read-only"]
env = ["TICKETS_TOKEN"]
allowed_tools = ["find_ticket"]

[models."qwen3-32b"]
window_tokens = 32768
max_output_tokens = 8192
vision = false
tools = true
prompt_price = 0.2
completion_price = 0.6
"""

MAP = """# Map of the code

{note}
The first line of every module. Imports point down: `cli` at the top, the plain modules that import nothing of ours at
the bottom. `tests/test_floors.py` holds the floors.

{trees}"""


def configuration() -> str:
    """The text of configuration.md."""
    rows = dataclasses.fields(Settings)
    secrets = [row.name for row in rows if row.metadata["secret"]]
    return CONFIGURATION.format(
        note=NOTE,
        prefix=PREFIX,
        settings="\n".join(_setting_line(row) for row in rows),
        secrets="`, `".join(secrets),
        models="\n".join(f"| `{row.name}` | {_kind(str(row.type))} |" for row in dataclasses.fields(ModelSettings)),
        example=EXAMPLE,
    )


def _setting_line(row: dataclasses.Field[Any]) -> str:
    flag = "–"
    if row.metadata["flag"]:
        flag = "`--alias OLD=NEW`" if row.name == "aliases" else f"`--{row.name.replace('_', '-')}`"
    variable = "–" if row.name in TABLES else f"`{PREFIX}{row.name.upper()}`"
    cells = [f"`{row.name}`", flag, variable, _default(row), row.metadata["help"].replace("|", "\\|")]
    return f"| {' | '.join(cells)} |"


def _default(row: dataclasses.Field[Any]) -> str:
    value = row.default
    if value is dataclasses.MISSING or value in ("", ()):
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`" if isinstance(value, str) else f"{value:g} {row.metadata['unit']}".rstrip()


def _kind(annotation: str) -> str:
    if annotation.startswith("float"):
        return "money per million tokens, in `currency`"
    return "`true` or `false`" if annotation.startswith("bool") else "tokens, a whole number"


def map_of_code() -> str:
    """The text of map.md."""
    return MAP.format(note=NOTE, trees="\n".join([*_branch(ROOT / "afterglow"), "", *_branch(ROOT / "bench"), ""]))


def _branch(folder: Path, depth: int = 0) -> Iterator[str]:
    indent = "  " * depth
    yield f"{indent}- **{folder.name}/**: {_first_line(folder / '__init__.py')}"
    for file in sorted(folder.glob("*.py")):
        if file.name != "__init__.py":
            link = f"[{file.name}](../{file.relative_to(ROOT).as_posix()})"
            yield f"{indent}  - {link}: {_first_line(file)}"
    for inner in sorted(folder.iterdir()):
        if (inner / "__init__.py").exists():
            yield from _branch(inner, depth + 1)


def _first_line(file: Path) -> str:
    """Without the beginning of a sentence that goes on in the second line."""
    line = (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").partition("\n")[0]
    return line if line.endswith(".") or ". " not in line else line[: line.rindex(". ") + 1]


PAGES: dict[str, Callable[[], str]] = {"configuration.md": configuration, "map.md": map_of_code}


def main() -> None:
    for name, text in PAGES.items():
        (DOCS / name).write_text(text(), "utf-8")


if __name__ == "__main__":
    main()
