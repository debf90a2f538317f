"""A fixture: what the agent logs."""

import io
import logging
from collections.abc import Iterator

import pytest
import structlog

from agent.telemetry.logging import configure_logging


@pytest.fixture
def log_stream() -> Iterator[io.StringIO]:
    """What is logged during the test, which leaves logging as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logging("info", stream)
    yield stream
    structlog.reset_defaults()
    root.handlers[:], root.level = handlers, level
