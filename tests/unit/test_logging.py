"""The log is JSON lines, and shows no secret even where the program breaks."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from agent.telemetry.logging import configure_logging


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What is logged during the test, which leaves logging as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logging("info", stream)
    yield stream
    structlog.reset_defaults()
    root.handlers[:], root.level = handlers, level


def test_a_traceback_does_not_show_local_variables(stream: io.StringIO) -> None:
    def connect() -> None:
        password = "canary"
        raise ValueError(len(password))

    try:
        connect()
    except ValueError:
        structlog.get_logger().exception("request broke")
    record = json.loads(stream.getvalue())
    assert record["exception"][0]["exc_type"] == "ValueError"
    assert "canary" not in stream.getvalue()
