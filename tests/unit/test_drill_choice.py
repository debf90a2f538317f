"""Which moment a drill proves: one that the newest base backup that can be used reaches."""

from dataclasses import replace
from datetime import timedelta

from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import DataObject, data, floats

from agent.domain.archived_path import Holdings
from agent.domain.drill import choose_drill
from agent.domain.restore_target import TargetKind
from tests.support.wal_world import World, worlds

LAWS = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
SHARES = floats(0, 1, exclude_max=True)


@LAWS
@given(data(), SHARES)
def test_what_a_drill_chooses_can_be_planned_and_replayed(drawn: DataObject, share: float) -> None:
    world = drawn.draw(worlds())
    choice = world.follow(choose_drill(world.holdings(), share))
    if choice is None:
        return
    plan = world.plan(choice.target, choice.backup)
    assert plan.backup.name == choice.backup
    replay = world.replay(plan.backup, plan.effective_target, plan.timeline, plan.segments)
    assert replay.reached
    assert replay.consistent


def test_with_nothing_in_the_repository_there_is_nothing_to_choose() -> None:
    world = World()
    assert world.follow(choose_drill(replace(world.holdings(), backups=()), 0.5)) is None
    # Without WAL nothing says how large a segment is.
    assert world.follow(choose_drill(Holdings((), {}, {}, 0), 0.5)) is None


def test_a_backup_that_nothing_follows_is_proved_as_it_is() -> None:
    world = World()
    world.end_transaction(commits=True)
    world.back_up(1, late=timedelta(0), parent=None)
    world.archive()
    choice = world.follow(choose_drill(world.holdings(), 0.5))
    assert choice is not None
    assert choice.target.kind is TargetKind.IMMEDIATE
    assert choice.moment == world.backups[0].finish_time
    assert choice.backup == world.backups[0].name
