"""Logging: one JSON object a line."""

import logging
import sys
import time
from datetime import datetime
from typing import Any, TextIO

import structlog
from structlog.tracebacks import ExceptionDictTransformer

from agent.domain.restore_target import format_time
from agent.telemetry.news import News

_REMIND_SECONDS = 60.0


def configure_logging(level: str, stream: TextIO | None = None) -> None:
    """Send the log to `stream` (default: standard output) as JSON lines from `level` on.

    Times are RFC 3339 UTC. What libraries log through `logging` goes the same way, from WARNING on, each message once a
    minute: what they say of a request that is none, whoever reaches the HTTP port could repeat for ever.
    """
    out = stream or sys.stdout
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            # Without local variables: some hold secrets.
            structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(default=_text),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(out),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers[:] = [_ToStructlog()]
    root.setLevel(max(number, logging.WARNING))


def _text(value: object) -> str:
    return format_time(value) if isinstance(value, datetime) else str(value)


class _ToStructlog(logging.Handler):
    """Hands records of the standard library's loggers to ours."""

    def __init__(self) -> None:
        super().__init__()
        self._news = News(_REMIND_SECONDS, time.monotonic)

    def emit(self, record: logging.LogRecord) -> None:
        if not self._news.is_news(f"{record.name} {record.msg}"):
            return
        values: dict[str, Any] = {"logger": record.name}
        if record.exc_info and record.exc_info[1] is not None:
            values["error"] = repr(record.exc_info[1])
        structlog.get_logger().log(record.levelno, record.getMessage(), **values)
