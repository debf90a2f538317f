"""What the window says can be restored, the plan reaches; what it says cannot, the plan refuses."""

from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import DataObject, data

from agent.domain.archived_path import ArchivedPath
from agent.domain.restore_target import RestoreTarget, TargetKind
from agent.domain.window import TimelineWindow, restorable_window, window_begin
from agent.errors import NoRestorePath
from tests.support.wal_world import World, quiet_world, worlds

LAWS = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@LAWS
@given(data())
def test_every_range_is_reached_from_end_to_end(drawn: DataObject) -> None:
    world = drawn.draw(worlds())
    for each in world.follow(restorable_window(world.holdings())).timelines:
        for reach in each.ranges:
            for lsn in {reach.from_lsn, (reach.from_lsn + reach.to_lsn) // 2, reach.to_lsn} - {reach.from_lsn}:
                plan = world.plan(RestoreTarget(TargetKind.LSN, lsn=lsn, timeline=str(each.timeline)))
                replay = world.replay(plan.backup, plan.effective_target, plan.timeline, plan.segments)
                assert replay.reached
                assert replay.consistent


@LAWS
@given(data())
def test_nothing_is_reached_from_outside_of_all_ranges(drawn: DataObject) -> None:
    world = drawn.draw(worlds())
    for each in world.follow(restorable_window(world.holdings())).timelines:
        for outside in lsns_outside(each):
            with pytest.raises(NoRestorePath):
                world.plan(RestoreTarget(TargetKind.LSN, lsn=outside, timeline=str(each.timeline)))


@LAWS
@given(data())
def test_expiry_and_the_window_agree_from_when_on_all_is_reached(drawn: DataObject) -> None:
    world = drawn.draw(worlds())
    held = world.holdings()
    window = world.follow(restorable_window(held))
    runs = ArchivedPath(held, window.latest).runs if window.latest is not None else ()
    current = window.current
    is_to_the_end = current is not None and runs[-1].holds(current.from_lsn - 1, current.from_lsn)
    assert window_begin(held) == (current.from_time if current is not None and is_to_the_end else None)


def lsns_outside(window: TimelineWindow) -> list[int]:
    return [reach.from_lsn - 8 for reach in window.ranges[:1]]


@pytest.fixture
def world() -> World:
    return quiet_world()


def test_a_window_goes_from_the_first_backup_to_the_last_commit(world: World) -> None:
    window = world.follow(restorable_window(world.holdings()))
    (timeline,) = window.timelines
    (reach,) = timeline.ranges
    first = world.backups[0]
    assert (reach.backup, reach.from_time, reach.from_lsn) == (first.name, first.finish_time, first.finish_lsn)
    assert reach.to_time == world.now
    assert window.gaps == ()
    assert window.current == reach
    assert window_begin(world.holdings()) == reach.from_time


def test_a_gap_divides_the_window_and_is_named(world: World) -> None:
    lost = sorted(world.archived)[2:4]
    for name in lost:
        del world.archived[name]
    window = world.follow(restorable_window(world.holdings()))
    (gap,) = window.gaps
    assert (gap.timeline, gap.first_missing, gap.last_missing, gap.segments) == (1, *lost, 2)
    before, after = window.timelines[0].ranges
    assert window_begin(world.holdings()) == after.from_time
    assert (before.backup, after.backup) == tuple(backup.name for backup in world.backups)
    assert before.to_time == world.backups[0].finish_time + timedelta(seconds=10)
    assert window.current == after


def test_a_backup_with_nothing_after_it_is_one_state(world: World) -> None:
    world.back_up(0, late=timedelta(0), parent=None)
    world.archive()
    world.backups[:] = world.backups[-1:]
    window = world.follow(restorable_window(world.holdings()))
    assert window.current is not None
    assert window.current.is_one_state


def test_a_timeline_reaches_back_over_its_parents_backups(world: World) -> None:
    world.fork(2)
    world.now += timedelta(seconds=10)
    world.end_transaction(commits=True)
    world.switch()
    world.archive()
    window = world.follow(restorable_window(world.holdings()))
    first, second = window.timelines
    assert (second.parent, second.switch_lsn) == (1, world.histories[2][0].switch_lsn)
    assert window.latest == 2
    assert first.ranges[0].from_lsn == second.ranges[0].from_lsn
    assert second.ranges[0].to_time == world.now


def test_nothing_is_an_empty_window() -> None:
    window = World().follow(restorable_window(World().holdings()))
    assert (window.timelines, window.gaps, window.latest, window.current) == ((), (), None, None)
