"""The log is JSON lines, and shows no secret even where the program breaks."""

import io
import json
import logging
from datetime import datetime, timedelta, timezone

import structlog


def test_a_traceback_does_not_show_local_variables(log_stream: io.StringIO) -> None:
    def connect() -> None:
        password = "canary"
        raise ValueError(len(password))

    try:
        connect()
    except ValueError:
        structlog.get_logger().exception("request broke")
    record = json.loads(log_stream.getvalue())
    assert record["exception"][0]["exc_type"] == "ValueError"
    assert "canary" not in log_stream.getvalue()


def test_what_a_library_says_again_and_again_is_told_once(log_stream: io.StringIO) -> None:
    for number in range(100):
        logging.getLogger("library").error("request from %s", number)
    logging.getLogger("library").error("something else")
    assert [json.loads(line)["event"] for line in log_stream.getvalue().splitlines()] == [
        "request from 0",
        "something else",
    ]


def test_a_time_is_told_as_everywhere(log_stream: io.StringIO) -> None:
    begun_at = datetime(2026, 11, 23, 10, 0, 4, tzinfo=timezone(timedelta(hours=1)))
    structlog.get_logger().info("abandoned upload removed", begun_at=begun_at)
    assert json.loads(log_stream.getvalue())["begun_at"] == "2026-11-23T09:00:04.000000Z"
