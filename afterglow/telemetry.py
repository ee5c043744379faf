"""Logging: one line per event on stderr, as text or JSON, with the request's or run's id.

Never a key, never the text of a message: callers log ids, counts, names and durations only. What a line says in
numbers it may say in fields as well, `extra={"fields": {…}}`, which are keys of their own in JSON. What is counted is
in `metrics.py`.
"""

from __future__ import annotations

import contextvars
import json
import logging
import sys
import time
from typing import Any

# The request, run or file that the current task works for; set at the HTTP edge, by the worker and by the pipeline.
subject: contextvars.ContextVar[str] = contextvars.ContextVar("subject", default="")
# The trace of whoever sent the current request, as its header says; set at the HTTP edge when traces are kept.
traceparent: contextvars.ContextVar[str] = contextvars.ContextVar("traceparent", default="")

log = logging.getLogger("afterglow")


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        about = subject.get()
        line = (
            f"{stamp} {record.levelname.lower():<7} {_printable(record.getMessage())}{f'  [{about}]' if about else ''}"
        )
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if about := subject.get():
            fields["subject"] = about
        fields |= getattr(record, "fields", {})
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)  # the standard one: it takes lone surrogates


def _printable(text: str) -> str:
    """What callers put into a path or a name must not begin a line of its own, or speak to the terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def configure(log_format: str, log_level: str) -> None:
    """Send the log of this package and of the HTTP server to stderr. log_format: `text` or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    for name in ("afterglow", "uvicorn.error", "opentelemetry"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(log_level.upper())
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # whoever sent a broken form is told
    for name in ("uvicorn.error", "opentelemetry"):
        logging.getLogger(name).setLevel(max(logging.getLogger("afterglow").level, logging.WARNING))
