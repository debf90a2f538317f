"""How fast WAL piles up, from samples."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis.strategies import floats, integers, lists

from agent.domain.wal_rates import ALARM_SECONDS, RELIEF_SECONDS, WalSample, WalTrend, is_bad, wal_trend

MIB = 1 << 20


def a_trend(seconds_until_full: float | None) -> WalTrend:
    return WalTrend(0, 0, 0, seconds_until_full)


@given(integers(1, 1 << 30), integers(0, 1 << 30), integers(0, 1 << 40), integers(13, 60))
def test_a_steady_outage_fills_the_volume_when_arithmetic_says(written: int, archived: int, free: int, n: int) -> None:
    kept = max(0, written - archived)
    samples = [WalSample(5.0 * i, written * i, archived * i, kept * i) for i in range(n)]
    trend = wal_trend(samples, free)
    assert trend is not None
    assert trend.written_rate == pytest.approx(written / 5)
    assert trend.archived_rate == pytest.approx(archived / 5)
    assert trend.kept_rate == pytest.approx(kept / 5)
    assert trend.seconds_until_full == (pytest.approx(free / (kept / 5)) if kept else None)


@given(lists(integers(0, 5), min_size=20, max_size=60), integers(2, 6))
def test_a_backlog_that_is_worked_off_again_and_again_does_not_grow(backlog: list[int], every: int) -> None:
    kept = [0 if i % every == 0 else files * 16 * MIB for i, files in enumerate(backlog)]
    trend = wal_trend([WalSample(5.0 * i, 0, 0, size) for i, size in enumerate(kept)], 1)
    assert trend is not None
    assert trend.kept_rate == 0
    assert trend.seconds_until_full is None


@given(floats(0, 59.9))
def test_nothing_is_said_of_less_than_a_minute(span: float) -> None:
    assert wal_trend([], 1) is None
    assert wal_trend([WalSample(0, 0, 0, 0), WalSample(span, 5, 5, 5)], 1) is None


@given(lists(integers(0, 1 << 40), min_size=3, max_size=20))
def test_the_trend_never_promises_more_than_the_samples_show(kept: list[int]) -> None:
    samples = [WalSample(60.0 * i, 0, 0, size) for i, size in enumerate(kept)]
    trend = wal_trend(samples, 1)
    assert trend is not None
    assert trend.kept_rate <= max(kept) / 60
    if all(before >= after for before, after in pairwise(kept)):
        assert trend.seconds_until_full is None


def test_a_trend_that_was_bad_must_be_clearly_better_to_be_good_again() -> None:
    between = (ALARM_SECONDS + RELIEF_SECONDS) / 2
    assert is_bad(a_trend(ALARM_SECONDS - 1), was_bad=False)
    assert not is_bad(a_trend(between), was_bad=False)
    assert is_bad(a_trend(between), was_bad=True)
    assert not is_bad(a_trend(RELIEF_SECONDS + 1), was_bad=True)
    assert not is_bad(a_trend(None), was_bad=True)
