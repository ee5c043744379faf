"""Every setting, once: name, default, help and unit. Flags, environment variables, the TOML file and
`docs/configuration.md` all come from this table. Nothing else reads the environment.

A value is taken from the command line, else the environment (`AFTERGLOW_` + name in capitals), else the file given
with `--config`, else the default here. `upstreams`, `models` and `mcp` are tables and come from the file alone.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import urlsplit

from afterglow.errors import ConfigError


def setting(default: Any, help: str, *, secret: bool = False, flag: bool = False, unit: str = "") -> Any:
    """One row of the table. secret: never shown; flag: also a flag of `afterglow serve`."""
    metadata = {"help": help, "secret": secret, "flag": flag, "unit": unit}
    if default == {}:
        return field(default_factory=dict, metadata=metadata, repr=not secret)
    return field(default=default, metadata=metadata, repr=not secret)


@dataclass(frozen=True, slots=True)
class Upstream:
    """One model server. url: base URL ending in `/v1` as a rule; key: read from the variable `key_env`, if any.

    models: names that only this server is asked for. inline_images: image URLs are fetched by us and sent as data
    (None: decided by what kind of server answers). max_concurrency: calls at once, 0 for no limit.
    """

    name: str
    url: str
    key: str = field(default="", repr=False)
    models: tuple[str, ...] = ()
    max_concurrency: int = 0
    inline_images: bool | None = None


@dataclass(frozen=True, slots=True)
class McpSettings:
    """One MCP server of the operator's. url: of a streamable HTTP endpoint; else command: a program to start, which
    speaks on stdin and stdout. headers: sent with each request. env: given to the program, beside PATH, HOME and the
    like. allowed_tools: none but these; None allows all."""

    name: str
    url: str = ""
    command: tuple[str, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    allowed_tools: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """What the operator says of one model. Tokens; None means not said.

    prompt_price, cached_price, completion_price: money per million tokens, in `currency`; cached_price is for prompt
    tokens that the provider had cached, and without it they cost as much as others.
    """

    window_tokens: int | None = None
    max_output_tokens: int | None = None
    vision: bool | None = None
    tools: bool | None = None
    prompt_price: float | None = None
    cached_price: float | None = None
    completion_price: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Read once by `app.py` and passed down."""

    host: str = setting("127.0.0.1", "Address to listen on. Any address but loopback needs keys.", flag=True)
    port: int = setting(8000, "Port to listen on; 0 takes a free one.", flag=True)
    data: str = setting("./afterglow-data", "Folder for the database and the files.", flag=True)
    database_url: str = setting(
        "",
        "Postgres that all processes share, `postgresql://…`. Empty: SQLite in the data folder, for one process.",
        secret=True,
        flag=True,
    )
    database_listen_url: str = setting(
        "",
        "The same database by a direct connection, where `database_url` goes through PgBouncer: LISTEN needs one.",
        secret=True,
    )
    database_connections: int = setting(10, "Connections to Postgres that one process opens, beside that for LISTEN.")
    blob_url: str = setting(
        "",
        "Where the bytes of files are: `s3://BUCKET/PREFIX`, `gs://…` or `az://…`. Empty: the data folder.",
        flag=True,
    )
    blob_options: Mapping[str, str] = setting(
        {}, "Options of `blob_url`, such as `endpoint=http://minio:9000`, comma-separated; keys, too.", secret=True
    )
    shared_data: bool = setting(
        False, "The data folder is on a disk that all hosts share: needed with `database_url` and no `blob_url`."
    )
    drain_s: float = setting(
        5.0, "How long a server that is told to stop lets its runs finish, before others take them.", unit="seconds"
    )
    metrics_port: int = setting(
        0, "Port on `host` for `/metrics`, `/healthz` and `/readyz`, without a key; 0: none.", flag=True
    )
    trace_url: str = setting("", "OTLP/HTTP address that traces are sent to; needs the extra `otel`.")
    model_url: str = setting(
        "", "Base URL of an OpenAI-compatible model server. Empty: the built-in offline model answers.", flag=True
    )
    model_key: str = setting("", "API key for `model_url`.", secret=True, flag=True)
    default_model: str = setting(
        "", "Model that answers for names no server lists. Empty: the name is passed on as it is.", flag=True
    )
    aliases: Mapping[str, str] = setting(
        {}, "Names apps ask for, and the models that answer: `gpt-4o=qwen3:32b`, comma-separated.", flag=True
    )
    root_path: str = setting("", "Path under which a proxy serves Afterglow, without `/v1`.", flag=True)
    assistants: str = setting("", "TOML file that declares assistants with fixed ids.", flag=True)
    log_format: str = setting("text", "`text` or `json`, on stderr.", flag=True)
    log_level: str = setting("info", "`debug`, `info`, `warning` or `error`.", flag=True)
    api_keys: tuple[str, ...] = setting(
        (),
        "Keys accepted beside those of `afterglow keys`, comma-separated; `key`, `key:project` or"
        " `key:project:read+write+admin`.",
        secret=True,
    )
    allowed_origins: tuple[str, ...] = setting(
        (), "Web origins whose pages may call this server, comma-separated. None by default."
    )
    allowed_hosts: tuple[str, ...] = setting(
        (), "Host names accepted in the Host header, beside loopback names and `host`; `*` accepts all."
    )
    max_body_mb: int = setting(32, "Largest JSON body.", unit="MB")
    passthrough: bool = setting(True, "Pass routes that are not ours (`/chat/completions`, …) on to the upstream.")
    history: str = setting(
        "calls", "What of earlier runs the model sees: `calls` (messages and tool calls) or `messages`."
    )
    max_running_runs: int = setting(2000, "Runs executed at the same time by one process; the rest wait, queued.")
    run_expires_s: int = setting(600, "A run that is not over by then expires.", unit="seconds")
    run_lease_s: float = setting(
        10.0,
        "How long a worker may be silent before another takes over its run. Heartbeats come every third of it.",
        unit="seconds",
    )
    connect_timeout_s: float = setting(5.0, "Connecting to a model server.", unit="seconds")
    first_token_timeout_s: float = setting(300.0, "From the request to the model's first token.", unit="seconds")
    model_retries: int = setting(3, "Tries more after a model server's 429, 5xx or refused connection.")
    default_window_tokens: int = setting(
        8192, "Window assumed for a model when neither configuration nor server tells it.", unit="tokens"
    )
    keep_alive_s: float = setting(15.0, "Silence on a stream after which a comment line is sent.", unit="seconds")
    poll_hold_s: float = setting(
        20.0,
        "How long a poll of an SDK helper, or one with `wait` and no number, is held at most; 0 answers at once.",
        unit="seconds",
    )
    poll_hold_max_s: float = setting(120.0, "How long a caller may have a poll held by `wait=SECONDS`.", unit="seconds")
    poll_after_ms: int = setting(
        250, "Sent as `openai-poll-after-ms` with answers that were not held.", unit="milliseconds"
    )
    event_flush_ms: int = setting(500, "How often streamed text is written to the database.", unit="milliseconds")
    event_retention_h: int = setting(24, "How long the events of finished runs are kept.", unit="hours")
    private_images: bool = setting(False, "Fetch image URLs that point to private, loopback or link-local addresses.")
    max_file_mb: int = setting(512, "Largest file that can be uploaded.", unit="MB")
    output_retention_d: int = setting(
        0, "How long files that the code interpreter has written are kept; 0: until they are deleted.", unit="days"
    )
    max_upload_mb: int = setting(8192, "Largest file that can be put together of an upload's parts.", unit="MB")
    embedding_url: str = setting(
        "",
        "Base URL of an OpenAI-compatible server of embeddings for file search. Empty: words alone are searched.",
    )
    embedding_key: str = setting("", "API key for `embedding_url`.", secret=True)
    embedding_model: str = setting("", "Model that `embedding_url` is asked for.")
    embedding_batch: int = setting(64, "Passages sent to `embedding_url` in one request.")
    embedding_timeout_s: float = setting(60.0, "One answer of `embedding_url`.", unit="seconds")
    ingest_files: int = setting(2, "Files read and indexed for file search at the same time by one process.")
    parse_timeout_s: float = setting(60.0, "Processor time for reading one file for file search.", unit="seconds")
    parse_memory_mb: int = setting(
        1024, "Memory of a process that reads files for file search; it needs 100 MB itself.", unit="MB"
    )
    thread_store_days: int = setting(
        7, "How long after its last use a vector store expires that was made along with a thread.", unit="days"
    )
    code_interpreter: str = setting(
        "auto",
        "What runs model-written Python: `auto` (native, else docker, else off), `native`, `docker`, `remote`, `off`.",
        flag=True,
    )
    sandbox_url: str = setting(
        "",
        "Addresses of sandbox hosts, for the engine `remote`, comma-separated: `tcp://HOST:PORT`, or `https://…` within"
        " TLS; a name may stand for many. Each is an `afterglow sandbox serve`.",
    )
    sandbox_token: str = setting("", "What sandbox hosts demand of their callers, 32 characters or more.", secret=True)
    docker_host: str = setting("", "Path of Docker's socket, for the engine `docker`. Empty: the usual places.")
    sandbox_env: str = setting(
        "",
        "Folder of the interpreter's Python packages, made by `afterglow sandbox setup`. Empty: `sandbox` in the"
        " server's virtual environment, else `~/.local/share/afterglow/sandbox`.",
    )
    sandbox_sessions: int = setting(
        32, "Code interpreter sessions open at once; 4 at most where memory cannot be fully bounded."
    )
    sandbox_pool: int = setting(2, "Sessions made ready ahead of their use.")
    sandbox_memory_mb: int = setting(1024, "Memory of one session, its files included.", unit="MB")
    sandbox_disk_mb: int = setting(512, "Size of a session's /mnt/data.", unit="MB")
    sandbox_processes: int = setting(32, "Processes and threads of one session.")
    sandbox_cpus: float = setting(1.0, "Processors one session may use, where a cgroup can be had.")
    sandbox_free_mb: int = setting(
        512, "Memory the machine keeps free: below it the largest session is ended.", unit="MB"
    )
    sandbox_idle_s: int = setting(1200, "A session that runs nothing for so long is ended.", unit="seconds")
    sandbox_ttl_s: int = setting(3600, "A session is ended at this age.", unit="seconds")
    cell_timeout_s: float = setting(120.0, "One call of the code interpreter; then it is interrupted.", unit="seconds")
    cell_output_kb: int = setting(256, "Output of one call that is kept; the rest is dropped.", unit="KB")
    private_webhooks: bool = setting(
        False, "Deliver webhooks to private, loopback or link-local addresses, and over plain http."
    )
    webhook_timeout_s: float = setting(10.0, "One delivery of a webhook.", unit="seconds")
    webhook_retention_d: int = setting(7, "How long the delivery log of webhooks is kept.", unit="days")
    private_tools: bool = setting(
        False,
        "Call function tools, and MCP servers that callers name, at private, loopback or link-local addresses, and"
        " over plain http.",
    )
    tool_timeout_s: float = setting(
        60.0, "One call of a function tool that has a URL, or of an MCP tool.", unit="seconds"
    )
    mcp_server_urls: bool = setting(
        False, "Let callers name MCP servers by `server_url`, beside those of the configuration."
    )
    messages_while_active: bool = setting(
        False, "Accept messages on a thread while a run is active; the original refuses them."
    )
    currency: str = setting("USD", "What the prices of models and the money of budgets are in.")
    max_header_kb: int = setting(64, "Largest head of a request, its line and all headers together.", unit="KB")
    head_timeout_s: float = setting(15.0, "Time for a request's head to arrive.", unit="seconds")
    body_timeout_s: float = setting(
        60.0, "Silence of a caller within a request's body after which it is given up.", unit="seconds"
    )
    max_connections: int = setting(20_000, "Connections open at once; more are refused with 503.")
    tls_cert: str = setting(
        "", "File with the TLS certificate and its chain, PEM; with `tls_key` serves https.", flag=True
    )
    tls_key: str = setting("", "File with the private key of `tls_cert`, PEM.", flag=True)
    trusted_proxies: tuple[str, ...] = setting(
        (), "Addresses or networks of proxies whose `X-Forwarded-For` and `-Proto` are believed, comma-separated."
    )
    upstreams: Mapping[str, Upstream] = setting({}, "Model servers by name (`[upstreams.NAME]` in the file).")
    mcp: Mapping[str, McpSettings] = setting({}, "MCP servers by name (`[mcp.NAME]` in the file).")
    models: Mapping[str, ModelSettings] = setting({}, 'What is known of models (`[models."NAME"]` in the file).')


