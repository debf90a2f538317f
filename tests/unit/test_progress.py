"""Progress of long work in the log: seldom, and with what a waiting person asks for."""

import structlog
from structlog.testing import capture_logs

from agent.telemetry.progress import Pace, Progress, ProgressLog


class SetClock:
    """A clock that stands where it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_progress_is_logged_with_percentage_rate_and_time_left() -> None:
    structlog.reset_defaults()
    clock = SetClock()
    progress_log = ProgressLog("restore progressed", clock, seconds=10)
    with capture_logs() as lines:
        progress_log.report(Progress("hydrating", 0, 400))
        for done in (50, 90, 100, 110):
            clock.now += 5
            progress_log.report(Progress("hydrating", done, 400))
    assert [(line["event"], line["stage"], line["percent"]) for line in lines] == [
        ("restore progressed", "hydrating", 22.5),
        ("restore progressed", "hydrating", 27.5),
    ]
    assert lines[0]["bytes_per_second"] == 9
    assert lines[0]["seconds_left"] == 34


def test_a_new_stage_begins_its_own_count() -> None:
    structlog.reset_defaults()
    clock = SetClock()
    progress_log = ProgressLog("restore progressed", clock, seconds=10)
    with capture_logs() as lines:
        progress_log.report(Progress("hydrating", 400, 400))
        clock.now += 60
        progress_log.report(Progress("replaying", 100, 200))
        clock.now += 10
        progress_log.report(Progress("replaying", 120, 200))
    assert [(line["stage"], line["bytes_per_second"], line["seconds_left"]) for line in lines] == [("replaying", 2, 40)]


def test_unknown_totals_and_standstill_leave_the_time_open() -> None:
    structlog.reset_defaults()
    clock = SetClock()
    progress_log = ProgressLog("restore progressed", clock, seconds=10)
    with capture_logs() as lines:
        for stage, total in (("hydrating", 100), ("replaying", 0)):
            progress_log.report(Progress(stage, 0, total))
            clock.now += 10
            progress_log.report(Progress(stage, 0, total))
    assert [line["seconds_left"] for line in lines] == [None, None]


def told(pace: Pace) -> tuple[float | None, float | None]:
    return pace.rate, pace.seconds_left


def test_a_stage_that_stands_still_slows_down_and_a_new_one_begins_anew() -> None:
    clock = SetClock()
    pace = Pace(clock)
    assert told(pace) == (None, None)
    pace.report(Progress("copying files", 0, 1000))
    clock.now += 10
    pace.report(Progress("copying files", 100, 1000))
    assert told(pace) == (10, 90)
    clock.now += 10
    assert told(pace) == (5, 180)
    clock.now += 40
    pace.report(Progress("copying files", 500, 1000))
    assert pace.rate == 8, "of the last report before the window, and since"
    pace.report(Progress("waiting for WAL", 0, 50))
    assert told(pace) == (None, None)


def test_idle_is_what_passes_without_coming_further() -> None:
    clock = SetClock()
    pace = Pace(clock)
    for done in (0, 10, 20):
        clock.now += 5
        pace.report(Progress("copying files", done, 100))
    clock.now += 40
    pace.report(Progress("copying files", 20, 100))
    assert pace.idle_seconds == 40
    pace.report(Progress("waiting for WAL"))
    assert pace.idle_seconds == 0
