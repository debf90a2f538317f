"""When a base backup is due: laws over generated schedules, histories and times."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.domain.backup_schedule import (
    LONGEST_RETRY,
    PRIMARY_PATIENCE,
    STANDBY_SPREAD,
    BackupFrom,
    BackupHistory,
    BackupSchedule,
    Why,
    cron_problem,
    next_backup,
    retry_pause,
    spread,
    waits_for_others,
)

ZONES = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
MOMENTS = st.datetimes(datetime(2020, 1, 1), datetime(2035, 1, 1), timezones=ZONES)  # noqa: DTZ001 - zones are given
DELAYS = st.integers(0, 7200).map(lambda seconds: timedelta(seconds=seconds))
CRONS = st.sampled_from(["0 2 * * *", "*/7 * * * *", "30 1,13 * * 1-5", "0 0 1 * *", "59 23 29 2 *", "15 4 * * 7"])
SCHEDULES = st.builds(BackupSchedule, CRONS, DELAYS)
PAST = st.one_of(st.none(), MOMENTS)
DAILY = BackupSchedule("0 2 * * *")
NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
TODAY = datetime(2026, 11, 23, 2, 0, tzinfo=UTC)
DAY, MINUTE = timedelta(days=1), timedelta(minutes=1)


@st.composite
def histories(draw: st.DrawFn) -> BackupHistory:
    start = draw(PAST)
    finish = None if start is None else start + timedelta(seconds=draw(st.integers(1, 100_000)))
    failures = draw(st.integers(0, 30))
    return BackupHistory(start, finish, draw(PAST), failures, draw(MOMENTS) if failures else None, draw(PAST))


@st.composite
def situations(draw: st.DrawFn) -> tuple[BackupHistory, datetime]:
    """A history, and a moment that is not before what this process remembers."""
    history = draw(histories())
    remembered = (history.gap_since, history.last_failure, history.given_up_at)
    return history, max([draw(MOMENTS), *(moment for moment in remembered if moment)])


@given(SCHEDULES, MOMENTS)
def test_the_runs_of_a_schedule_follow_each_other_without_one_left_out(
    schedule: BackupSchedule, moment: datetime
) -> None:
    last, following = schedule.last_until(moment), schedule.first_after(moment)
    assert last <= moment < following
    assert schedule.first_after(last) == following
    assert schedule.last_until(following) == following
    assert schedule.last_until(following - timedelta(microseconds=1)) == last


@given(SCHEDULES, MOMENTS, ZONES)
def test_the_zone_in_which_a_moment_is_written_changes_nothing(
    schedule: BackupSchedule, moment: datetime, zone: timezone
) -> None:
    assert schedule.first_after(moment) == schedule.first_after(moment.astimezone(zone))
    assert schedule.last_until(moment) == schedule.last_until(moment.astimezone(zone))
    assert schedule.first_after(moment).tzinfo is UTC


@given(SCHEDULES, situations())
def test_waiting_until_the_planned_moment_makes_a_backup_due(
    schedule: BackupSchedule, situation: tuple[BackupHistory, datetime]
) -> None:
    history, now = situation
    planned = next_backup(schedule, history, now)
    assert planned is not None
    then = max(now, planned.at)
    again = next_backup(schedule, history, then)
    assert again is not None
    assert again.at <= then


@given(SCHEDULES, situations())
def test_a_backup_taken_when_due_satisfies_until_the_next_regular_run(
    schedule: BackupSchedule, situation: tuple[BackupHistory, datetime]
) -> None:
    history, now = situation
    planned = next_backup(schedule, history, now)
    assert planned is not None
    start = max(now, planned.at)
    finish = start + timedelta(minutes=20)
    taken = BackupHistory(start, finish, history.gap_since, given_up_at=None)
    following = next_backup(schedule, taken, finish)
    assert following is not None
    assert following.at == schedule.first_after(finish)


@given(SCHEDULES, histories(), MOMENTS)
def test_failures_never_put_off_the_next_regular_run(
    schedule: BackupSchedule, history: BackupHistory, now: datetime
) -> None:
    planned = next_backup(schedule, history, now)
    assert planned is not None
    anchor = max(moment for moment in (now, history.last_failure, history.given_up_at, history.newest_finish) if moment)
    assert planned.at <= schedule.first_after(anchor)


@given(SCHEDULES, MOMENTS, st.integers(1, 100), DELAYS)
def test_after_a_failure_nothing_is_tried_at_once(
    schedule: BackupSchedule, failed_at: datetime, failures: int, later: timedelta
) -> None:
    history = BackupHistory(failures=failures, last_failure=failed_at)
    planned, seen_later = next_backup(schedule, history, failed_at), next_backup(schedule, history, failed_at + later)
    assert planned is not None
    assert seen_later is not None
    assert failed_at < planned.at <= failed_at + LONGEST_RETRY
    assert planned.at == min(failed_at + retry_pause(failures), schedule.first_after(failed_at))
    assert seen_later.at >= planned.at


@given(MOMENTS, histories())
def test_without_a_schedule_only_a_gap_asks_for_a_backup(now: datetime, history: BackupHistory) -> None:
    planned = next_backup(None, history, now)
    reaches_over = history.newest_start is not None and (
        history.gap_since is None or history.newest_start >= history.gap_since
    )
    if history.gap_since is None or reaches_over:
        assert planned is None


@pytest.mark.parametrize(
    ("history", "at", "why"),
    [
        (BackupHistory(), TODAY, Why.FIRST),
        (BackupHistory(NOW - 2 * DAY, NOW - 2 * DAY + MINUTE), TODAY, Why.MISSED),
        (BackupHistory(TODAY, TODAY + MINUTE), TODAY + DAY, Why.SCHEDULE),
        # It ran when a run was due: that one needs no other.
        (BackupHistory(TODAY - MINUTE, TODAY + MINUTE), TODAY + DAY, Why.SCHEDULE),
        (BackupHistory(TODAY, TODAY + MINUTE, gap_since=NOW - MINUTE), NOW - MINUTE, Why.WAL_GAP),
        (BackupHistory(TODAY, TODAY + MINUTE, gap_since=TODAY - MINUTE), TODAY + DAY, Why.SCHEDULE),
        # The clock was set back since.
        (BackupHistory(TODAY, TODAY + MINUTE, gap_since=NOW + 9 * DAY), TODAY + DAY, Why.SCHEDULE),
        (BackupHistory(TODAY - DAY, TODAY - DAY, failures=1, last_failure=NOW), NOW + MINUTE, Why.RETRY),
        (BackupHistory(TODAY - DAY, TODAY - DAY, failures=3, last_failure=NOW), NOW + 4 * MINUTE, Why.RETRY),
        # What cannot wait still cannot when it is tried again.
        (BackupHistory(failures=1, last_failure=NOW), NOW + MINUTE, Why.FIRST),
        (BackupHistory(TODAY, TODAY + MINUTE, NOW - MINUTE, 1, NOW), NOW + MINUTE, Why.WAL_GAP),
        (BackupHistory(given_up_at=NOW), TODAY + DAY, Why.SCHEDULE),
        # Another machine's clock is ahead.
        (BackupHistory(NOW + DAY, NOW + DAY), TODAY + 2 * DAY, Why.SCHEDULE),
    ],
)
def test_at_noon_the_next_daily_backup_is(history: BackupHistory, at: datetime, why: Why) -> None:
    planned = next_backup(DAILY, history, NOW)
    assert planned is not None
    assert (planned.at, planned.why) == (at, why)


def test_at_its_minute_a_run_is_due_and_not_called_missed() -> None:
    yesterday = BackupHistory(TODAY - DAY, TODAY - DAY + MINUTE)
    just_before, on_time = (next_backup(DAILY, yesterday, TODAY - MINUTE), next_backup(DAILY, yesterday, TODAY))
    assert just_before is not None
    assert on_time is not None
    assert (just_before.at, on_time.at, on_time.why) == (TODAY, TODAY, Why.SCHEDULE)


@given(st.text(max_size=30), st.integers(0, 86_400))
def test_the_spread_is_steady_and_within_its_bounds(name: str, seconds: int) -> None:
    most = timedelta(seconds=seconds)
    assert timedelta() <= spread(name, most) <= most
    assert spread(name, most) == spread(name, most)


@pytest.mark.parametrize("cron", ["0 2 * * *", "*/15 * * * *", "0 2 * * SUN", "0 2 L * *"])
def test_a_cron_expression_is_understood(cron: str) -> None:
    assert cron_problem(cron) is None


@pytest.mark.parametrize("cron", ["", "daily", "0 2 * *", "0 0 2 * * *", "60 2 * * *", "0 2 30 2 *", "0 2 * * MON-XYZ"])
def test_a_cron_expression_that_means_nothing_is_refused(cron: str) -> None:
    assert cron_problem(cron)


@pytest.mark.parametrize("why", list(Why))
def test_a_standby_takes_nothing_unless_told_and_the_primary_steps_in(why: Why) -> None:
    urgent = why in (Why.FIRST, Why.WAL_GAP)
    for server in ("pg-0", "pg-1"):
        assert waits_for_others(why, BackupFrom.PRIMARY, is_primary=False, server=server) is None
        stands_back = waits_for_others(why, BackupFrom.STANDBY, is_primary=False, server=server)
        assert stands_back is not None
        assert stands_back <= STANDBY_SPREAD < PRIMARY_PATIENCE
    assert waits_for_others(why, BackupFrom.PRIMARY, is_primary=True, server="pg-0") == timedelta()
    expected = timedelta() if urgent else PRIMARY_PATIENCE
    assert waits_for_others(why, BackupFrom.STANDBY, is_primary=True, server="pg-0") == expected
