"""What is counted for `/metrics`: every metric once, with its name and what it means, in a registry of its own.

A label takes few values: routes by their templates, statuses, kinds. Names of models are few as a rule and anybody's
in principle; beyond MAX_MODELS different ones they count as `other`.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from typing import NamedTuple, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric

from afterglow import __version__
from afterglow.objects import ACTIVE_RUNS, RunStatus, Usage

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
OTHER = "other"
MAX_MODELS = 100
BACKLOG_S = 1.0  # however many ask, the database is asked once in it
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
API_PREFIX = re.compile(r"^/(?:openai/v1|openai|v1)(?=/)")
TRY_ENDS = ("delivered", "again", "failed")
FILE_ENDS = ("indexed", "failed", "put_back")

QUICK_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LONG_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
ROWS = (1, 2, 5, 10, 20, 50, 100, 200, 500)


class _OfModel(NamedTuple):
    """The series of one model."""

    first_token: Histogram
    call: Histogram
    prompt: Counter
    completion: Counter


class Metrics:
    """One for the process. `text` is what Prometheus reads; the numbers that the database knows are set before."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._models: dict[str, _OfModel] = {}
        self._routes: dict[tuple[str, str | None, int], tuple[Counter, Histogram]] = {}
        self._backlog_until = 0.0
        self._count_runs()
        self._count_models_and_tools()
        self._count_files()
        self._count_webhooks()
        self._count_http()
        Info("afterglow", "The version that runs.", registry=self.registry).info({"version": __version__})
        ProcessCollector(registry=self.registry)

    def _count_runs(self) -> None:
        self.database_up = self._gauge("database_up", "1 when the database answered the last scrape, else 0.")
        self.runs_queued = self._gauge("runs_queued", "Runs that wait for a worker, of all processes.")
        self.oldest_queued = self._gauge(
            "oldest_queued_run_age_seconds", "How long ago the oldest run that waits was created, to the second."
        )
        self.runs_executing = self._gauge("runs_executing", "Runs that this process executes.")
        self.runs_ended = self._counter("runs_ended", "Runs that ended here, by their last status.", "status")
        for status in sorted(set(get_args(RunStatus)) - ACTIVE_RUNS):
            self.runs_ended.labels(status)
        self.run_duration = self._histogram("run_duration_seconds", "From a run's creation to its end.", LONG_S)
        self.run_queued = self._histogram("run_queued_seconds", "From a run's creation to its first claim.", QUICK_S)
        self.runs_taken_over = self._counter("runs_taken_over", "Runs taken over from a worker that fell silent.")
        self.leases_lost = self._counter(
            "run_leases_lost", "Attempts that stopped here because the run was taken over or deleted."
        )
        self.event_flush_rows = self._histogram(
            "event_flush_rows", "Rows of streamed text that one transaction wrote.", ROWS
        )

    def _count_models_and_tools(self) -> None:
        self._first_token = self._histogram(
            "model_first_token_seconds", "From a model's call to its first token.", LONG_S, "model"
        )
        self._model_call = self._histogram("model_call_seconds", "Calls of a model that ended well.", LONG_S, "model")
        self._tokens = self._counter("model_tokens", "Tokens, `prompt` or `completion`.", "model", "kind")
        self.model_errors = self._counter("model_errors", "Calls of models that failed, by kind of error.", "kind")
        self._tool_call = self._histogram(
            "tool_call_seconds", "Calls of tools that the server runs or calls itself.", LONG_S, "tool", "outcome"
        )
        self.code_sessions = self._gauge("code_sessions_open", "Sessions of the code interpreter that are open here.")

    def _count_files(self) -> None:
        self.files_pending = self._gauge(
            "ingest_files_pending", "Files of vector stores that wait or are being indexed, of all processes."
        )
        self.files_ended = self._counter(
            "ingest_files", "Files that were in hand here, by what became of it.", "outcome"
        )
        for outcome in FILE_ENDS:
            self.files_ended.labels(outcome)
        self._chunks = self._counter("ingest_chunks", "Passages that were indexed here.")
        self._ingest = self._histogram("ingest_seconds", "Indexing a file, from its claim on.", LONG_S)

    def _count_webhooks(self) -> None:
        self.webhook_tries = self._counter(
            "webhook_tries", "Tries to deliver a webhook from here, by what became of it.", "outcome"
        )
        for outcome in TRY_ENDS:
            self.webhook_tries.labels(outcome)

    def _count_http(self) -> None:
        self._requests = self._counter("http_requests", "Requests answered.", "method", "route", "status")
        self._answered = self._histogram(
            "http_request_seconds", "From a request to the head of its answer.", QUICK_S, "method", "route"
        )
        self.open_streams = self._gauge("open_streams", "Streams of run events that are open here.")
        self.held_polls = self._gauge("held_polls", "Requests that wait here until something has another status.")

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(f"afterglow_{name}", help, registry=self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"afterglow_{name}", help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"afterglow_{name}", help, labels, buckets=buckets, registry=self.registry)

    # --- what takes more than one count --------------------------------------------------------------------------

    def model_answered(self, model: str, usage: Usage, first_token_s: float | None, took_s: float) -> None:
        """model: the name that its server gave it. usage: of this call, as reported or estimated."""
        series = self._models.get(model) or self._add_model(model)
        if first_token_s is not None:
            series.first_token.observe(first_token_s)
        series.call.observe(took_s)
        series.prompt.inc(usage.prompt_tokens)
        series.completion.inc(usage.completion_tokens)

    def _add_model(self, model: str) -> _OfModel:
        name = model if len(self._models) < MAX_MODELS else OTHER
        series = _OfModel(
            self._first_token.labels(name),
            self._model_call.labels(name),
            self._tokens.labels(name, "prompt"),
            self._tokens.labels(name, "completion"),
        )
        if name == model:
            self._models[model] = series
        return series

    def tool_answered(self, tool: str, outcome: str, took_s: float) -> None:
        """outcome: `ok`, `failed` or `interrupted`."""
        self._tool_call.labels(tool, outcome).observe(took_s)

    def file_indexed(self, chunks: int, took_s: float) -> None:
        self.files_ended.labels("indexed").inc()
        self._chunks.inc(chunks)
        self._ingest.observe(took_s)

    def request_answered(self, method: str, route: str | None, status: int, took_s: float) -> None:
        """route: the template of its path, `/v1/threads/{thread_id}`; None when no route took it."""
        key = method if method in METHODS else OTHER, route, status // 100
        requests, answered = self._routes.get(key) or self._add_route(*key)
        requests.inc()
        answered.observe(took_s)

    def _add_route(self, method: str, route: str | None, hundreds: int) -> tuple[Counter, Histogram]:
        name = OTHER if route is None else API_PREFIX.sub("/v1", route)
        series = self._requests.labels(method, name, f"{hundreds}xx"), self._answered.labels(method, name)
        self._routes[method, route, hundreds] = series
        return series

    def backlog_is_old(self) -> bool:
        """Whether the database should be asked again; who is told so is to ask it."""
        now = time.monotonic()
        if now < self._backlog_until:
            return False
        self._backlog_until = now + BACKLOG_S
        return True

    def database_told(self, runs: float, oldest_age_s: float, files: float) -> None:
        self.database_up.set(1)
        self.runs_queued.set(runs)
        self.oldest_queued.set(oldest_age_s)
        self.files_pending.set(files)

    def database_silent(self) -> None:
        """What only the database knows is not known just now."""
        self.database_told(math.nan, math.nan, math.nan)
        self.database_up.set(0)

    def collect(self) -> Iterator[Metric]:
        """Everything, but not when each series began: that doubles their number, and nobody asks."""
        for metric in self.registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self)