PREFIX = "AFTERGLOW_"
TABLES = {"upstreams", "models", "mcp"}
PRICES = ("prompt_price", "cached_price", "completion_price")
FLAGS = {"aliases": "--alias"}  # a flag that is not the setting's name
ABOVE_ZERO = (
    "max_running_runs",
    "run_expires_s",
    "run_lease_s",
    "connect_timeout_s",
    "first_token_timeout_s",
    "default_window_tokens",
    "max_body_mb",
    "keep_alive_s",
    "event_flush_ms",
    "event_retention_h",
    "max_file_mb",
    "max_upload_mb",
    "embedding_batch",
    "embedding_timeout_s",
    "ingest_files",
    "parse_timeout_s",
    "parse_memory_mb",
    "sandbox_sessions",
    "sandbox_memory_mb",
    "sandbox_disk_mb",
    "sandbox_processes",
    "sandbox_cpus",
    "sandbox_idle_s",
    "sandbox_ttl_s",
    "cell_timeout_s",
    "cell_output_kb",
    "database_connections",
    "webhook_timeout_s",
    "webhook_retention_d",
    "tool_timeout_s",
    "max_header_kb",
    "head_timeout_s",
    "body_timeout_s",
    "max_connections",
)
NOT_BELOW_ZERO = (
    "model_retries",
    "poll_after_ms",
    "output_retention_d",
    "sandbox_pool",
    "sandbox_free_mb",
    "drain_s",
    "poll_hold_s",
    "poll_hold_max_s",
)


