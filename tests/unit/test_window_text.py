"""What `pitr window` shows to people."""

from datetime import timedelta

import pytest

from agent.cli.window import bars_of, sentences
from agent.domain.window import Window, restorable_window
from tests.support.wal_world import World, quiet_world


@pytest.fixture
def world() -> World:
    return quiet_world()


def window_of(world: World) -> Window:
    return world.follow(restorable_window(world.holdings()))


def told(world: World) -> str:
    return "\n".join(sentences(window_of(world), world.now + timedelta(minutes=3)))


def drawn(world: World, *, width: int = 60) -> list[str]:
    return [bar.plain for bar in bars_of(window_of(world), world.holdings(), width=width, plain=True)]


def test_the_first_sentence_says_from_when_to_when(world: World) -> None:
    assert told(world).startswith(
        "Any moment from [bold]2026-11-22 12:00:01[/bold] to [bold]2026-11-22 12:01:00 UTC[/bold] can be restored."
    )
    assert "The last archived transaction is 3 min 00 s old." in told(world)


def test_a_gap_is_told_by_time_and_by_name_and_drawn(world: World) -> None:
    lost = sorted(world.archived)[2:4]
    for name in lost:
        del world.archived[name]
    assert "except after 2026-11-22 12:00:10, before 2026-11-22 12:00:31" in told(world)
    assert f"WAL segments {lost[0]} to {lost[1]} are missing (2)." in told(world)
    bar, axis, legend = drawn(world)
    assert bar.startswith("timeline 1 (latest)  B==")
    assert "=.." in bar
    assert ".B=" in bar
    assert "2026-11-22 12:00:00" in axis
    assert ". gap" in legend


def test_a_gap_too_short_for_the_bar_is_drawn_all_the_same(world: World) -> None:
    lost = sorted(world.archived)[3]
    world.now += timedelta(days=400)
    world.end_transaction(commits=True)
    world.switch()
    world.archive()
    del world.archived[lost]
    assert "." in drawn(world)[0]


def test_a_branch_that_was_left_is_told_with_its_timeline(world: World) -> None:
    world.fork(3)
    world.now += timedelta(seconds=10)
    world.end_transaction(commits=True)
    world.switch()
    world.archive()
    assert "With TARGET_TIMELINE=1: up to 2026-11-22 12:01:00 UTC" in told(world)
    first, second, *_ = drawn(world)
    assert first.startswith("timeline 1           B")
    assert second.startswith("timeline 2 (latest)  B")


def test_a_lone_backup_is_one_state(world: World) -> None:
    world.back_up(0, late=timedelta(0), parent=None)
    world.archive()
    world.backups[:] = world.backups[-1:]
    assert told(world).startswith("Only the state of")


def test_an_empty_repository_is_told_as_that() -> None:
    assert told(World()).startswith("Nothing can be restored")
    assert drawn(World()) == []
