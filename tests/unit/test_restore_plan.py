"""A plan leads where PostgreSQL, given exactly its WAL, arrives at the target; where there is none, nothing would."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis.strategies import DataObject, data

from agent.domain.catalog import Backup
from agent.domain.lsn import format_lsn
from agent.domain.restore_plan import RestorePlan
from agent.domain.restore_target import RestoreTarget, TargetKind
from agent.domain.timeline import Stretch, path_to, timeline_at
from agent.domain.wal import parse_segment_name, segment_name
from agent.domain.wal_records import RecordKind
from agent.errors import NoRestorePath
from tests.support.wal_world import BEGIN, Replay, World, targets, worlds
from tests.support.wal_writer import SEGMENT_BYTES

LAWS = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def plan_or_none(world: World, target: RestoreTarget) -> RestorePlan | None:
    try:
        return world.plan(target)
    except NoRestorePath:
        return None


@LAWS
@given(data())
def test_a_plan_leads_to_its_target_over_unbroken_wal(drawn: DataObject) -> None:
    world = drawn.draw(worlds())
    target = drawn.draw(targets(world))
    plan = plan_or_none(world, target)
    event(f"{target.kind}: {'reached' if plan else 'refused'}")
    if plan is None:  # the next test says whether that is right
        return
    require_sound(world, plan)
    replay = world.replay(plan.backup, plan.effective_target, plan.timeline, plan.segments)
    assert replay.reached
    assert replay.consistent
    assert target.kind is not TargetKind.TIME or is_exact(world, plan.timeline, target, replay)
    if plan.effective_target.kind is not TargetKind.END_OF_WAL:
        require_copy_of_the_last_timeline(world, plan, replay)


def require_copy_of_the_last_timeline(world: World, plan: RestorePlan, replay: Replay) -> None:
    """Recovery looks for prepared transactions in the segment as the timeline has it on which replay ended."""
    last = replay.stop_lsn - 1
    timeline = timeline_at(path_to(plan.timeline, world.histories.get(plan.timeline, ())), last)
    copy = segment_name(timeline, last, SEGMENT_BYTES)
    if plan.note.startswith("replay ends before timeline"):
        event("a fork in the last segment")
    assert copy in plan.segments or copy not in world.archived


@LAWS
@given(data())
def test_where_the_clock_was_set_back_a_plan_still_leads_to_where_postgresql_stops(drawn: DataObject) -> None:
    world = drawn.draw(worlds(is_set_back=True))
    target = drawn.draw(targets(world))
    plan = plan_or_none(world, target)
    event(f"{target.kind}: {'reached' if plan else 'refused'}")
    if plan is None:
        return
    replay = world.replay(plan.backup, plan.effective_target, plan.timeline, plan.segments)
    assert replay.reached
    assert replay.consistent


@LAWS
@given(data())
def test_what_is_archived_after_a_plan_was_made_is_not_replayed_beyond_the_time(drawn: DataObject) -> None:
    world = drawn.draw(worlds())
    target = drawn.draw(targets(world).filter(lambda target: target.kind is TargetKind.TIME))
    plan = plan_or_none(world, target)
    if plan is None:
        return
    event(plan.effective_target.kind)
    world.now += timedelta(seconds=1)
    world.end_transaction(commits=True)
    world.switch()
    world.archive()
    segments = unbroken_segments(world, plan.backup, plan.timeline)
    replay = world.replay(plan.backup, plan.effective_target, plan.timeline, segments)
    assert replay.reached
    assert is_exact(world, plan.timeline, target, replay)


@LAWS
@given(data())
def test_no_newer_or_sounder_base_backup_would_reach_the_target(drawn: DataObject) -> None:
    world = drawn.draw(worlds())
    target = drawn.draw(targets(world))
    timeline = int(target.timeline) if target.timeline != "latest" else max(world.writers)
    plan = plan_or_none(world, target)

    def rank(backup: Backup) -> tuple[int, bool, int]:
        # Several points may have one name: then the last that can be reached is meant.
        replay = world.replay(backup, target, timeline, unbroken_segments(world, backup, timeline))
        point = replay.stop_lsn if target.kind is TargetKind.NAME else 0
        return point, target.kind is TargetKind.IMMEDIATE or not backup.corrupt_pages, backup.finish_lsn

    better = [backup for backup in world.backups if plan is None or rank(backup) > rank(plan.backup)]
    assert [backup.name for backup in better if would_reach(world, backup, target, timeline)] == []


def require_sound(world: World, plan: RestorePlan) -> None:
    first = plan.backup.start_lsn - plan.backup.start_lsn % SEGMENT_BYTES
    expected = [world.name_on_path(plan.timeline, first + i * SEGMENT_BYTES) for i in range(len(plan.segments))]
    assert list(plan.segments) == expected
    assert set(plan.segments) <= world.archived.keys()
    assert plan.effective_target.timeline == str(plan.timeline)
    assert is_on_path(world, plan.backup, plan.timeline)
    assert plan.chain[0].parent is None
    assert [backup.parent for backup in plan.chain[1:]] == [backup.name for backup in plan.chain[:-1]]
    assert plan.chain[-1] == plan.backup


def is_on_path(world: World, backup: Backup, timeline: int) -> bool:
    path = path_to(timeline, world.histories.get(timeline, ()))
    stretches = [stretch for stretch in path if stretch.timeline == backup.timeline]
    return any(stretch.to_lsn is None or backup.finish_lsn <= stretch.to_lsn for stretch in stretches)


def is_exact(world: World, timeline: int, target: RestoreTarget, replay: Replay) -> bool:
    """Tell whether exactly the transactions up to the target time are there."""
    there, wanted = set(), set()
    for record in world.on_path(timeline):
        if record.kind is RecordKind.COMMIT and record.time is not None and target.time is not None:
            if record.lsn < replay.stop_lsn:
                there.add(record.lsn)
            if record.time < target.time or (target.inclusive and record.time == target.time):
                wanted.add(record.lsn)
    return there == wanted


def would_reach(world: World, backup: Backup, target: RestoreTarget, timeline: int) -> bool:
    """Tell, knowing everything, whether `backup` certainly leads to `target`."""
    if not (is_on_path(world, backup, timeline) and has_parents(world, backup)):
        return False
    segments = unbroken_segments(world, backup, timeline)
    replay = world.replay(backup, target, timeline, segments)
    if not replay.consistent:
        return False
    can_end_here = not goes_on(world, timeline, segments)
    match target.kind:
        case TargetKind.END_OF_WAL:
            return can_end_here
        case TargetKind.TIME:
            assert target.time is not None
            if target.time < backup.finish_time or not is_exact(world, timeline, target, replay):
                return False
            return replay.reached or (can_end_here and shows(world, timeline, target, replay))
        case TargetKind.LSN:
            assert target.lsn is not None
            return replay.reached and target.lsn >= backup.finish_lsn
        case _:
            return replay.reached


def has_parents(world: World, backup: Backup) -> bool:
    names = {held.name for held in world.backups}
    return backup.parent is None or backup.parent in names


def unbroken_segments(world: World, backup: Backup, timeline: int) -> list[str]:
    segments: list[str] = []
    while (name := world.name_on_path(timeline, backup.start_lsn + len(segments) * SEGMENT_BYTES)) in world.archived:
        segments.append(name)
    return segments


def goes_on(world: World, timeline: int, segments: Sequence[str]) -> bool:
    """Tell whether WAL of the path is archived beyond a hole, or PostgreSQL would go on with another branch."""
    last_timeline, last_lsn = parse_segment_name(segments[-1], SEGMENT_BYTES)
    path = {stretch.timeline for stretch in path_to(timeline, world.histories.get(timeline, ()))}
    for name in world.archived:
        of_timeline, lsn = parse_segment_name(name, SEGMENT_BYTES)
        if lsn > last_lsn and world.name_on_path(timeline, lsn) == name:
            return True
        if lsn == last_lsn + SEGMENT_BYTES and of_timeline in path and of_timeline >= last_timeline:
            return True
    return False


def shows(world: World, timeline: int, target: RestoreTarget, replay: Replay) -> bool:
    times = [record.time for record in world.on_path(timeline) if record.end_lsn <= replay.stop_lsn]
    return any(time is not None and target.time is not None and time >= target.time for time in times)


@pytest.fixture
def world() -> World:
    """A base backup, then a commit every 10 seconds in a segment of its own, then quiet; all archived."""
    world = World()
    world.end_transaction(commits=True)
    world.back_up(1, late=timedelta(0), parent=None)
    for _ in range(5):
        world.now += timedelta(seconds=10)
        world.end_transaction(commits=True)
        world.switch()
    world.archive()
    return world


def test_the_transaction_that_ends_at_an_inclusive_lsn_is_known_for_the_last_one(world: World) -> None:
    commit = [record for record in world.records[1] if record.kind is RecordKind.COMMIT][-2]
    target = RestoreTarget(TargetKind.LSN, lsn=commit.lsn)
    assert world.plan(target).stop_commit_at == commit.time
    assert world.plan(replace(target, inclusive=False)).stop_commit_at is None
    assert world.plan(replace(target, lsn=commit.lsn - 8)).stop_commit_at == commit.time, "the next record is meant"


def test_a_record_of_no_interest_at_an_inclusive_lsn_is_not_taken_for_the_transaction_after_it() -> None:
    world = World()
    world.end_transaction(commits=True)
    world.back_up(0, late=timedelta(0), parent=None)
    first, _ = world.writer.filler(100)
    world.end_transaction(commits=True)
    world.switch()
    world.archive()
    assert world.plan(RestoreTarget(TargetKind.LSN, lsn=first)).stop_commit_at is None
    assert world.plan(RestoreTarget(TargetKind.LSN, lsn=first + 8)).stop_commit_at == world.now


def test_the_last_transaction_of_all_is_known_for_the_last_one_though_its_time_becomes_an_lsn() -> None:
    world = World()
    world.end_transaction(commits=True)
    world.back_up(0, late=timedelta(0), parent=None)
    world.now += timedelta(minutes=1)
    world.end_transaction(commits=True)
    world.writer.filler(SEGMENT_BYTES)  # goes on in a segment that is not archived
    world.archive()
    plan = world.plan(at(world.now))
    assert plan.effective_target.lsn == world.records[1][-1].lsn
    assert plan.stop_commit_at == world.now


def test_right_before_the_first_record_of_a_timeline_replay_ends_with_the_last_one_of_the_timeline_before() -> None:
    world = World()
    world.end_transaction(commits=True)
    world.back_up(0, late=timedelta(0), parent=None)
    world.end_transaction(commits=True)
    last = world.records[1][-1]
    last_moment = world.now
    world.fork(0)
    world.switch()
    world.archive()
    earlier_copy = segment_name(1, last.lsn, SEGMENT_BYTES)
    before_fork = RestoreTarget(TargetKind.LSN, lsn=last.end_lsn, inclusive=False)

    def ends_with_the_last(plan: RestorePlan) -> bool:
        told = plan.effective_target
        return (told.lsn, told.inclusive, plan.stop_commit_at) == (last.lsn, True, last_moment)

    plan = world.plan(before_fork)
    assert ends_with_the_last(plan)
    assert plan.timeline == 2, "the first server never came to archive its last segment"
    assert plan.note == "replay ends where timeline 1 was left"
    world.archived[earlier_copy] = world.writers[1].segments()[-1]
    plan = world.plan(before_fork)
    assert ends_with_the_last(plan)
    assert plan.timeline == 1
    assert plan.last_segment == earlier_copy
    inclusive = world.plan(replace(before_fork, inclusive=True))
    assert (inclusive.timeline, inclusive.stop_commit_at) == (2, None)


def at(moment: datetime, *, timeline: str = "latest") -> RestoreTarget:
    return RestoreTarget(TargetKind.TIME, time=moment, timeline=timeline)


def refusal(world: World, target: RestoreTarget, backup_name: str | None = None) -> NoRestorePath:
    with pytest.raises(NoRestorePath) as refused:
        world.plan(target, backup_name)
    return refused.value


def test_a_time_before_the_base_backup_is_refused_with_the_nearest_after(world: World) -> None:
    (backup,) = world.backups
    for moment in (datetime(2000, 1, 1, tzinfo=UTC), BEGIN - timedelta(seconds=1), BEGIN + timedelta(microseconds=1)):
        refused = refusal(world, at(moment))
        assert "was complete only at 2026-11-22T12:00:00.700000Z" in refused.message
        assert (refused.nearest_before, refused.nearest_after) == (None, backup.finish_time)


def test_a_time_after_everything_is_refused_with_the_last_commit(world: World) -> None:
    refused = refusal(world, at(world.now + timedelta(microseconds=1)))
    assert "the archived WAL shows nothing after 2026-11-22T12:00:50.700000Z" in refused.message
    assert (refused.nearest_before, refused.nearest_after) == (world.now, None)
    assert "2026-11-22T12:00:50.700000Z (before it)" in refused.hint
    assert "pg_switch_wal()" in refused.hint
    assert "TARGET_TIMELINE" not in refused.hint


def test_a_time_on_an_idle_server_is_replayed_to_the_end_and_says_so(world: World) -> None:
    idle = world.now + timedelta(minutes=30)
    world.now += timedelta(hours=1)
    world.checkpoint()
    world.switch()
    world.archive()
    plan = world.plan(at(idle))
    end = world.records[1][-1]
    assert end.kind is RecordKind.SWITCH
    assert plan.effective_target == RestoreTarget(TargetKind.LSN, lsn=end.lsn, timeline="1")
    assert plan.target == at(idle)
    assert plan.last_segment == max(world.archived)
    assert plan.note == (
        "no transaction ended after 2026-11-22T12:30:50.700000Z: replay goes to the end of the WAL archived by now, "
        f"LSN {format_lsn(end.lsn)}"
    )


def test_a_plan_reads_no_more_wal_than_it_needs(world: World) -> None:
    plan = world.plan(at(BEGIN + timedelta(seconds=25)))
    assert plan.note == ""
    assert [*plan.segments] == sorted(world.archived)[:4]
    assert plan.stop_lsn is not None
    assert plan.stop_lsn // SEGMENT_BYTES == 4, "the commit at 30 seconds"


def test_a_hole_is_named_and_what_lies_before_it_can_be_reached(world: World) -> None:
    fourth = sorted(world.archived)[3]
    del world.archived[fourth]
    refused = refusal(world, at(BEGIN + timedelta(seconds=35)))
    assert f"WAL segment {fourth} is missing, though WAL after that is there" in refused.message
    assert refused.nearest_before == BEGIN + timedelta(seconds=20.7)
    assert fourth in refusal(world, RestoreTarget()).message
    assert "pg_switch_wal()" not in refused.hint
    assert [*world.plan(at(BEGIN + timedelta(seconds=15))).segments] == sorted(world.archived)[:3]


def test_damage_in_the_middle_is_the_end_of_what_can_be_reached(world: World) -> None:
    fifth, last = sorted(world.archived)[4:6]
    for name in (fifth, last):
        world.archived[name] = world.archived[name][:40] + bytes(SEGMENT_BYTES - 40)
    assert f"WAL segment {fifth} is damaged" in refusal(world, at(BEGIN + timedelta(seconds=45))).message
    assert [*world.plan(at(BEGIN + timedelta(seconds=25))).segments] == sorted(world.archived)[:4]


def test_a_delta_whose_parent_is_gone_is_passed_over_with_a_word(world: World) -> None:
    (full,) = world.backups
    world.back_up(0, late=timedelta(0), parent=replace(full, name="base_000000010000000000000FFF"))
    world.now += timedelta(seconds=10)
    world.end_transaction(commits=True)
    world.switch()
    world.archive()
    plan = world.plan(RestoreTarget())
    assert plan.backup == full
    assert "base_000000010000000000000FFF, which it builds on, is missing" in plan.note
    delta = world.backups[-1].name
    assert "is missing" in refusal(world, RestoreTarget(), delta).message


@pytest.mark.parametrize(
    "target", [RestoreTarget(), RestoreTarget(TargetKind.NAME, name="here"), at(BEGIN + timedelta(seconds=66))], ids=str
)
def test_a_base_backup_with_corrupt_pages_is_the_last_choice_and_told(world: World, target: RestoreTarget) -> None:
    world.now = BEGIN + timedelta(seconds=60)
    world.back_up(0, late=timedelta(0), parent=None, corrupt_pages=3)
    world.now += timedelta(seconds=10)
    world.end_transaction(commits=True)
    world.restore_point("here")
    world.switch()
    world.archive()
    sound, corrupt = world.backups
    plan = world.plan(target)
    assert plan.backup == sound
    assert plan.note == f"base backup {corrupt.name} is not used: it has 3 corrupt pages"
    named = world.plan(target, corrupt.name)
    assert (named.backup, named.note) == (corrupt, f"base backup {corrupt.name} has 3 corrupt pages")
    assert world.plan(RestoreTarget(TargetKind.IMMEDIATE)).backup == corrupt
    del world.archived[sorted(world.archived)[3]]
    after_the_hole = world.plan(target)
    assert after_the_hole.backup == corrupt
    assert f"base backup {corrupt.name} has 3 corrupt pages" in after_the_hole.note


@pytest.mark.parametrize("corrupt_pages", [0, 3])
def test_of_several_restore_points_of_one_name_corrupt_pages_choose_no_other(world: World, corrupt_pages: int) -> None:
    for pages in (0, corrupt_pages):
        world.now += timedelta(hours=24)
        world.back_up(0, late=timedelta(0), parent=None, corrupt_pages=pages)
        world.restore_point("nightly")
        world.switch()
    world.archive()
    plan = world.plan(RestoreTarget(TargetKind.NAME, name="nightly"))
    assert plan.stop_lsn is not None
    assert plan.stop_lsn > world.backups[-1].finish_lsn


def test_a_named_base_backup_is_used_or_refused_but_never_replaced(world: World) -> None:
    world.back_up(0, late=timedelta(0), parent=None)
    world.archive()
    first, second = world.backups
    assert world.plan(RestoreTarget(), first.name).backup == first
    assert second.name in refusal(world, at(BEGIN + timedelta(seconds=15)), second.name).message
    assert "there is no base backup base_X" in refusal(world, RestoreTarget(), "base_X").message


def test_a_time_just_before_the_recorded_end_of_a_quiet_backup_is_reached(world: World) -> None:
    # WAL-G writes the finish time up to a second late; no transaction ended meanwhile.
    world.now += timedelta(seconds=10)
    world.back_up(0, late=timedelta(seconds=1), parent=None)
    moment = world.now + timedelta(milliseconds=500)
    world.now += timedelta(seconds=2)
    world.end_transaction(commits=True)
    world.switch()
    world.archive()
    assert world.plan(at(moment)).backup == world.backups[-1]


@pytest.mark.parametrize(("seconds", "told"), [(5, "the clock was set back"), (30, "shows nothing after")])
def test_wal_before_the_base_backup_shows_no_time_after_it(seconds: int, told: str) -> None:
    world = World()
    for _ in range(4):
        world.now -= timedelta(seconds=20)  # from the second one on within one segment
        world.end_transaction(commits=True)
    world.now -= timedelta(seconds=20)
    world.back_up(0, late=timedelta(0), parent=None)
    world.archive()
    with pytest.raises(NoRestorePath, match=told):
        world.plan(at(world.now + timedelta(seconds=seconds)))


def test_latest_is_the_newest_timeline_and_a_number_is_followed_as_given(world: World) -> None:
    world.fork(4)
    world.now += timedelta(seconds=10)
    world.end_transaction(commits=True)
    world.switch()
    world.archive()
    assert world.plan(RestoreTarget()).timeline == 2
    assert world.plan(RestoreTarget()).note == "", "timeline 1 leads to timeline 2"
    assert world.plan(RestoreTarget(timeline="current")).timeline == 1
    assert world.plan(RestoreTarget(timeline="1")).last_segment[:8] == "00000001"


def test_latest_tells_which_branches_it_does_not_come_from(world: World) -> None:
    world.fork(1)
    world.end_transaction(commits=True)
    world.switch()
    world.timeline = 1
    world.fork(3)
    world.end_transaction(commits=True)
    world.switch()
    world.archive()
    left_at = format_lsn(world.histories[2][-1].switch_lsn)
    plan = world.plan(RestoreTarget())
    assert plan.timeline == 3
    assert plan.note == f"the latest timeline, 3, does not come from timeline 2, which left timeline 1 at {left_at}"
    assert world.plan(RestoreTarget(timeline="3")).note == ""


def test_what_only_a_timeline_that_was_left_shows_is_looked_for_there(world: World) -> None:
    world.fork(1)
    world.switch()
    world.archive()
    xid = RestoreTarget(TargetKind.XID, xid=4_000_000_000)
    assert "set TARGET_TIMELINE to 1 to look there" in refusal(world, xid).hint
    assert "TARGET_TIMELINE" not in refusal(world, replace(xid, timeline="1")).hint


def test_a_timeline_without_its_history_is_refused(world: World) -> None:
    refused = refusal(world, RestoreTarget(timeline="7"))
    assert "00000007.history" in refused.message
    assert "one of 1" in refused.hint


@pytest.fixture
def promoted_before() -> World:
    """A repository that was begun on timeline 2: a base backup there, commits, and no history file."""
    world = World()
    world.end_transaction(commits=True)
    world.fork(0)
    world.end_transaction(commits=True)
    world.switch()
    world.back_up(1, late=timedelta(0), parent=None)
    world.now += timedelta(seconds=10)
    world.end_transaction(commits=True)
    world.switch()
    world.archive()
    world.archived = {name: content for name, content in world.archived.items() if name.startswith("00000002")}
    world.histories.clear()
    return world


@pytest.mark.parametrize("timeline", ["latest", "current", "2"])
def test_a_repository_begun_on_a_later_timeline_needs_no_history_of_it(promoted_before: World, timeline: str) -> None:
    plan = promoted_before.plan(RestoreTarget(timeline=timeline))
    assert plan.timeline == 2
    # PostgreSQL refuses the number of a timeline, but 1, whose history file it cannot get.
    assert plan.effective_target.timeline == "current"
    assert plan.last_segment == max(promoted_before.archived)


def test_a_repository_begun_on_a_later_timeline_follows_the_histories_from_there(promoted_before: World) -> None:
    promoted_before.fork(0)
    promoted_before.switch()
    promoted_before.archive()
    plan = promoted_before.plan(RestoreTarget())
    assert (plan.timeline, plan.effective_target.timeline) == (3, "3")
    promoted_before.histories.clear()
    assert "WAL of timeline 3 is archived" in refusal(promoted_before, RestoreTarget()).message
    assert "one of 1, 2." in refusal(promoted_before, RestoreTarget(timeline="3")).hint


def test_wal_of_a_timeline_without_history_that_ended_before_all_backups_is_no_obstacle(world: World) -> None:
    ended = min(world.archived).replace("00000001", "00000005", 1)
    world.archived[ended] = b""
    assert "WAL of timeline 5" in refusal(world, RestoreTarget()).message
    world.backups[:] = []
    world.back_up(1, late=timedelta(0), parent=None)
    world.archive()
    assert world.plan(RestoreTarget()).timeline == 1


def test_wal_of_a_timeline_whose_history_is_lost_is_not_passed_over_in_silence(world: World) -> None:
    world.fork(2)
    world.now += timedelta(seconds=10)
    world.end_transaction(commits=True)
    world.switch()
    world.archive()
    world.histories.clear()
    refused = refusal(world, RestoreTarget())
    assert "WAL of timeline 2 is archived" in refused.message
    assert "TARGET_TIMELINE=1" in refused.hint
    assert world.plan(RestoreTarget(timeline="1")).timeline == 1


def test_the_wal_of_another_branch_is_never_taken_for_the_end(world: World) -> None:
    world.fork(3)
    world.now += timedelta(seconds=10)
    world.end_transaction(commits=True)
    world.switch()
    world.archive()
    first_of_child = min(name for name in world.archived if name.startswith("00000002"))
    del world.archived[first_of_child]
    assert first_of_child in refusal(world, RestoreTarget()).message


def test_an_empty_repository_is_refused() -> None:
    assert "holds no base backup" in refusal(World(), RestoreTarget()).message


def test_a_path_covers_a_fork_by_the_childs_segment(world: World) -> None:
    world.fork(3)
    world.switch()
    world.archive()
    plan = world.plan(RestoreTarget())
    fork = world.histories[2][0].switch_lsn
    assert Stretch(2, fork, None) in path_to(2, world.histories[2])
    names = {name[8:]: name[:8] for name in plan.segments}
    assert names[f"{0:08X}{fork // SEGMENT_BYTES:08X}"] == "00000002"