def without_password(url: str) -> str:
    """A database's address as it may be shown."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def load(
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    config: str | Path | None = None,
) -> Settings:
    """Put the settings together. flags: those given, by setting name. Raises ConfigError, naming the place."""
    environ = os.environ if environ is None else environ
    file = _read_file(config) if config else {}
    known = {row.name for row in dataclasses.fields(Settings)}
    for name in file:
        if name not in known:
            raise ConfigError(
                f"{config}: unknown setting {name!r}. `afterglow serve --help` and docs/configuration.md list them."
            )
    values: dict[str, Any] = {}
    for name, kind in get_type_hints(Settings).items():
        if name in TABLES:
            continue
        for place, found in (
            (FLAGS.get(name, "--" + name.replace("_", "-")), (flags or {}).get(name)),
            (PREFIX + name.upper(), environ.get(PREFIX + name.upper())),
            (f"{name} in {config}", file.get(name)),
        ):
            if found is not None:
                values[name] = _convert(place, kind, found)
                break
    values["upstreams"] = {n: _upstream(n, t, environ) for n, t in _tables(file, "upstreams")}
    values["mcp"] = {n: _mcp(n, t, environ) for n, t in _tables(file, "mcp")}
    values["models"] = {n: _model(n, t) for n, t in _tables(file, "models")}
    settings = Settings(**values)
    _check(settings)
    return settings


def _read_file(path: str | Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"The configuration file {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration file {path} is no TOML: {error}.") from None


def _convert(place: str, kind: Any, value: Any) -> Any:
    try:
        if kind is bool:
            return _boolean(value)
        if kind is int:
            return _whole(value)
        if kind is float:
            return _number(value)
        if kind is str:
            return value if isinstance(value, str) else _refuse(value)
        if kind == Mapping[str, str]:
            return _pairs(value)
        return _texts(value)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}.") from None


def _refuse(value: Any) -> Any:
    raise ValueError(f"expected text, got a {type(value).__name__}")  # not the value: it may be a secret


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"expected a number, got {value!r}")
    return number


def _whole(value: Any) -> int:
    if isinstance(value, bool | float):
        raise ValueError(f"expected a whole number, got {value!r}")
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"expected a whole number, got {value!r}") from None


def _boolean(value: Any) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    try:
        return words[str(value).lower()]
    except KeyError:
        raise ValueError(f"expected on or off, got {value!r}") from None


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _texts(value: Any) -> tuple[str, ...]:
    parts = _split(value) if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError("expected texts, as a list or comma-separated")
    return tuple(parts)


def _pairs(value: Any) -> dict[str, str]:
    if isinstance(value, Mapping):
        _texts(list(value.values()))
        return dict(value)
    pairs = {}
    for part in (part for text in _texts(value) for part in _split(text)):
        old, sign, new = part.partition("=")
        if not (sign and old.strip() and new.strip()):
            raise ValueError(f"expected OLD=NEW, got {part!r}")
        pairs[old.strip()] = new.strip()
    return pairs


def _tables(file: Mapping[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    tables = file.get(name, {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise ConfigError(f"{name}: expected tables named [{name}.NAME].")
    return list(tables.items())


def _fits(table: Mapping[str, Any], kinds: Mapping[str, type]) -> bool:
    return all(name in kinds and type(value) is kinds[name] for name, value in table.items())


def _upstream(name: str, table: Mapping[str, Any], environ: Mapping[str, str]) -> Upstream:
    kinds = {"url": str, "key_env": str, "models": list, "max_concurrency": int, "inline_images": bool}
    models = table.get("models", [])
    if not _fits(table, kinds) or "url" not in table or not all(isinstance(model, str) for model in models):
        raise ConfigError(
            f"[upstreams.{name}] takes url (needed) and key_env, texts; models, a list of texts; max_concurrency, a"
            " whole number; and inline_images, true or false."
        )
    key_env = table.get("key_env", "")
    if key_env and key_env not in environ:
        raise ConfigError(f"[upstreams.{name}]: the variable {key_env} named by key_env is not set.")
    return Upstream(
        name=name,
        url=table["url"],
        key=environ.get(key_env, "") if key_env else "",
        models=tuple(models),
        max_concurrency=table.get("max_concurrency", 0),
        inline_images=table.get("inline_images"),
    )


def _mcp(name: str, table: Mapping[str, Any], environ: Mapping[str, str]) -> McpSettings:
    kinds = {"url": str, "command": list, "key_env": str, "headers_env": dict, "env": list, "allowed_tools": list}
    lists = [table[key] for key in ("command", "env", "allowed_tools") if key in table]
    named = table.get("headers_env", {})
    if (
        not _fits(table, kinds)
        or not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name)
        or bool(table.get("url")) == bool(table.get("command"))
        or not all(isinstance(item, str) for items in (*lists, [*named.values()]) for item in items)
        or ("env" in table if table.get("url") else {"key_env", "headers_env"} & table.keys())
    ):
        raise ConfigError(
            f"[mcp.{name}] takes url, a text, with key_env, a text, and headers_env, a table of texts; or command, a"
            " list of texts, with env, a list of texts; and allowed_tools, a list of texts. Its name is one word."
        )
    if table.get("url") and not table["url"].startswith(("http://", "https://")):
        raise ConfigError(f"[mcp.{name}]: url: expected http://… or https://….")
    variables = [*([table["key_env"]] if "key_env" in table else []), *named.values(), *table.get("env", [])]
    if unset := [variable for variable in variables if variable not in environ]:
        raise ConfigError(f"[mcp.{name}]: the variable {unset[0]} is not set.")
    headers = {header: environ[variable] for header, variable in named.items()}
    if "key_env" in table:
        headers["authorization"] = f"Bearer {environ[table['key_env']]}"
    allowed = table.get("allowed_tools")
    return McpSettings(
        name=name,
        url=table.get("url", ""),
        command=tuple(table.get("command", ())),
        headers=headers,
        env={variable: environ[variable] for variable in table.get("env", [])},
        allowed_tools=None if allowed is None else tuple(allowed),
    )


def _model(name: str, table: Mapping[str, Any]) -> ModelSettings:
    kinds = {"window_tokens": int, "max_output_tokens": int, "vision": bool, "tools": bool}
    prices = {key: table[key] for key in PRICES if key in table}
    told = {key: value for key, value in table.items() if key not in PRICES}
    if (
        not _fits(told, kinds)
        or any(value < 1 for value in told.values() if type(value) is int)
        or any(type(price) not in (int, float) or not 0 <= price < math.inf for price in prices.values())
    ):
        raise ConfigError(
            f'[models."{name}"] takes window_tokens and max_output_tokens, whole numbers above 0; vision and tools,'
            " true or false; and prompt_price, cached_price and completion_price, money per million tokens."
        )
    floats: dict[str, Any] = {key: float(price) for key, price in prices.items()}
    return ModelSettings(**told, **floats)


def _check(settings: Settings) -> None:
    for name, allowed in (
        ("log_format", ("text", "json")),
        ("log_level", ("debug", "info", "warning", "error")),
        ("history", ("calls", "messages")),
        ("code_interpreter", ("auto", "native", "docker", "remote", "off")),
    ):
        if getattr(settings, name) not in allowed:
            raise ConfigError(f"{name}: expected {' or '.join(allowed)}, got {getattr(settings, name)!r}.")
    for name in ABOVE_ZERO:
        if getattr(settings, name) <= 0:
            raise ConfigError(f"{name}: must be more than 0.")
    for name in NOT_BELOW_ZERO:
        if getattr(settings, name) < 0:
            raise ConfigError(f"{name}: must not be less than 0.")
    if settings.embedding_url and not settings.embedding_url.startswith(("http://", "https://")):
        raise ConfigError(f"embedding_url: expected http://… or https://…, got {settings.embedding_url!r}.")
    if settings.embedding_url and not settings.embedding_model:
        raise ConfigError("embedding_model: embedding_url needs the name of a model beside it.")
    if not 1 <= settings.thread_store_days <= 365:
        raise ConfigError("thread_store_days: must be between 1 and 365.")
    for name in ("port", "metrics_port"):
        if not 0 <= getattr(settings, name) <= 65535:
            raise ConfigError(f"{name}: must be between 0 and 65535.")
    if settings.database_url and not settings.database_url.startswith(("postgresql://", "postgres://")):
        raise ConfigError("database_url: expected postgresql://….")  # not the value: it holds a password
    if settings.database_listen_url and not settings.database_url:
        raise ConfigError("database_listen_url: is beside database_url, which is not set.")
    if settings.blob_url and not settings.blob_url.startswith(("s3://", "gs://", "az://")):
        raise ConfigError(f"blob_url: expected s3://…, gs://… or az://…, got {settings.blob_url!r}.")
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise ConfigError("tls_cert and tls_key: one needs the other.")
    if settings.code_interpreter == "remote" and not (settings.sandbox_url and settings.sandbox_token):
        raise ConfigError("code_interpreter: the engine `remote` needs sandbox_url and sandbox_token.")
